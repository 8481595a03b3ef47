"""Best-of-n: sample n summaries, keep the one that the reward model likes best. What any training has to beat.

What N samples of a document say about every n ≤ N: choose n of them at random; how good is the one that the proxy
picks? Averaged over all choices this is an unbiased estimate of best-of-n (Nakano et al. 2021, appendix I), and no
choice need be drawn: sorted by the proxy, the i-th of N is picked with probability C(i−1, n−1) / C(N, n).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from pipelines.config import INERT, Source, StageConfig, config
from pipelines.corpus.fields import CorpusFields
from pipelines.errors import Problem
from pipelines.seq2seq.generation import GenerationConfig
from pipelines.seq2seq.models import model_problems
from pipelines.seq2seq.rollout_fields import RewardFields

if TYPE_CHECKING:
    import numpy as np


@config
class BestOfNConfig(RewardFields, CorpusFields, GenerationConfig, StageConfig):
    """Best-of-n as a baseline: the reward's and the judge's score of the best of n samples, against its KL."""

    output_dir: str = Field("runs/best_of_n", description="folder the stage writes into", json_schema_extra=INERT)
    model: Source = Field(description="the policy that is sampled, usually the supervised fine-tuned one")
    gold: str = Field("rouge", description="judge that scores what the reward picks: rouge or module:function")
    samples: int = Field(64, ge=2, description="summaries sampled for each document; n goes up to it in powers of two")
    split: Literal["train", "validation", "test"] = Field("test", description="split that is measured")
    max_examples: int | None = Field(256, ge=1, description="measure a random sample of at most so many documents")
    do_sample: bool = Field(True, description="sample (the only way)")
    resamples: int = Field(2000, ge=100, description="bootstrap resamples behind each interval")
    shard_size: int = Field(32, ge=1, description="documents between two savings of the samples")

    def problems(self) -> list[Problem]:
        """Whether there is a model, and whether it samples."""
        found = super().problems() + model_problems({"model": self.model})
        if not self.do_sample:
            found.append(Problem("do_sample", False, "best-of-n is about samples", "leave do_sample out"))
        return found

    @property
    def numbers(self) -> list[int]:
        """Every n that is measured: powers of two, and ``samples`` itself."""
        powers = [2**i for i in range(self.samples.bit_length()) if 2**i < self.samples]
        return [*powers, self.samples]


def pick_probabilities(proxy: Sequence[float], n: int) -> np.ndarray:
    """How probably each of N samples is the one picked from n that are chosen at random without replacement.

    Args:
        proxy: (N,) scores; of samples with the same score any is picked as probably as another.
        n: at most N.

    Returns:
        (N,) probabilities in the order of ``proxy``; they sum to 1.
    """
    import numpy as np
    from scipy.special import gammaln

    scores = np.asarray(proxy, dtype=float)
    total = len(scores)

    def log_choose(of: np.ndarray, some: int) -> np.ndarray:
        return gammaln(of + 1) - gammaln(some + 1) - gammaln(of - some + 1)

    # P(all of the n are at or below a level) = C(samples at or below, n) / C(N, n)
    levels, level, counts = np.unique(scores, return_inverse=True, return_counts=True)
    below = counts.cumsum()
    enough = below >= n
    cumulative = np.zeros(len(levels))
    cumulative[enough] = np.exp(log_choose(below[enough], n) - log_choose(np.array(total), n))
    return (np.diff(cumulative, prepend=0.0) / counts)[level]


def analytic_kl(n: int) -> float:
    """log n − (n−1)/n: KL(best-of-n ‖ policy) in nats where no two samples score alike, else an upper bound.

    Stiennon et al. (2020), appendix G.3; Hilton and Gao (2022), "Measuring Goodhart's law". That it is a bound: Beirami
    et al. (2024), theorem 3.1.

    Args:
        n: samples that one is picked from, at least 1.
    """
    import math

    return math.log(n) - (n - 1) / n


def measured_kl(proxy: Sequence[float], n: int) -> float:
    """KL(best-of-n ‖ policy) in nats of the policy that draws one of N samples: Σ_i π_n(i) log(π_n(i) / π(i)).

    Samples that score alike are one outcome, as best-of-n cannot tell them apart: this sees what ``analytic_kl`` does
    not, a policy that repeats itself. It cannot pass log N, so it is too low where n is near N.

    Args:
        proxy: (N,) scores of samples of one document.
        n: drawn with replacement.
    """
    import numpy as np

    _, counts = np.unique(np.asarray(proxy, dtype=float), return_counts=True)
    share = counts / counts.sum()
    picked = np.diff(share.cumsum() ** n, prepend=0.0)
    some = picked > 0
    return float((picked[some] * np.log(picked[some] / share[some])).sum())


def best_of_n(config: BestOfNConfig) -> dict[str, float]:
    """Sample, score, and measure every n.

    Writes ``samples.jsonl`` (id, samples, proxy and gold scores of each document) and ``curve.json``: for each n a mean
    of ``proxy``, ``gold`` and ``kl_measured`` with the ends of its interval, and ``kl``, the analytic one.

    Returns:
        For each n ``best_of_n/proxy_N``, ``best_of_n/gold_N`` and ``best_of_n/kl_measured_N`` with intervals over
        documents, and ``best_of_n/kl_N`` (N being the number); ``best_of_n/repeated`` (share of samples that another
        of the same document equals), ``best_of_n/examples``.

    Raises:
        UserError: unusable data, model, reward or judge.
    """
    from accelerate import PartialState

    from pipelines.corpus import load_corpus
    from pipelines.corpus.local import sample
    from pipelines.seq2seq.shards import run_shards
    from pipelines.stage import write_json

    corpus = load_corpus(config)[config.split]
    rows = corpus.select(sample(len(corpus), config.max_examples, config.split_seed, config.split)).to_list()
    found = run_shards(config.output_dir, config.split, rows, _Worker(config), size=config.shard_size)
    metrics, curve = _measure(config, found)
    if PartialState().is_main_process:
        write_json(Path(config.output_dir) / "curve.json", curve)
        with (Path(config.output_dir) / "samples.jsonl").open("w", encoding="utf-8") as file:
            for row, one in zip(rows, found, strict=True):
                file.write(json.dumps({"id": row["id"], **one}, ensure_ascii=False) + "\n")
    PartialState().wait_for_everyone()
    return metrics


class _Worker:
    """Samples and scores shards; what it needs is loaded when the first is due."""

    def __init__(self, settings: BestOfNConfig):
        self.settings = settings
        self.loaded: tuple[Any, ...] | None = None

    def _load(self) -> tuple[Any, ...]:
        from accelerate import PartialState

        from pipelines.seq2seq.annotators import load_annotator
        from pipelines.seq2seq.models import load_seq2seq, load_tokenizer
        from pipelines.seq2seq.rewards import load_rewards

        settings = self.settings
        tokenizer = load_tokenizer(settings.model, field="model")
        model = load_seq2seq(settings.model).to(PartialState().device)
        rewards = load_rewards(settings.reward_specs, settings.reward_weights, tokenizer)
        return model, tokenizer, rewards, load_annotator(settings.gold, field="gold")

    def __call__(self, rows: Sequence[dict[str, Any]], what: str) -> list[dict[str, Any]]:
        from accelerate import PartialState

        from pipelines.seq2seq.generation import generate_summaries

        if self.loaded is None:
            self.loaded = self._load()
        model, tokenizer, rewards, judge = self.loaded
        settings, count = self.settings, self.settings.samples
        written = generate_summaries(
            model,
            tokenizer,
            [row["document"] for row in rows],
            settings,
            ids=[row["id"] for row in rows],
            num_return_sequences=count,
            seed=settings.seed,
            progress=f"sampling {what}" if PartialState().is_main_process else None,
        )
        found = []
        for row, texts in zip(rows, written, strict=True):
            given = ([row["document"]] * count, texts, [row["references"]] * count)
            proxy = [score[0] for score in rewards(*given)]
            found.append({"samples": texts, "proxy": proxy, "gold": judge(*given)})
        return found


def _measure(settings: BestOfNConfig, found: Sequence[dict[str, Any]]) -> tuple[dict[str, float], list[dict]]:
    import numpy as np

    from pipelines.seq2seq.metrics import with_interval

    metrics: dict[str, float] = {}
    curve: list[dict[str, float]] = []
    for n in settings.numbers:
        columns: dict[str, list[float]] = {"proxy": [], "gold": [], "kl_measured": []}
        for one in found:
            picked = pick_probabilities(one["proxy"], n)
            columns["proxy"].append(float(picked @ np.asarray(one["proxy"])))
            columns["gold"].append(float(picked @ np.asarray(one["gold"])))
            columns["kl_measured"].append(measured_kl(one["proxy"], n))
        point: dict[str, float] = {"n": n, "kl": analytic_kl(n)}
        for name, values in columns.items():
            interval = with_interval(name, values, resamples=settings.resamples, seed=settings.seed)
            point |= {key.replace("_ci_", "_"): value for key, value in interval.items()}
            metrics |= {f"best_of_n/{name}_{n}{key.removeprefix(name)}": value for key, value in interval.items()}
        metrics[f"best_of_n/kl_{n}"] = point["kl"]
        curve.append(point)
    repeated = [1 - len(set(one["samples"])) / len(one["samples"]) for one in found]
    return metrics | {
        "best_of_n/repeated": sum(repeated) / len(repeated),
        "best_of_n/examples": float(len(found)),
    }, curve
