"""Sampling that depends on nothing but (seed, prompt, sample number, step, position, token).

Gumbel-max: argmax_j (logit_j / τ + g_j) with independent standard Gumbel g_j is a draw from softmax(logits / τ) (Gumbel
1954; Maddison et al. 2014). The g_j come from a counter-based generator, a hash of what identifies the draw (Salmon et
al. 2011), not from a stateful one: the same completions come whatever the batch, the padding, the number of processes,
or where a run was interrupted. (Rounding that differs between batch shapes can flip a draw only at a near tie.)
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, LogitsProcessor

from pipelines.seq2seq.shared_attention import can_share, shared_sources
from pipelines.seq2seq.stacks import known_arguments, states_mask, unwrap
from pipelines.seq2seq.view import decoder_start_id, output_logits


def _signed(value: int, bits: int = 64) -> int:
    value %= 1 << bits
    return value - (1 << bits) if value >> (bits - 1) else value


_GAMMA = _signed(0x9E3779B97F4A7C15)
_MIX = (_signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB))
_ROUNDS = tuple(_signed(c, 32) for c in (0x85EBCA6B, 0xC2B2AE35, 0x9E3779B1))


def _splitmix(state: Tensor) -> Tensor:
    """The output function of SplitMix64 (Steele et al. 2014) on int64; multiplication wraps around."""
    state = state + _GAMMA
    state = (state ^ ((state >> 30) & ((1 << 34) - 1))) * _MIX[0]
    state = (state ^ ((state >> 27) & ((1 << 37) - 1))) * _MIX[1]
    return state ^ ((state >> 31) & ((1 << 33) - 1))


def prompt_keys(ids: Sequence[str]) -> Tensor:
    """A 64-bit key for each prompt from its id: (rows,) int64, the same in every process and on every machine."""
    digests = (hashlib.sha256(name.encode("utf-8")).digest()[:8] for name in ids)
    return torch.tensor([int.from_bytes(d, "little", signed=True) for d in digests], dtype=torch.int64)


def stream_keys(seed: int, prompts: Tensor, sample_numbers: Tensor, step: int) -> Tensor:
    """One key for each completion: a hash of (seed, step, prompt, sample number).

    Args:
        seed: seed of the run.
        prompts: (R,) int64, from ``prompt_keys``.
        sample_numbers: (R,) int64, which completion of its prompt each row is.
        step: which visit to the prompt this is (the number of the rollout; 0 where there is one).

    Returns:
        (R,) int64.
    """
    key = _splitmix(torch.tensor(_signed(seed), dtype=torch.int64, device=prompts.device))
    key = _splitmix(key ^ step)
    key = _splitmix(key ^ prompts)
    return _splitmix(key ^ sample_numbers)


@functools.lru_cache(maxsize=8)
def _token_codes(vocabulary: int, device: torch.device) -> Tensor:
    """(1, V) int32, a fixed scrambled code for each token, made once."""
    return _splitmix(torch.arange(vocabulary, dtype=torch.int64, device=device)).to(torch.int32)[None]


def uniforms(keys: Tensor, position: int, size: int) -> Tensor:
    """Uniform numbers in (0, 1] for each token at one position of each completion.

    Args:
        keys: (R,) int64 from ``stream_keys``.
        position: of the token in its completion, from 0.
        size: how many numbers a row, the size of the vocabulary.

    Returns:
        (R, size) fp32, multiples of 2^-31 where they are small: the winner of a Gumbel race has a small one.
    """
    keys = _splitmix(keys ^ position)
    # 32-bit rounds with two keys a row: five times faster than 64-bit multiplications over the whole vocabulary.
    low, high = keys.to(torch.int32)[:, None], (keys >> 32).to(torch.int32)[:, None]
    bits = (_token_codes(size, keys.device) ^ low).mul_(_ROUNDS[0])
    bits.bitwise_xor_((bits >> 16).bitwise_and_(0xFFFF)).add_(high).mul_(_ROUNDS[1])
    bits.bitwise_xor_((bits >> 15).bitwise_and_(0x1FFFF)).mul_(_ROUNDS[2])
    return (bits >> 1).bitwise_and_(0x7FFFFFFF).float().add_(0.5).mul_(2.0**-31)


def gumbel_noise(keys: Tensor, position: int, vocabulary: int) -> Tensor:
    """Standard Gumbel noise for one position of each completion.

    Args:
        keys: (R,) int64 from ``stream_keys``.
        position: of the token in its completion, from 0.
        vocabulary: V.

    Returns:
        (R, V) fp32.
    """
    # −log(−log(1 − u)): 1 − u is as uniform as u, and small u, the winners, keep their precision.
    return uniforms(keys, position, vocabulary).neg_().log1p_().neg_().log_().neg_()


class GumbelSampler(LogitsProcessor):
    """Makes greedy ``generate(do_sample=False)`` draw from softmax(logits / temperature), reproducibly.

    It must be the last processor. Position 0 is the first token after the decoder's start token.

    Args:
        seed: seed of the run.
        prompt_keys: (R,) int64, one for each row that is generated (``prompt_keys`` makes them from ids).
        sample_numbers: (R,) int64, which completion of its prompt each row is; 0 for all where None.
        step: which visit to the prompt this is.
        temperature: positive; the logits are divided by it.
    """

    def __init__(
        self,
        seed: int,
        prompt_keys: Tensor,
        sample_numbers: Tensor | None = None,
        step: int = 0,
        temperature: float = 1.0,
    ):
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, not {temperature}")
        sample_numbers = torch.zeros_like(prompt_keys) if sample_numbers is None else sample_numbers
        self.keys = stream_keys(seed, prompt_keys, sample_numbers.to(prompt_keys), step)
        self.temperature = temperature

    @classmethod
    def of_samples(
        cls, seed: int, prompt_keys: Tensor, samples: int, *, step: int = 0, temperature: float = 1.0
    ) -> GumbelSampler:
        """K completions of each of B prompts, rows source-major: row b·K + k draws completion k of prompt b.

        Args:
            seed: seed of the run.
            prompt_keys: (B,) int64.
            samples: K.
            step: which visit to the prompts this is.
            temperature: positive.
        """
        numbers = torch.arange(samples, device=prompt_keys.device).repeat(len(prompt_keys))
        return cls(seed, prompt_keys.repeat_interleave(samples), numbers, step, temperature)

    def at(self, position: int, logits: Tensor, rows: Tensor | None = None) -> Tensor:
        """Perturbed logits (R, V) fp32 at a position; ``rows`` says which rows these are where some are left out."""
        keys = (self.keys if rows is None else self.keys[rows]).to(logits.device)
        logits = logits.float() if self.temperature == 1.0 else logits.float() / self.temperature
        return gumbel_noise(keys, position, logits.shape[-1]).add_(logits)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The logits of the next position with its noise added, as ``generate`` calls a processor.

        Args:
            input_ids: (R, 1 + t), the decoder's start token and the t tokens that came so far.
            scores: (R, V) logits of position t.

        Returns:
            (R, V) fp32; their argmax is the draw.
        """
        return self.at(input_ids.shape[1] - 1, scores)


