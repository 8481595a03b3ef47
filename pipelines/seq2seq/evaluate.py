"""Measuring models on held-out documents, beside baselines that need no training; every mean with its interval."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from pipelines.config import INERT, Source, StageConfig, config, nearest
from pipelines.corpus.fields import CorpusFields
from pipelines.errors import Problem, problems_of
from pipelines.seq2seq.annotators import annotator_problems, annotator_sources
from pipelines.seq2seq.generation import GenerationConfig, settings_of
from pipelines.seq2seq.models import check_reward_model, model_problems

BASELINES = ("lead1", "name", "qualified_name", "random_summary")
ROUGE_METRIC = Path(__file__).parent / "rouge_metric"


@config
class EvaluateConfig(CorpusFields, GenerationConfig, StageConfig):
    """Measure models on held-out documents: ROUGE, gold and proxy scores, win rate, KL, and trivial baselines."""

    output_dir: str = Field("runs/evaluate", description="folder the stage writes into", json_schema_extra=INERT)
    systems: dict[str, Source] = Field(description="name -> folder or hub id of each model that is measured")
    reference_system: str | None = Field(
        "sft", description="the system that the others' win rate and KL are measured against; null measures neither"
    )
    reward_model: Source | None = Field(None, description="reward model whose score is the proxy; null: no proxy")
    annotator: str = Field(
        "rouge", description="the gold judge: rouge (mean of ROUGE-1/2/L to the references) or your own module:function"
    )
    split: Literal["train", "validation", "test"] = Field("test", description="split that is measured")
    max_examples: int | None = Field(None, ge=1, description="measure a random sample of at most so many documents")
    baselines: bool = Field(True, description="also measure lead-1, names in words and a random training summary")
    kl_samples: int = Field(1, ge=0, description="samples for each document that the KL is estimated on; 0: no KL")
    resamples: int = Field(2000, ge=100, description="bootstrap resamples behind each interval")
    shard_size: int = Field(512, ge=1, description="documents between two savings of a system's outputs")

    def problems(self) -> list[Problem]:
        """Systems, reward model and judge that cannot be had, and names that cannot be a metric's."""
        found = super().problems() + annotator_problems(self.annotator)
        found += model_problems({f"systems.{name}": path for name, path in self.systems.items()})
        if self.reward_model is not None:
            found += problems_of(partial(check_reward_model, self.reward_model, "reward_model"))
        if not self.systems:
            found.append(Problem("systems", "{}", "there is nothing to measure", "give systems.NAME=FOLDER"))
        for name in self.systems:
            if name in BASELINES or "/" in name or not name.strip():
                problem = "names a baseline" if name in BASELINES else "cannot be part of a metric's name"
                found.append(Problem("systems", name, problem, "choose another name"))
        if self.systems and self.reference_system is not None and self.reference_system not in self.systems:
            mend = f"{nearest(self.reference_system, list(self.systems))} (null measures against none)"
            found.append(Problem("reference_system", self.reference_system, "is not one of systems", mend))
        return found

    def environment(self) -> dict[str, str]:
        """The source of the user's own judge."""
        return super().environment() | annotator_sources([self.annotator])


