"""Preference pairs: several samples of the policy for each document, ranked by a judge; or people's own choices."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from pipelines.config import INERT, Source, StageConfig, config
from pipelines.corpus.fields import CorpusFields
from pipelines.errors import Problem, UserError
from pipelines.publishing.fields import PublishFields
from pipelines.seq2seq.annotators import annotator_problems, annotator_sources
from pipelines.seq2seq.generation import GenerationConfig
from pipelines.seq2seq.models import model_problems
from pipelines.stage import CHECKPOINTS

SPLITS = ("train", "validation", "test")


@config
class PreferencesConfig(CorpusFields, GenerationConfig, PublishFields, StageConfig):
    """Sample summaries from a policy, let an annotator rank them, and keep pairs of a better and a worse one."""

    repo_type: ClassVar[Literal["model", "dataset"]] = "dataset"

    output_dir: str = Field("runs/preferences", description="folder the stage writes into", json_schema_extra=INERT)
    model: Source | None = Field(None, description="the policy: folder or hub id, usually the supervised model")
    preferences_file: Source | None = Field(
        None,
        description="people's preferences: a file of {prompt, chosen, rejected}; then nothing is sampled from model",
    )
    annotator: str = Field(
        "rouge", description="who ranks: rouge (mean of ROUGE-1/2/L to the references) or your own module:function"
    )
    samples: int = Field(4, ge=2, description="summaries sampled for each document")
    pairs: Literal["best_worst", "random", "all"] = Field(
        "best_worst", description="which pairs of a document's samples are kept: its best and worst, a random one, all"
    )
    tie_margin: float = Field(
        0.0, ge=0, description="a pair whose scores differ by no more than this is a tie: dropped"
    )
    do_sample: bool = Field(True, description="sample (false: the best of a beam search, num_beams=samples)")
    shard_size: int = Field(512, ge=1, description="documents between two savings of the samples")

    def problems(self) -> list[Problem]:
        """Whether there is a policy to sample from, a judge, and beams enough."""
        found = super().problems() + model_problems({"model": self.model}) + annotator_problems(self.annotator)
        if self.model is None and self.preferences_file is None:
            mend = "give model=FOLDER to sample from, or preferences_file=FILE"
            found.append(Problem("model", None, "there is no policy to sample from", mend))
        if not self.do_sample and self.num_beams < self.samples:
            mend = f"give do_sample=true, or num_beams={self.samples}"
            found.append(Problem("num_beams", self.num_beams, f"cannot give {self.samples} summaries", mend))
        return found

    def environment(self) -> dict[str, str]:
        """The source of the user's own judge."""
        return super().environment() | annotator_sources([self.annotator])


def pairs_of(
    identifier: str,
    samples: Sequence[str],
    scores: Sequence[float],
    *,
    which: str = "best_worst",
    tie_margin: float = 0.0,
    seed: int = 0,
) -> tuple[list[dict[str, Any]], int]:
    """Preference pairs among one document's samples.

    Equal texts and empty ones are put aside first. ``best_worst`` and ``random`` give one candidate, ``all`` gives
    every two samples; candidates whose scores differ by at most ``tie_margin`` are ties.

    Args:
        identifier: of the document; with ``seed`` it decides the random pair.
        samples: K texts.
        scores: K scores.
        which: ``best_worst``, ``random`` or ``all``.
        tie_margin: see above.
        seed: of the random pair.

    Returns:
        ``{id, chosen, rejected, chosen_score, rejected_score, margin}`` for each pair, and the number of ties. A
        document with fewer than two different samples counts as one tie.
    """
    distinct = {text: score for text, score in zip(samples, scores, strict=True) if text.strip()}
    ranked = sorted(distinct.items(), key=lambda item: (-item[1], item[0]))
    if len(ranked) < 2:
        return [], 1
    if which == "best_worst":
        candidates = [(ranked[0], ranked[-1])]
    elif which == "random":
        first, second = sorted(random.Random(f"{seed} {identifier}").sample(range(len(ranked)), 2))
        candidates = [(ranked[first], ranked[second])]
    else:
        candidates = list(itertools.combinations(ranked, 2))
    kept = [pair for pair in candidates if pair[0][1] - pair[1][1] > tie_margin]
    pairs = [
        {
            "id": identifier if which != "all" else f"{identifier}/{number}",
            "chosen": chosen,
            "rejected": rejected,
            "chosen_score": chosen_score,
            "rejected_score": rejected_score,
            "margin": chosen_score - rejected_score,
        }
        for number, ((chosen, chosen_score), (rejected, rejected_score)) in enumerate(kept)
    ]
    return pairs, len(candidates) - len(kept)


def ranking_of(
    samples: Sequence[str], scores: Sequence[float], *, tie_margin: float = 0.0
) -> tuple[list[str], list[int]]:
    """The samples of one document as a ranked list; equal texts, empty ones and ties are left out.

    Args:
        samples: K texts.
        scores: K scores.
        tie_margin: a sample whose score is no more than this below the last one kept is left out.

    Returns:
        The texts kept, in the order in which they were drawn, and their numbers from best to worst.
    """
    distinct = {text: score for text, score in zip(samples, scores, strict=True) if text.strip()}
    kept: list[str] = []
    for text in sorted(distinct, key=lambda text: (-distinct[text], text)):
        if not kept or distinct[kept[-1]] - distinct[text] > tie_margin:
            kept.append(text)
    completions = [text for text in distinct if text in kept]
    return completions, [completions.index(text) for text in kept]


