"""What the sides of a comparison share: model sizes, data, tokenizer, and taking turns.

Read by interpreters with unlike libraries: only what both have, and torch and tokenizers only where they are needed.
"""

from __future__ import annotations

import json
import os
import random
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

VOCABULARY = 512
PAD, END, UNKNOWN = 0, 1, 2
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"d_model": 128, "d_kv": 32, "d_ff": 512, "num_layers": 4, "num_heads": 4},
    "small": {"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8},
    "base": {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12},
}
"""Widths and depths: the small random T5 of the comparison, and those of T5-small and T5-base."""


def word(number: int) -> str:
    """The one word of the vocabulary that becomes token ``number``."""
    return f"w{number}"


class Texts:
    """Random texts of exact lengths, the same on every side: every row fills its shape, nothing is padding."""

    def __init__(self, seed: int = 0):
        self.random = random.Random(seed)

    def ids(self, length: int) -> list[int]:
        """``length`` tokens, the last one the end mark."""
        return [self.random.randint(3, VOCABULARY - 1) for _ in range(length - 1)] + [END]

    def text(self, length: int) -> str:
        """A text that the tokenizer turns into ``length`` tokens, the end mark included."""
        return " ".join(word(number) for number in self.ids(length)[:-1])

    def pairs(self, count: int, source: int, target: int) -> dict[str, list[str]]:
        """Columns prompt, chosen, rejected."""
        rows = [(self.text(source), self.text(target), self.text(target)) for _ in range(count)]
        return {name: [row[n] for row in rows] for n, name in enumerate(("prompt", "chosen", "rejected"))}


def tokenizer(end: str = "</s>") -> Any:
    """One token a word; ``end`` is the end token, and where it is another than ``</s>``, one no model can produce."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": PAD, "</s>": END, "<unk>": UNKNOWN, **{word(i): i for i in range(3, VOCABULARY)}}
    words.setdefault(end, len(words))
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, words[end])])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token=end, unk_token="<unk>", model_max_length=4096
    )


def model(size: str) -> Any:
    """A random T5 without dropout, the same at every call."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY,
            dropout_rate=0.0,
            pad_token_id=PAD,
            eos_token_id=END,
            decoder_start_token_id=PAD,
            **SIZES[size],
        )
    )


def reward(tokens: list[int]) -> float:
    """What a sampled completion is paid: its share of even tokens."""
    return sum(number % 2 == 0 for number in tokens) / max(1, len(tokens))


def peak_megabytes() -> float:
    """The most memory this process has held so far (resident, in 10^6 bytes)."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


class Turns:
    """One side of a comparison of two processes that take turns, so that a machine that slows down slows both.

    The side calls ``wait(label)`` wherever a turn ends. The time since the last turn began is reported under that
    label (None: not reported), and the process sleeps until it is told to go on.
    """

    def __init__(self) -> None:
        # Whatever libraries print goes to stderr: stdout carries the reports and nothing else.
        self.out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self.start: tuple[float, float] | None = None

    def _say(self, message: dict[str, Any]) -> None:
        self.out.write(json.dumps(message) + "\n")
        self.out.flush()

    def wait(self, label: str | None = None, details: Callable[[], dict[str, float]] = dict) -> None:
        """End a turn and wait for the next. Details, numbers of the side's own, are found after it and reported."""
        now, cpu = time.perf_counter(), time.process_time()
        wall = now - self.start[0] if self.start else 0.0
        used = cpu - self.start[1] if self.start else 0.0
        self._say({"turn": label, "wall": wall, "cpu": used, **details()})
        if not sys.stdin.readline():
            sys.exit("the other end has gone")
        self.start = (time.perf_counter(), time.process_time())

    def done(self, **details: Any) -> None:
        """The last report: peak memory and whatever else."""
        self._say({"done": True, "peak": peak_megabytes(), **details})


def job() -> dict[str, Any]:
    """What the command line asks of a side, with the number of threads set."""
    import torch

    asked = json.loads(sys.argv[1])
    torch.set_num_threads(asked["threads"])
    return asked


def gpu_peak_megabytes() -> float | None:
    """The most GPU memory that tensors have taken, or None without a GPU."""
    import torch

    return torch.cuda.max_memory_allocated() / 1e6 if torch.cuda.is_available() else None
