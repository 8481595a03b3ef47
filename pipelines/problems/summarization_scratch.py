"""A summarizer trained from scratch against a fine-tuned one, and the fine-tuned one beside a prompted model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from pipelines.config import INERT, Source, config, nearest
from pipelines.errors import Problem, UserError
from pipelines.problems.exercise import Answer, ExerciseConfig, Figure
from pipelines.problems.stages import finished_stage, stage_problems
from pipelines.stage import read_stage

if TYPE_CHECKING:
    import numpy as np

_EVALUATE, _HARD = "summarization/evaluate", "prompting/hard"
_ROUGE = ("rouge1", "rouge2", "rougeL")
_CELL = 160  # letters of a text that a table shows


@config
class SummarizationScratchConfig(ExerciseConfig):
    """Which finished stages are quoted."""

    output_dir: str = Field(
        "runs/summarization_scratch", description="folder the stage writes into", json_schema_extra=INERT
    )
    evaluation: Source = Field(description="folder of a finished stage of summarization/evaluate of both models")
    scratch: str = Field("scratch", description="what that evaluation calls the model trained from scratch")
    finetuned: str = Field("finetuned", description="what it calls the fine-tuned one")
    prompting: Source | None = Field(
        None, description="folder of a finished stage of prompting/hard on the same documents; null: no prompted model"
    )
    prompted: str | None = Field(
        None, description="which of its answers, MODEL/STRATEGY; null: those of the highest ROUGE-1"
    )
    shown: int = Field(5, ge=1, le=50, description="documents whose summaries are shown side by side")

    def problems(self) -> list[Problem]:
        found = super().problems()
        found += stage_problems({"evaluation": (self.evaluation, _EVALUATE), "prompting": (self.prompting, _HARD)})
        if self.scratch == self.finetuned:
            found.append(Problem("finetuned", self.finetuned, "is the model from scratch too", "name two systems"))
        if self.prompted is not None and self.prompting is None:
            found.append(Problem("prompted", self.prompted, "there is no prompting stage", "give prompting=FOLDER"))
        return found


@dataclass(frozen=True)
class Written:
    """What systems wrote about the same documents.

    Attributes:
        ids: N ids of the documents.
        documents: N texts.
        references: N lists of summaries, the best of which counts.
        outputs: system -> N summaries.
    """

    ids: list[str]
    documents: list[str]
    references: list[list[str]]
    outputs: dict[str, list[str]]

    def scores(self, system: str) -> dict[str, np.ndarray]:
        """ROUGE (0–100) and the properties of each summary, (N,) each."""
        import numpy as np

        from pipelines.seq2seq.metrics import rouge, summary_properties

        texts = self.outputs[system]
        first = [same_first_word(text, several) for text, several in zip(texts, self.references, strict=True)]
        found = rouge(texts, self.references, _ROUGE) | summary_properties(texts, self.documents)
        return found | {"first": np.array(first)}

    def only(self, ids: Sequence[str]) -> Written:
        """The same of some of the documents, in the order of ``ids``."""
        places = {identifier: place for place, identifier in enumerate(self.ids)}
        chosen = [places[identifier] for identifier in ids]

        def pick(values: list) -> list:
            return [values[place] for place in chosen]

        outputs = {name: pick(texts) for name, texts in self.outputs.items()}
        return Written(list(ids), pick(self.documents), pick(self.references), outputs)


def same_first_word(summary: str, references: Sequence[str]) -> float:
    """1 where the summary begins with the same word as one of the references, else 0: a measure of learnt style."""
    words = [text.split()[0].lower().strip(".,:;") for text in (summary, *references) if text.split()]
    return float(bool(summary.split()) and words[0] in words[1:])


def summarization_scratch(config: SummarizationScratchConfig) -> dict[str, float]:
    """Quote, check and draw; see ``docs/problems/summarization_scratch.md``.

    Returns:
        ``summarization_scratch/rouge1_gain``, mean difference of the two models in ROUGE-1 on the same documents, with
        its interval; ``summarization_scratch/win_rate``, share of documents on which the fine-tuned one scores higher;
        ``summarization_scratch/checks``, ``summarization_scratch/checks_failed``.

    Raises:
        UserError: a stage that is missing, unfinished or another's; a system it does not have; no documents in common.
    """
    answer = Answer(config, "summarization_scratch", "Summarization: from scratch, fine-tuned, prompted")
    record = finished_stage(config.evaluation, "evaluation", _EVALUATE)
    written = _predictions(config)
    names = [config.scratch, config.finetuned]
    _systems(config, record, answer)
    gained = _compared(config, record["metrics"], written, answer)
    prompted = _prompted(config, written)
    if prompted is not None:
        name, written = prompted
        names.append(name)
    _differences(written, names, answer)
    _examples(config, written, names, answer)
    return answer.write() | gained


def _predictions(config: SummarizationScratchConfig) -> Written:
    """What the evaluated systems wrote, from its ``predictions.jsonl``."""
    path = Path(config.evaluation).expanduser() / "predictions.jsonl"
    rows = _lines(path, "evaluation")
    for field in ("scratch", "finetuned"):
        name = getattr(config, field)
        if name not in rows[0]["outputs"]:
            mend = nearest(name, list(rows[0]["outputs"]))
            raise UserError(field, name, "the evaluation measured no system of this name", mend)
    kept = config.scratch, config.finetuned
    return Written(
        [row["id"] for row in rows],
        [row["document"] for row in rows],
        [row["references"] for row in rows],
        {name: [row["outputs"][name] for row in rows] for name in kept},
    )


def _lines(path: Path, field: str) -> list[dict[str, Any]]:
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        rows = []
    if not rows:
        raise UserError(field, path, "missing, empty or damaged", "run its stage again")
    return rows


def _systems(config: SummarizationScratchConfig, record: Mapping[str, Any], answer: Answer) -> None:
    """How each model was made, and its ROUGE with intervals."""
    from pipelines.reporting.metrics import format_mean

    metrics, rows = record["metrics"], []
    for system in (config.scratch, config.finetuned, "lead1", "name"):
        if f"{system}/rouge1" not in metrics:
            continue
        made = read_stage(Path(record["config"]["systems"].get(system, "/nowhere")).expanduser()) or {}
        counts = made.get("metrics", {})
        start = made.get("config", {}).get("model")
        about = "–" if not made else "random weights" if start is None else Path(start).name
        sizes = [
            f"{int(counts[key]):,}" if key in counts else "–"
            for key in ("sft/parameters", "sft/train_examples", "sft/steps")
        ]
        rows.append([system, about, *sizes, *(format_mean(metrics, f"{system}/{name}") for name in _ROUGE)])
    columns = ["system", "began as", "weights", "training documents", "steps", "ROUGE-1", "ROUGE-2", "ROUGE-L"]
    count = int(metrics["evaluate/examples"])
    answer.table("systems", columns, rows, f"{count:,} held-out documents; in brackets 95 % bootstrap intervals.")
    answer.value(examples=count)


def _compared(
    config: SummarizationScratchConfig, metrics: Mapping[str, float], written: Written, answer: Answer
) -> dict[str, float]:
    """The difference on the same documents; both means by the ``rouge-score`` package itself."""
    import numpy as np
    from rouge_score.rouge_scorer import RougeScorer

    from pipelines.seq2seq.metrics import bootstrap_interval, wins, with_interval

    scorer, columns = RougeScorer(["rouge1"], use_stemmer=True), {}
    for field in ("scratch", "finetuned"):
        name = getattr(config, field)
        pairs = zip(written.references, written.outputs[name], strict=True)
        values = np.array([100 * scorer.score_multi(several, text)["rouge1"].fmeasure for several, text in pairs])
        key, columns[field] = f"{name}/rouge1", values
        low, high = metrics[f"{key}_ci_low"], metrics[f"{key}_ci_high"]
        route = "rouge-score on the saved predictions; expected: the evaluation's metric"
        answer.check(f"ROUGE-1 of {name}", values.mean(), metrics[key], 1e-6, route)
        _half_width(answer, f"{name}: half the interval", values, (high - low) / 2)
        answer.value(**{f"{field}_rouge1": metrics[key], f"{field}_low": low, f"{field}_high": high})
    difference = columns["finetuned"] - columns["scratch"]
    mean, low, high = bootstrap_interval(difference, seed=config.seed)
    _half_width(answer, "difference on the same documents: half the interval", difference, (high - low) / 2)
    rate = wins(columns["finetuned"], columns["scratch"])
    answer.value(gain=mean, gain_low=low, gain_high=high, win_rate=100 * rate.mean())
    _difference_figure(config, columns, answer)
    prefix = "summarization_scratch"
    found = with_interval(f"{prefix}/rouge1_gain", difference, seed=config.seed)
    return found | with_interval(f"{prefix}/win_rate", rate, seed=config.seed)


def _half_width(answer: Answer, name: str, values: np.ndarray, expected: float) -> None:
    """1.96 standard errors of the mean against the bootstrap's interval."""
    found = 1.959964 * values.std(ddof=1) / math.sqrt(len(values))
    route = "1.96 standard errors; expected: bootstrap, within 15 %"
    answer.check(name, found, expected, max(0.15 * expected, 1e-9), route)