def preferences(config: PreferencesConfig) -> dict[str, float]:
    """Make preference pairs and save them.

    Writes a ``DatasetDict`` (train, validation, test; columns id, prompt, chosen, rejected, chosen_score,
    rejected_score, margin) and, where a policy was sampled, ``samples.jsonl`` with every sample and its score, and
    under ``rankings`` a ``DatasetDict`` of whole rankings (id, prompt, completions, ranking) for listwise DPO.

    Returns:
        ``preferences/train_pairs``, ``…/validation_pairs``, ``…/test_pairs``, ``preferences/mean_margin`` (training
        pairs); where a policy was sampled also ``preferences/tie_rate`` (share of candidate pairs that were dropped),
        ``preferences/empty_rate`` (share of samples without a word), ``preferences/truncated_documents`` (share of
        documents longer than ``max_source_length``: the rest was not read), and of the test documents with intervals
        ``preferences/gold_mean`` (mean annotator score of a sample) and ``preferences/gold_best_of_n`` (of the best).

    Raises:
        UserError: unusable data, model or annotator; a split without a single pair.
    """
    from accelerate import PartialState

    found, rankings, metrics = _human(config) if config.preferences_file is not None else _sampled(config)
    if PartialState().is_main_process:
        found.save_to_disk(config.output_dir)
        if rankings is not None:
            rankings.save_to_disk(str(Path(config.output_dir) / "rankings"))
    PartialState().wait_for_everyone()
    margins = found["train"]["margin"]
    counts = {f"preferences/{split}_pairs": float(len(found[split])) for split in SPLITS}
    return counts | {"preferences/mean_margin": sum(margins) / len(margins)} | metrics


def _human(settings: PreferencesConfig) -> tuple[Any, None, dict[str, float]]:
    from pipelines.corpus import load_preferences
    from pipelines.corpus.fields import PreferenceFields, SplitFields

    shared = {name: getattr(settings, name) for name in SplitFields.__pydantic_fields__}
    fields = PreferenceFields(preferences=settings.preferences_file, **shared)
    return load_preferences(fields, field="preferences_file"), None, {}


def _sampled(settings: PreferencesConfig) -> tuple[Any, Any, dict[str, float]]:
    from accelerate import PartialState

    from pipelines.corpus import load_corpus
    from pipelines.corpus.local import as_datasets
    from pipelines.seq2seq.annotators import load_annotator
    from pipelines.seq2seq.generation import generate_summaries
    from pipelines.seq2seq.metrics import with_interval
    from pipelines.seq2seq.models import load_seq2seq, load_tokenizer
    from pipelines.seq2seq.training import tokenize_sources

    state = PartialState()
    annotate = load_annotator(settings.annotator)
    tokenizer = load_tokenizer(settings.model, field="model")
    model = load_seq2seq(settings.model).to(state.device)
    corpus = load_corpus(settings)

    def sample_and_score(rows: Sequence[dict[str, Any]], what: str) -> list[list[Any]]:
        documents = [row["document"] for row in rows]
        samples = generate_summaries(
            model,
            tokenizer,
            documents,
            settings,
            ids=[row["id"] for row in rows],
            num_return_sequences=settings.samples,
            seed=settings.seed,
            progress=f"sampling {what}" if state.is_main_process else None,
        )
        count = settings.samples
        scores = annotate(
            [text for text in documents for _ in range(count)],
            [text for several in samples for text in several],
            [row["references"] for row in rows for _ in range(count)],
        )
        return [[texts, scores[i * count : (i + 1) * count]] for i, texts in enumerate(samples)]

    pairs: dict[str, list[dict[str, Any]]] = {}
    rankings: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    candidates = ties = empty = total = 0
    lines = []
    for split in SPLITS:
        rows = corpus[split].to_list()
        made = _shards(settings, split, rows, sample_and_score)
        pairs[split] = []
        for row, (texts, scores) in zip(rows, made, strict=True):
            kept, dropped = pairs_of(
                row["id"], texts, scores, which=settings.pairs, tie_margin=settings.tie_margin, seed=settings.seed
            )
            pairs[split].extend({"id": pair["id"], "prompt": row["document"], **pair} for pair in kept)
            completions, ranking = ranking_of(texts, scores, tie_margin=settings.tie_margin)
            if len(ranking) > 1:
                listed = {"prompt": row["document"], "completions": completions, "ranking": ranking}
                rankings[split].append({"id": row["id"], **listed})
            ties, candidates = ties + dropped, candidates + dropped + len(kept)
            empty, total = empty + sum(not text for text in texts), total + len(texts)
            lines.append({"id": row["id"], "split": split, "samples": texts, "scores": scores})
        if not pairs[split]:
            problem = f"of {len(rows)} {split} documents none has two samples of different score"
            mend = "raise samples or temperature, or lower tie_margin"
            # Of no use: these samples would tie again.
            state.wait_for_everyone()
            shutil.rmtree(Path(settings.output_dir) / CHECKPOINTS, ignore_errors=True)
            raise UserError("samples", settings.samples, problem, mend)
    if state.is_main_process:
        with (Path(settings.output_dir) / "samples.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    documents = [document for split in SPLITS for document in corpus[split]["document"]]
    cut = tokenize_sources(tokenizer, documents, settings)["truncated"]
    of_test = [line["scores"] for line in lines if line["split"] == "test"]
    metrics = {"preferences/tie_rate": ties / candidates, "preferences/empty_rate": empty / total}
    metrics["preferences/truncated_documents"] = cut / len(documents)
    metrics |= with_interval("preferences/gold_mean", [sum(s) / len(s) for s in of_test], seed=settings.seed)
    metrics |= with_interval("preferences/gold_best_of_n", [max(s) for s in of_test], seed=settings.seed)
    return as_datasets(pairs), as_datasets(rankings), metrics


def _shards(settings: PreferencesConfig, split: str, rows: list, work: Any) -> list:
    from pipelines.seq2seq.shards import run_shards

    return run_shards(settings.output_dir, split, rows, work, size=settings.shard_size)