def sequence_kl(
    policy: Any,
    reference: Any,
    tokenizer: Any,
    documents: Sequence[str],
    settings: GenerationConfig,
    *,
    ids: Sequence[str] | None = None,
    samples: int = 1,
    seed: int = 0,
    progress: str | None = None,
) -> list[float]:
    """Estimates of KL(policy ‖ reference) over whole summaries, one for each document, in nats.

    KL = E_{y ~ policy(·|x)} [ log policy(y|x) − log reference(y|x) ], estimated by the mean log-ratio of ``samples``
    draws from the policy at temperature 1, untruncated but for ``max_target_length``; unbiased, so one document's
    estimate may be negative. All in float32.

    Args:
        policy: the model that is sampled.
        reference: a model with the same tokenizer on the same device.
        tokenizer: of both.
        documents: N texts, without the prefix.
        settings: lengths, prefix and batch size are used.
        ids: N ids that name the documents in the sampling noise; their texts by default.
        samples: draws for each document.
        seed: of the draws.
        progress: what the progress bar says; no bar without it.

    Returns:
        N mean log-ratios.
    """
    import dataclasses

    import torch

    from pipelines.seq2seq.generation import inference, sample_ids, source_batches
    from pipelines.seq2seq.sampling import prompt_keys
    from pipelines.seq2seq.view import as_view, encode, sequence_log_probs

    plain = dataclasses.replace(
        settings, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, num_beams=1, no_repeat_ngram_size=0
    )
    models = [as_view(policy), as_view(reference)]
    keys = prompt_keys(documents if ids is None else ids)
    found = [0.0] * len(documents)
    batches = source_batches(policy, tokenizer, documents, settings, progress=progress)
    with inference(policy), inference(reference):
        for batch, source_ids, source_mask in batches:
            rows, mask = sample_ids(
                policy,
                source_ids,
                source_mask,
                plain,
                keys[batch].repeat_interleave(samples),
                torch.arange(samples).repeat(len(batch)),
                seed=seed,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
            ours, theirs = (
                sequence_log_probs(
                    model, encode(model, source_ids, source_mask), source_mask, rows, mask, order="source-major"
                ).sum(dim=1)
                for model in models
            )
            ratios = (ours - theirs).view(len(batch), samples).mean(dim=1)
            for index, ratio in zip(batch, ratios.tolist(), strict=True):
                found[index] = ratio
    return found


class _Measurer:
    """What all systems are measured with; the reference model is loaded once."""

    def __init__(self, settings: EvaluateConfig, rows: list[dict[str, Any]]):
        from accelerate import PartialState

        from pipelines.seq2seq.annotators import load_annotator

        self.settings, self.rows, self.state = settings, rows, PartialState()
        self.annotate = load_annotator(settings.annotator)
        self.scorer = None
        if settings.reward_model is not None:
            from pipelines.seq2seq.reward_model import RewardScorer

            self.scorer = RewardScorer(
                settings.reward_model, batch_size=settings.generation_batch_size, device=self.state.device
            )
        self._reference: tuple[Any, Any] | None = None

    def _load(self, name: str) -> tuple[Any, Any]:
        from pipelines.seq2seq.models import load_seq2seq, load_tokenizer

        path, field = self.settings.systems[name], f"systems.{name}"
        return load_seq2seq(path, field=field).to(self.state.device), load_tokenizer(path, field=field)

    def reference(self) -> tuple[Any, Any]:
        """The reference system's model and tokenizer."""
        if self._reference is None:
            self._reference = self._load(self.settings.reference_system)
        return self._reference

    def truncated_share(self, name: str) -> float:
        """Share of the documents that are longer than the system reads, as its tokenizer counts."""
        from pipelines.seq2seq.models import load_tokenizer
        from pipelines.seq2seq.training import tokenize_sources

        tokenizer = load_tokenizer(self.settings.systems[name], field=f"systems.{name}")
        documents = [row["document"] for row in self.rows]
        return tokenize_sources(tokenizer, documents, self.settings)["truncated"] / len(documents)

    def measure(self, name: str) -> list[dict[str, Any]]:
        """For each document what the system wrote (``output``), ``gold``, and where they apply ``proxy`` and ``kl``."""
        from pipelines.seq2seq.shards import run_shards

        loaded: list[tuple[Any, Any]] = []

        def work(rows: Sequence[dict[str, Any]], what: str) -> list[dict[str, Any]]:
            # Loaded when a shard is due: a finished system costs nothing when a run goes on.
            if not loaded:
                loaded.append(self.reference() if name == self.settings.reference_system else self._load(name))
            return self._shard(name, *loaded[0], rows, what)

        return run_shards(self.settings.output_dir, name, self.rows, work, size=self.settings.shard_size)

    def _shard(
        self, name: str, model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]], what: str
    ) -> list[dict[str, Any]]:
        from pipelines.seq2seq.generation import generate_summaries

        settings, shown = self.settings, self.state.is_main_process
        documents, ids = [row["document"] for row in rows], [row["id"] for row in rows]
        written = generate_summaries(
            model,
            tokenizer,
            documents,
            settings,
            ids=ids,
            seed=settings.seed,
            progress=f"summaries of {what}" if shown else None,
        )
        outputs = [several[0] for several in written]
        found: dict[str, Sequence[Any]] = {"output": outputs}
        found["gold"] = self.annotate(documents, outputs, [row["references"] for row in rows])
        if self.scorer is not None:
            found["proxy"] = self.scorer(documents, outputs)
        if self._has_kl(name, tokenizer):
            found["kl"] = sequence_kl(
                model,
                self.reference()[0],
                tokenizer,
                documents,
                settings,
                ids=ids,
                samples=settings.kl_samples,
                seed=settings.seed,
                progress=f"KL of {what}" if shown else None,
            )
        return [dict(zip(found, values, strict=True)) for values in zip(*found.values(), strict=True)]

    def _has_kl(self, name: str, tokenizer: Any) -> bool:
        """Two systems with different vocabularies have no KL over token sequences."""
        settings = self.settings
        if not settings.kl_samples or settings.reference_system in (None, name):
            return False
        return tokenizer.get_vocab() == self.reference()[1].get_vocab()


def _rouge_of(metric: Any, outputs: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Any]:
    import numpy as np

    scores = metric.compute(
        predictions=list(outputs),
        references=[list(several) for several in references],
        split_sentences=True,
        use_aggregator=False,
    )
    return {name: np.asarray(values) for name, values in scores.items()}


