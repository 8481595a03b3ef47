"""A small encoder-decoder transformer whose decoder can keep keys and values, and three ways to generate with it.

The plan is that of Vaswani et al. 2017 with the norm before each part (Xiong et al. 2020) and sinusoidal positions.
Attention is written as two matrix products, so that what is read is what is computed and counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn


class KeysValues(NamedTuple):
    """Keys and values of one attention, (n, heads, length, width/heads) each."""

    keys: Tensor
    values: Tensor


@dataclass
class Cache:
    """What a decoder keeps between two tokens.

    Attributes:
        past: of each layer, keys and values of the tokens so far; empty before the first.
        memory: of each layer, keys and values of the encoder's states; computed once a source.
        length: tokens so far.
    """

    memory: list[KeysValues]
    past: list[KeysValues] = field(default_factory=list)
    length: int = 0


def positions(start: int, length: int, width: int, like: Tensor) -> Tensor:
    """(length, width) sinusoids of the positions start…start+length−1 (Vaswani et al. 2017, §3.5)."""
    place = torch.arange(start, start + length, dtype=like.dtype, device=like.device)[:, None]
    rate = torch.exp(torch.arange(0, width, 2, dtype=like.dtype, device=like.device) * (-math.log(10_000.0) / width))
    return torch.cat([(place * rate).sin(), (place * rate).cos()], dim=1)


class Attention(nn.Module):
    """Multi-head attention in two steps, so that keys and values can be kept.

    Args:
        width: of the states.
        heads: that share it.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def keys_values(self, x: Tensor) -> KeysValues:
        """Of the states (n, length, width) that are attended to."""
        return KeysValues(self._split(self.key(x)), self._split(self.value(x)))

    def forward(self, x: Tensor, seen: KeysValues, *, causal: bool = False) -> Tensor:
        """What the states (n, t, width) take from ``seen``, (n, t, width).

        With ``causal`` the t states are the last t of those seen, and each sees those up to itself.
        """
        scores = self._split(self.query(x)) @ seen.keys.transpose(2, 3) / (x.shape[2] / self.heads) ** 0.5
        if causal and x.shape[1] > 1:
            t, length = scores.shape[2:]
            later = torch.ones(t, length, dtype=torch.bool, device=x.device).triu(length - t + 1)
            scores = scores.masked_fill(later, float("-inf"))
        return self.out((scores.softmax(3) @ seen.values).transpose(1, 2).flatten(2))


def _feed_forward(width: int, inner: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, inner, bias=False), nn.ReLU(), nn.Linear(inner, width, bias=False))


