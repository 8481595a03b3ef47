"""What the small model of word tasks reads: its tokenizer of characters, and the episodes it is trained on."""

from __future__ import annotations

import string
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pipelines.prompting.words import LINE

ARROW = " ->"
IGNORED = -100


def character_tokenizer(positions: int) -> PreTrainedTokenizerBase:
    """A tokenizer of printable ASCII characters, with one token for the arrow of an example.

    Args:
        positions: how many tokens the model reads.
    """
    tokens = ["<pad>", "</s>", "<unk>", ARROW, "\n", " ", *sorted(set(string.printable) - set(string.whitespace))]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(rf"{ARROW}|[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=positions,
        clean_up_tokenization_spaces=False,
    )


class Episodes(Dataset):
    """Episodes of word tasks as rows of equal length; item i is ``{input_ids, labels}``, a function of (seed, i) alone.

    A row holds solved examples of one task, drawn at random, one a line; the last one is cut off where the row ends.
    Half of the words of a task are those that are to come ``often``.
    The labels are the answers with the space before and the line end behind them: the words that are asked are random,
    and nothing is to be learnt about them.

    Args:
        tasks: name -> word -> answer; each is as likely as the others.
        tokenizer: that of ``character_tokenizer``.
        often: task -> words that are half of those drawn, where the task has them.
        count: how many episodes.
        length: tokens of a row.
        seed: of the draws.
    """

    def __init__(
        self,
        tasks: Mapping[str, Mapping[str, str]],
        tokenizer: PreTrainedTokenizerBase,
        *,
        often: Mapping[str, Collection[str]],
        count: int,
        length: int,
        seed: int,
    ):
        self.names, self.count, self.length, self.seed = list(tasks), count, length, seed
        word, answer = LINE.split("{word}")[1].split("{answer}")
        self.pairs, self.pools = {}, {}
        for name, pairs in tasks.items():
            ordered = sorted(pairs.items())
            self.pairs[name] = [(w + word.rstrip(" "), f" {a}{answer}") for w, a in ordered]
            common = [number for number, (w, _) in enumerate(ordered) if w in often.get(name, ())]
            self.pools[name] = np.array(common or range(len(ordered)))
        self._ids = tokenizer.get_vocab()

    def __len__(self) -> int:
        return self.count

    def lines(self, index: int) -> tuple[str, list[tuple[str, str]]]:
        """The task of an episode, and its lines as (what is asked, what is answered), enough to fill the row."""
        draw = np.random.default_rng([self.seed, index])
        name = self.names[draw.integers(len(self.names))]
        pairs, pool, lines, length = self.pairs[name], self.pools[name], [], 0
        while length < self.length:
            chosen = pool[draw.integers(len(pool))] if draw.random() < 0.5 else draw.integers(len(pairs))
            lines.append(pairs[chosen])
            length += self._tokens(lines[-1])
        return name, lines

    @staticmethod
    def _tokens(line: tuple[str, str]) -> int:
        return len(line[0]) - len(ARROW) + 1 + len(line[1])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids: list[int] = []
        labels: list[int] = []
        for asked, answered in self.lines(index)[1]:
            question = [self._ids[c] for c in asked.removesuffix(ARROW)] + [self._ids[ARROW]]
            answer = [self._ids[c] for c in answered]
            ids += question + answer
            labels += [IGNORED] * len(question) + answer
        return {"input_ids": torch.tensor(ids[: self.length]), "labels": torch.tensor(labels[: self.length])}


def answers_right(logits: Tensor, labels: Tensor, line_end: int) -> list[list[bool]]:
    """Which answers of each row are wholly right under teacher forcing, in order; a cut-off last one is left out.

    Args:
        logits: (B, T, V), of what follows each token.
        labels: (B, T), ``IGNORED`` outside the answers.
        line_end: id of the token that ends an answer.
    """
    right = logits[:, :-1].argmax(-1) == labels[:, 1:]
    found: list[list[bool]] = []
    for row, targets in zip(right.tolist(), labels[:, 1:].tolist(), strict=True):
        answers, whole = [], True
        for good, target in zip(row, targets, strict=True):
            if target == IGNORED:
                continue
            whole &= good
            if target == line_end:
                answers.append(whole)
                whole = True
        found.append(answers)
    return found


def by_position(rows: Sequence[Sequence[bool]], positions: Sequence[int]) -> dict[int, float]:
    """Share of right answers at each place of a row: after none, one, … solved examples.

    Raises:
        ValueError: no row reaches a place.
    """
    found = {}
    for place in positions:
        seen = [row[place] for row in rows if len(row) > place]
        if not seen:
            raise ValueError(f"no episode has {place + 1} whole answers")
        found[place] = sum(seen) / len(seen)
    return found