@torch.no_grad()
def sample_completions(
    model: Any,
    encoder_states: Tensor,
    source_mask: Tensor | None,
    sampler: GumbelSampler,
    *,
    samples: int,
    max_new_tokens: int,
    eos_token_id: int,
    pad_token_id: int,
) -> tuple[Tensor, Tensor]:
    """K completions of each encoded source, the encoder's states and the cross-attention's keys computed once.

    The same tokens as ``generate`` with the sampler as its only processor, but the first position is decoded once for
    all K, and rows that have ended leave the batch.

    Args:
        model: a view, or a PEFT model around one.
        encoder_states: (B, S, H) from ``view.encode``.
        source_mask: (B, S) of the sources, which a speech encoder may have shortened since; or None.
        sampler: with R = B·K rows, source-major: row b·K + k is completion k of source b.
        samples: K.
        max_new_tokens: T, the end token included.
        eos_token_id: the token that ends a completion.
        pad_token_id: what stands after it.

    Returns:
        completion_ids (R, T') int64 without the decoder's start token, T' ≤ T the longest that came, and
        completion_mask (R, T') int64, 1 up to and including the end token.
    """
    inner = unwrap(model)
    decoder, device, sources = inner.get_decoder(), encoder_states.device, len(encoder_states)
    # By its configuration a decoder with a sliding window (T5Gemma) would also keep only a window of the source.
    cache = EncoderDecoderCache(DynamicCache(config=decoder.config), DynamicCache())
    scale = inner.__dict__.get("_view_scale", 1.0)
    shared = samples > 1 and can_share(model)
    source_mask = states_mask(inner, encoder_states, source_mask)

    def next_logits(tokens: Tensor) -> Tensor:
        with shared_sources(model) if shared and len(tokens) != len(states) else nullcontext():
            sources = {"encoder_hidden_states": states, "encoder_attention_mask": source_mask}
            sources = known_arguments(decoder, sources)
            result = decoder(input_ids=tokens[:, None], past_key_values=cache, use_cache=True, **sources)
        return output_logits(inner, result.last_hidden_state[:, -1] * scale)

    total = sources * samples
    completions = torch.full((total, max_new_tokens), pad_token_id, dtype=torch.int64, device=device)
    mask = torch.zeros_like(completions)
    rows = torch.arange(total, device=device)
    states = encoder_states
    start = torch.full((sources,), decoder_start_id(inner), dtype=torch.int64, device=device)
    logits = next_logits(start).repeat_interleave(samples, 0)
    # From here on the decoder finds the sources' keys and values in the cache and reads only the states' shape.
    cache.self_attention_cache.batch_repeat_interleave(samples)
    if not shared:
        cache.cross_attention_cache.batch_repeat_interleave(samples)
        states, source_mask = (None if t is None else t.repeat_interleave(samples, 0) for t in (states, source_mask))
    # What leaves the batch together once all of it has ended: the rows of a source where they share its keys.
    group = samples if shared else 1
    alive = torch.ones_like(rows, dtype=torch.bool)
    for position in range(max_new_tokens):
        tokens = sampler.at(position, logits, rows).argmax(-1)
        tokens = torch.where(alive, tokens, pad_token_id)
        completions[rows, position] = tokens
        mask[rows, position] = alive.long()
        alive = alive & (tokens != eos_token_id)
        running = alive.view(-1, group).any(1)
        count = int(running.sum())
        if not count or position + 1 == max_new_tokens:
            break
        # Leaving out what has ended copies the cache, so it waits until a quarter has.
        if count <= 0.75 * len(running):
            kept = running.nonzero().squeeze(1)
            kept_rows = (kept[:, None] * group + torch.arange(group, device=device)).flatten()
            cache.self_attention_cache.batch_select_indices(kept_rows)
            cache.cross_attention_cache.batch_select_indices(kept)
            states, source_mask = (None if t is None else t[kept] for t in (states, source_mask))
            rows, tokens, alive = rows[kept_rows], tokens[kept_rows], alive[kept_rows]
        logits = next_logits(tokens)
    return completions[:, : position + 1], mask[:, : position + 1]