def _difference_figure(config: SummarizationScratchConfig, columns: Mapping[str, np.ndarray], answer: Answer) -> None:
    import numpy as np

    from pipelines.reporting.plots import Panel, Series, lines

    shares = np.linspace(0, 100, 101)
    curves = [
        Series(getattr(config, field), np.percentile(values, shares), shares, colour=number)
        for number, (field, values) in enumerate(reversed(columns.items()))
    ]
    alt = "Share of documents with a ROUGE-1 up to each value: the curve further to the right is the better system."
    svg = lines("summarization_scratch-rouge", [Panel(curves, "% of documents", zero=True)], "ROUGE-1 up to", alt)
    caption = "Share of held-out documents up to each ROUGE-1; the better system's curve lies further to the right."
    answer.figure(Figure("rouge", svg, caption=caption, title="Not only the mean"))


def _prompted(config: SummarizationScratchConfig, written: Written) -> tuple[str, Written] | None:
    """The prompted model's name and all systems on the documents it was asked about; None without a prompting stage."""
    if config.prompting is None:
        return None
    from pipelines.seq2seq.metrics import rouge

    finished_stage(config.prompting, "prompting", _HARD)
    answers: dict[str, dict[str, str]] = {}
    for row in _lines(Path(config.prompting).expanduser() / "answers.jsonl", "prompting"):
        answers.setdefault(f"{row['model']}/{row['strategy']}", {})[row["id"]] = row["answer"] or ""
    if config.prompted is not None and config.prompted not in answers:
        raise UserError("prompted", config.prompted, "was not asked", nearest(config.prompted, list(answers)))
    asked = set.intersection(*(set(mine) for mine in answers.values()))
    shared = [identifier for identifier in written.ids if identifier in asked]
    if not shared:
        problem = "was asked about none of the evaluation's documents"
        raise UserError("prompting", config.prompting, problem, "give both the same dataset, split and split_seed")
    some = written.only(shared)
    texts = {name: [mine[identifier] for identifier in shared] for name, mine in answers.items()}
    means = {name: rouge(mine, some.references, ("rouge1",))["rouge1"].mean() for name, mine in texts.items()}
    best = config.prompted or max(means, key=lambda name: means[name])
    return best, Written(some.ids, some.documents, some.references, some.outputs | {best: texts[best]})


