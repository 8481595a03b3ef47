"""A world so small that everything in it can be enumerated, to check alignment against its known optimum.

Completions are at most T tokens of a vocabulary of V, so there are few of them: their exact probabilities under a model
are a table, and so is what maximizing E[r] − β KL(π‖π_ref) must lead to,

    π*(y|x) ∝ π_ref(y|x) e^{r(x,y)/β}                       (Ziegler et al. 2019; Rafailov et al. 2023, eq. 4).

DPO and its listwise form have the same optimum when preferences come from the rewards by Bradley–Terry or
Plackett–Luce. Here are the tables, the data sets with every completion in them, and the distance from the optimum.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from pipelines.seq2seq.collators import pad_rows
from pipelines.seq2seq.losses import plackett_luce_loss
from pipelines.seq2seq.view import as_view, encode, sequence_log_probs

PAD, END = 0, 1


@dataclass(frozen=True)
class World:
    """Sources, every completion, and what each completion of each source is worth.

    Args:
        vocabulary: V tokens: padding (an ordinary token where a model writes it), the end mark, and letters.
        length: T, tokens of a completion, its end mark included.
        sources: S token lists.
        completions: N token lists: those that end within T tokens, and those cut there.
        rewards: (S, N) fp64; completions that read alike (they differ in padding or are cut) are worth the same.
    """

    vocabulary: int
    length: int
    sources: list[list[int]]
    completions: list[list[int]]
    rewards: Tensor

    def log_probs(self, model: Any, *, gradient: bool = False) -> Tensor:
        """log π(y|x) of every completion of every source under a model, by one teacher-forced pass.

        Args:
            model: an encoder-decoder over the world's vocabulary (it becomes a view).
            gradient: whether they can be differentiated.

        Returns:
            (S, N) fp64; e to them sums to 1 in each row.
        """
        model = as_view(model)
        source_ids, source_mask = pad_rows(self.sources, PAD)
        ids, mask = pad_rows(self.completions * len(self.sources), PAD)
        with torch.set_grad_enabled(gradient):
            states = encode(model, source_ids, source_mask)
            found = sequence_log_probs(model, states, source_mask, ids, mask, order="source-major")
        return found.double().sum(dim=1).view(len(self.sources), -1)

    def optimum(self, reference: Tensor, beta: float) -> Tensor:
        """log π*, where E[r] − β KL(π‖π_ref) is largest (Ziegler et al. 2019; Rafailov et al. 2023, eq. 4).

        Args:
            reference: (S, N) log π_ref.
            beta: β > 0, in units of reward a nat.

        Returns:
            (S, N) fp64.
        """
        return torch.log_softmax(reference + self.rewards / beta, dim=1)

    def text(self, completion: list[int]) -> str:
        """A completion as ``make_tokenizer``'s decoding shows it."""
        return " ".join(f"w{token}" for token in completion if token > END)

    def reward_of(self, documents: list[str], summaries: list[str], references: list[list[str]]) -> list[float]:
        """The rewards as a reward function: documents are numbers of sources, in words."""
        table = {
            (str(source), self.text(completion)): float(self.rewards[source, number])
            for source in range(len(self.sources))
            for number, completion in enumerate(self.completions)
        }
        return [table[document, summary] for document, summary in zip(documents, summaries, strict=True)]