def evaluate(config: EvaluateConfig) -> dict[str, float]:
    """Measure every system on the same documents.

    Writes ``predictions.jsonl`` (one document a line: id, document, references, name where there is one, outputs, gold
    and proxy by system) and ``settings.json`` (generation settings by system).

    Returns:
        For each system and baseline ``<name>/rouge1``, ``rouge2``, ``rougeL``, ``rougeLsum`` (F1, 0-100, best
        reference), ``length``, ``compression``, ``novel_unigrams``, ``novel_bigrams``, ``repetition``; for each system
        ``gold``, with a reward model ``proxy``; against the reference system ``gold_win_rate`` (a tie counts half),
        ``rouge1_minus_<reference>`` and ``kl`` (nats a sequence, from the reference; none where the vocabularies
        differ); for the reference system ``rouge1_minus_<baseline>``; and ``evaluate/examples``,
        ``evaluate/truncated_documents`` (share cut to ``max_source_length``, by the first system's tokens). Each mean
        with ``_ci_low`` and ``_ci_high``, a paired bootstrap where it is a difference.

    Raises:
        UserError: unusable data, model, reward model or annotator.
    """
    from accelerate import PartialState

    from pipelines.corpus import load_corpus
    from pipelines.corpus.local import sample

    corpus = load_corpus(config)
    chosen = sample(len(corpus[config.split]), config.max_examples, config.split_seed, config.split)
    rows = corpus[config.split].select(chosen).to_list()
    measurer = _Measurer(config, rows)
    order = sorted(config.systems, key=lambda name: name != config.reference_system)
    systems = {name: measurer.measure(name) for name in order}
    outputs: dict[str, list[str]] = {}
    if config.baselines:
        from pipelines.seq2seq.metrics import baseline_summaries

        names = [row["name"] for row in rows] if "name" in rows[0] else None
        train = corpus["train"]["summary"]
        outputs |= baseline_summaries([row["document"] for row in rows], train, names, seed=config.seed)
    outputs |= {name: [one["output"] for one in systems[name]] for name in config.systems}
    metrics = _metrics(config, rows, systems, outputs)
    metrics["evaluate/truncated_documents"] = measurer.truncated_share(order[0])
    if PartialState().is_main_process:
        _write(config, rows, systems, outputs)
    PartialState().wait_for_everyone()
    return metrics


def _metrics(
    settings: EvaluateConfig,
    rows: Sequence[Mapping[str, Any]],
    systems: Mapping[str, Sequence[Mapping[str, Any]]],
    outputs: Mapping[str, Sequence[str]],
) -> dict[str, float]:
    import numpy as np
    from evaluate import load

    from pipelines.seq2seq.metrics import mean_intervals, summary_properties, wins

    metric = load(str(ROUGE_METRIC), keep_in_memory=True)
    documents, references = [row["document"] for row in rows], [row["references"] for row in rows]
    columns: dict[str, dict[str, np.ndarray]] = {}
    for name, written in outputs.items():
        columns[name] = _rouge_of(metric, written, references) | summary_properties(written, documents)
        for key in ("gold", "proxy", "kl"):
            if name in systems and key in systems[name][0]:
                columns[name][key] = np.array([one[key] for one in systems[name]])
    base = settings.reference_system
    for name in outputs if base is not None else ():
        if name in systems and name != base:
            columns[name]["gold_win_rate"] = wins(columns[name]["gold"], columns[base]["gold"])
            columns[name][f"rouge1_minus_{base}"] = columns[name]["rouge1"] - columns[base]["rouge1"]
        elif name not in systems:
            columns[base][f"rouge1_minus_{name}"] = columns[base]["rouge1"] - columns[name]["rouge1"]
    metrics: dict[str, float] = {"evaluate/examples": float(len(rows))}
    for name, values in columns.items():
        metrics |= mean_intervals(name, values, resamples=settings.resamples, seed=settings.seed)
    return metrics


def _write(
    settings: EvaluateConfig,
    rows: Sequence[Mapping[str, Any]],
    systems: Mapping[str, Sequence[Mapping[str, Any]]],
    outputs: Mapping[str, Sequence[str]],
) -> None:
    from pipelines.stage import write_json

    folder = Path(settings.output_dir)
    with (folder / "predictions.jsonl").open("w", encoding="utf-8") as file:
        for index, row in enumerate(rows):
            line: dict[str, Any] = {"id": row["id"], "document": row["document"], "references": row["references"]}
            line |= {"name": row["name"]} if "name" in row else {}
            line["outputs"] = {name: written[index] for name, written in outputs.items()}
            for key in ("gold", "proxy"):
                scored = {name: systems[name][index] for name in settings.systems}
                line[key] = {name: one[key] for name, one in scored.items() if key in one}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    write_json(folder / "settings.json", {name: settings_of(settings) for name in settings.systems})