def _differences(written: Written, names: Sequence[str], answer: Answer) -> None:
    """In what the summaries differ: score, length, what they take from the document, style."""
    from pipelines.seq2seq.metrics import bootstrap_interval

    rows = []
    for name in names:
        scores = written.scores(name)
        mean, low, high = bootstrap_interval(scores["rouge1"])
        shares = (100 * scores[key].mean() for key in ("novel_unigrams", "novel_bigrams", "repetition", "first"))
        rows.append(
            [
                name,
                f"{mean:.1f} ({low:.1f}–{high:.1f})",
                f"{scores['length'].mean():.1f}",
                *(f"{s:.1f}" for s in shares),
            ]
        )
    people = Written(written.ids, written.documents, written.references, {"": [r[0] for r in written.references]})
    own = people.scores("")
    shares = (100 * own[key].mean() for key in ("novel_unigrams", "novel_bigrams", "repetition"))
    rows.append(["the reference", "–", f"{own['length'].mean():.1f}", *(f"{s:.1f}" for s in shares), "–"])
    columns = [
        "system",
        "ROUGE-1",
        "words",
        "new words, %",
        "new pairs of words, %",
        "repeated pairs, %",
        "reference's first word, %",
    ]
    caption = f"On the same {len(written.ids):,} documents. New: not in the document."
    answer.table("differences", columns, rows, caption)


def _examples(config: SummarizationScratchConfig, written: Written, names: Sequence[str], answer: Answer) -> None:
    """Some documents with what each wrote, evenly spread over the ROUGE-1 of the fine-tuned model."""
    import numpy as np

    order = np.argsort(written.scores(config.finetuned)["rouge1"], kind="stable")
    count = min(config.shown, len(order))
    places = [int(order[round(i)]) for i in np.linspace(0, len(order) - 1, count)]
    rows = []
    for place in places:
        rows.append([_short(written.documents[place]), "the reference", _short(written.references[place][0])])
        rows += [["", name, _short(written.outputs[name][place])] for name in names]
    caption = f"From the fine-tuned model's worst ROUGE-1 to its best, {count} documents."
    answer.table("examples", ["document", "who", "summary"], rows, caption)


def _short(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= _CELL else flat[: _CELL - 1] + "…"