def make_world(*, vocabulary: int = 5, length: int = 3, sources: int = 2, spread: float = 1.0, seed: int = 0) -> World:
    """A world with random rewards.

    Args:
        vocabulary: V, padding and end mark included.
        length: T, tokens of a completion at most.
        sources: how many prompts; each has rewards of its own.
        spread: standard deviation of the rewards.
        seed: of the rewards.
    """
    generator = torch.Generator().manual_seed(seed)
    others = [token for token in range(vocabulary) if token != END]
    completions = [[*letters, END] for size in range(length) for letters in itertools.product(others, repeat=size)] + [
        list(letters) for letters in itertools.product(others, repeat=length)
    ]
    letters = list(range(END + 1, vocabulary))
    source_lists = [[letters[s % len(letters)]] * (1 + s // len(letters)) + [END] for s in range(sources)]
    world = World(vocabulary, length, source_lists, completions, torch.zeros(sources, len(completions)))
    texts = [world.text(completion) for completion in completions]
    distinct = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    worth = spread * torch.randn(sources, len(distinct), generator=generator, dtype=torch.float64)
    return World(vocabulary, length, source_lists, completions, worth[:, [distinct[text] for text in texts]])


def make_policy(world: World, *, width: int = 32, seed: int = 0) -> Any:
    """A random one-layer BART over the world's vocabulary, ``width`` wide, without dropout.

    BART because one layer of it learns any such table in a hundred steps; a T5 of that size, without biases and
    absolute positions, gets stuck long before, even when it is given the exact gradient of the divergence.
    """
    from transformers import BartConfig, BartForConditionalGeneration

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = BartConfig(
            vocab_size=world.vocabulary,
            d_model=width,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=2 * width,
            decoder_ffn_dim=2 * width,
            max_position_embeddings=16,
            dropout=0.0,
            init_std=0.2,
            pad_token_id=PAD,
            bos_token_id=END,
            eos_token_id=END,
            forced_eos_token_id=None,
            decoder_start_token_id=PAD,
        )
        return BartForConditionalGeneration(config)


def make_tokenizer(world: World) -> Any:
    """A tokenizer of the world's letters, ``w2``, ``w3`` …"""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": PAD, "</s>": END} | {f"w{token}": token for token in range(END + 1, world.vocabulary)}
    core = Tokenizer(models.WordLevel(words, unk_token="w2"))
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>")


def divergence(log_probs: Tensor, optimum: Tensor) -> float:
    """KL(π‖π*) = Σ_y π(y|x) log(π(y|x)/π*(y|x)), the mean over sources.

    Args:
        log_probs: (S, N) log π.
        optimum: (S, N) log π*.

    Returns:
        Nats.
    """
    return float((log_probs.exp() * (log_probs - optimum)).sum(dim=1).mean())


def all_pairs(world: World, copies: int) -> Dataset:
    """Every pair of completions of every source, tokenized, in both orders, as often as Bradley–Terry prefers each.

    Args:
        world: its rewards are the scores: P(y ≻ y') = σ(r(y) − r(y')).
        copies: how often each unordered pair stands there; the two orders share them in proportion, rounded.
    """
    rows = []
    for source, rewards in zip(world.sources, world.rewards, strict=True):
        for first, second in itertools.combinations(range(len(world.completions)), 2):
            preferred = round(copies / (1 + math.exp(float(rewards[second] - rewards[first]))))
            one, other = world.completions[first], world.completions[second]
            rows += [{"prompt_ids": source, "chosen_ids": one, "rejected_ids": other}] * preferred
            rows += [{"prompt_ids": source, "chosen_ids": other, "rejected_ids": one}] * (copies - preferred)
    return Dataset.from_list(rows)


def all_lists(world: World, *, size: int, copies: int, seed: int = 0) -> Dataset:
    """Lists of ``size`` random completions with every ranking, as often as Plackett–Luce has it.

    Args:
        world: its rewards are the scores.
        size: K; a list has K! rankings.
        copies: over how many rows each list's rankings are shared out, by largest remainders.
        seed: of the lists; every completion stands in as many of them as any other, give or take one.
    """
    count = len(world.completions)
    generator = torch.Generator().manual_seed(seed)
    rankings = torch.tensor(list(itertools.permutations(range(size))))
    rows = []
    for source, rewards in zip(world.sources, world.rewards, strict=True):
        for _ in range(size):
            order = torch.randperm(count, generator=generator).tolist()
            for start in range(0, count - size + 1, size):
                chosen = order[start : start + size]
                share = plackett_luce_loss(rewards[chosen].expand(len(rankings), size), rankings).neg().exp() * copies
                whole = share.floor()
                rest = (share - whole).argsort(descending=True)[: copies - int(whole.sum())]
                whole[rest] += 1
                completions = [world.completions[i] for i in chosen]
                for ranking, times in zip(rankings.tolist(), whole.int().tolist(), strict=True):
                    rows += [
                        {"prompt_ids": source, "completion_ids": completions, "ranking": ranking, "known": size}
                    ] * times
    return Dataset.from_list(rows)