class EncoderLayer(nn.Module):
    """Attention among the source's states, then a feed-forward network."""

    def __init__(self, width: int, heads: int, inner: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.attention, self.feed = Attention(width, heads), _feed_forward(width, inner)

    def forward(self, x: Tensor) -> Tensor:
        """(n, s, width) to the same."""
        y = self.norms[0](x)
        x = x + self.attention(y, self.attention.keys_values(y))
        return x + self.feed(self.norms[1](x))


class DecoderLayer(nn.Module):
    """Attention among the target's states so far, attention to the source, then a feed-forward network."""

    def __init__(self, width: int, heads: int, inner: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.attention, self.to_source = Attention(width, heads), Attention(width, heads)
        self.feed = _feed_forward(width, inner)

    def forward(self, x: Tensor, memory: KeysValues, past: KeysValues | None) -> tuple[Tensor, KeysValues]:
        """New states (n, t, width) after the ``past`` ones; returns them and all keys and values so far."""
        y = self.norms[0](x)
        seen = self.attention.keys_values(y)
        if past is not None:
            seen = KeysValues(*(torch.cat(pair, dim=2) for pair in zip(past, seen, strict=True)))
        x = x + self.attention(y, seen, causal=True)
        x = x + self.to_source(self.norms[1](x), memory)
        return x + self.feed(self.norms[2](x)), seen


class EncoderDecoder(nn.Module):
    """The whole model.

    Args:
        vocabulary: tokens, of source and target.
        width: of the states, even and a multiple of ``heads``.
        heads: of each attention.
        inner: units of the feed-forward networks.
        layers: of the encoder, and of the decoder.
    """

    def __init__(self, vocabulary: int, width: int, heads: int, inner: int, layers: int):
        super().__init__()
        self.width = width
        self.embedding = nn.Embedding(vocabulary, width)
        self.encoder = nn.ModuleList(EncoderLayer(width, heads, inner) for _ in range(layers))
        self.decoder = nn.ModuleList(DecoderLayer(width, heads, inner) for _ in range(layers))
        self.encoder_norm, self.decoder_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def _embedded(self, tokens: Tensor, start: int = 0) -> Tensor:
        x = self.embedding(tokens)
        return x + positions(start, tokens.shape[1], self.width, x)

    def encode(self, source: Tensor) -> Tensor:
        """Tokens (n, s) to states (n, s, width)."""
        x = self._embedded(source)
        for layer in self.encoder:
            x = layer(x)
        return self.encoder_norm(x)

    def start(self, states: Tensor) -> Cache:
        """The cache before the first token, of the encoder's states (n, s, width)."""
        return Cache([layer.to_source.keys_values(states) for layer in self.decoder])

    def decode(self, tokens: Tensor, cache: Cache) -> Tensor:
        """Logits (n, t, vocabulary) after each of the next tokens (n, t), which the cache then holds too."""
        x = self._embedded(tokens, cache.length)
        kept = []
        for number, layer in enumerate(self.decoder):
            x, seen = layer(x, cache.memory[number], cache.past[number] if cache.past else None)
            kept.append(seen)
        cache.past, cache.length = kept, cache.length + tokens.shape[1]
        return self.head(self.decoder_norm(x))

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Teacher forcing: logits (n, t, vocabulary) after each token of the target (n, t), all in one pass."""
        return self.decode(target, self.start(self.encode(source)))


@torch.no_grad()
def generate_naively(model: EncoderDecoder, source: Tensor, length: int) -> Tensor:
    """The likeliest next token, ``length`` times, each from the whole model anew. (n, s) to (n, length + 1), from 0."""
    target = source.new_zeros(len(source), 1)
    for _ in range(length):
        target = torch.cat([target, model(source, target)[:, -1:].argmax(2)], dim=1)
    return target


@torch.no_grad()
def generate_encoding_once(model: EncoderDecoder, source: Tensor, length: int) -> Tensor:
    """The same, the source encoded once; the target's tokens so far go through the decoder anew each time."""
    target, states = source.new_zeros(len(source), 1), model.encode(source)
    for _ in range(length):
        target = torch.cat([target, model.decode(target, model.start(states))[:, -1:].argmax(2)], dim=1)
    return target


@torch.no_grad()
def generate_cached(model: EncoderDecoder, source: Tensor, length: int) -> Tensor:
    """The same, only the newest token goes through the decoder."""
    target, cache = source.new_zeros(len(source), 1), model.start(model.encode(source))
    for _ in range(length):
        target = torch.cat([target, model.decode(target[:, -1:], cache)[:, -1:].argmax(2)], dim=1)
    return target


GENERATORS = {"naive": generate_naively, "encode_once": generate_encoding_once, "cached": generate_cached}


class Sizes(NamedTuple):
    """What decides how much is computed."""

    vocabulary: int
    width: int
    inner: int
    layers: int


def encoder_macs(size: Sizes, s: int) -> int:
    """Multiply-accumulates of encoding s tokens: each layer 4sd² (projections) + 2s²d (attention) + 2sdf."""
    d, f = size.width, size.inner
    return size.layers * (4 * s * d * d + 2 * s * s * d + 2 * s * d * f)


def memory_macs(size: Sizes, s: int) -> int:
    """Keys and values of s encoder states for every decoder layer: 2sd² each."""
    return size.layers * 2 * s * size.width**2


def decoder_macs(size: Sizes, s: int, new: int, seen: int) -> int:
    """The decoder on ``new`` tokens that see ``seen`` (themselves included) and s source states, the output included.

    Each layer 4d² + 2d² (projections of both attentions, the source's keys and values apart) + 2·seen·d + 2sd
    (attention) + 2df a new token; then dV.
    """
    d, f = size.width, size.inner
    layer = 6 * d * d + 2 * seen * d + 2 * s * d + 2 * d * f
    return new * (size.layers * layer + d * size.vocabulary)


def generation_macs(size: Sizes, how: str, s: int, length: int) -> int:
    """Multiply-accumulates of generating ``length`` tokens from s, by one of ``GENERATORS``."""
    encode, memory = encoder_macs(size, s), memory_macs(size, s)
    if how == "cached":
        return encode + memory + sum(decoder_macs(size, s, 1, t) for t in range(1, length + 1))
    anew = sum(memory + decoder_macs(size, s, t, t) for t in range(1, length + 1))
    return anew + encode * (length if how == "naive" else 1)
