"""From the answers of hard prompts to metrics: shares and intervals, groups, baselines, paired differences."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.config import as_plain
from pipelines.prompting.scoring import (
    Verdict,
    judge_generation,
    judge_scores,
    measure_verdicts,
    paired_difference,
    share,
)
from pipelines.prompting.tasks import Example, Task
from pipelines.reporting.metrics import write_text
from pipelines.seq2seq.metrics import lead1, mean_intervals, rouge

if TYPE_CHECKING:
    from pipelines.prompting.hard import HardConfig, Trial
    from pipelines.prompting.hard_asking import Answers
    from pipelines.prompting.strategies import Prompt

ROUGE = ("rouge1", "rouge2", "rougeL")
_SHOWN_FAILURES = 5

Key = tuple[str, str]
"""(model, trial)"""


def judge_all(
    config: HardConfig, trials: Sequence[Trial], examples: Sequence[Example], answers: Mapping[Key, Sequence[Answers]]
) -> dict[Key, list[Verdict]]:
    """A verdict on every answer."""
    by_name = {trial.name: trial for trial in trials}
    found = {}
    for (model, name), mine in answers.items():
        trial = by_name[name]
        if trial.scoring == "generate":
            verdicts = [judge_generation(a, e, config.task) for (a,), e in zip(mine, examples, strict=True)]
        else:
            verdicts = [
                judge_scores(scores, example, prompt.choices, config.normalization)
                for scores, example, prompt in zip(mine, examples, trial.prompts, strict=True)
            ]
        found[model, name] = verdicts
    return found


def measure(
    config: HardConfig,
    task: Task,
    trials: Sequence[Trial],
    examples: Sequence[Example],
    judged: Mapping[Key, Sequence[Verdict]],
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """All metrics, and what the report shows of each trial.

    Returns:
        Of every model and strategy ``hard/MODEL/STRATEGY/…`` as ``scoring.measure_verdicts`` has it (of summaries
        ``rouge1``, ``rouge2``, ``rougeL`` and ``valid_rate`` instead of the accuracy); ``accuracy_GROUP`` where
        examples have groups; ``METRIC_minus_STRATEGY`` of wrong labels against the same strategy with right ones, and
        ``METRIC_minus_MODEL`` against the first model, both paired on the same examples; the baselines
        ``hard/chance/accuracy``, ``hard/spelling_rules/accuracy`` or ``hard/lead1/rouge1``; ``hard/examples``.
    """
    metrics: dict[str, float] = {"hard/examples": float(len(examples))} | _baselines(config, task, examples)
    values: dict[Key, dict[str, float]] = {}
    shown = []
    interval = {"resamples": config.resamples, "seed": config.seed}
    for (model, name), verdicts in judged.items():
        prefix = f"hard/{model}/{name}"
        mine, curve = measure_verdicts(prefix, verdicts, bins=config.calibration_bins, **interval)
        if task.kind == "summarization":
            # A summary is not right or wrong: what was measured of that says nothing.
            kept = ("failed", "answered", "valid_rate")
            mine = {k: v for k, v in mine.items() if k.removeprefix(f"{prefix}/").startswith(kept)}
            curve = []
            scores, values[model, name] = _rouge(prefix, verdicts, examples, interval)
            mine |= scores
        else:
            pairs = list(zip(examples, verdicts, strict=True))
            values[model, name] = {e.id: float(v.right) for e, v in pairs if v.kind != "failed"}
            for group in sorted({e.group for e in examples} - {""}):
                inside = [v.right for e, v in pairs if e.group == group and v.kind != "failed"]
                if inside:
                    mine |= share(f"{prefix}/accuracy_{group}", inside)
        metrics |= mine
        shown.append({"model": model, "strategy": name, "curve": curve})
    metrics |= _differences(config, task.metric, trials, values, interval)
    return metrics, shown


def _rouge(
    prefix: str, verdicts: Sequence[Verdict], examples: Sequence[Example], interval: Mapping[str, int]
) -> tuple[dict[str, float], dict[str, float]]:
    """ROUGE of summaries with intervals, and example -> ROUGE-1. An answer that says nothing scores 0."""
    kept = [(e, v.answer or "") for e, v in zip(examples, verdicts, strict=True) if v.kind != "failed"]
    if not kept:
        return {}, {}
    columns = rouge([text for _, text in kept], [list(e.references) for e, _ in kept], ROUGE)
    one = {e.id: float(score) for (e, _), score in zip(kept, columns["rouge1"], strict=True)}
    return mean_intervals(prefix, columns, **interval), one


def _baselines(config: HardConfig, task: Task, examples: Sequence[Example]) -> dict[str, float]:
    """What needs no model."""
    if task.kind == "multiple_choice":
        return {"hard/chance/accuracy": float(np.mean([1 / len(e.choices) for e in examples]))}
    if task.kind == "words":
        from pipelines.prompting.tasks_words import regular_plural

        return share("hard/spelling_rules/accuracy", [regular_plural(e.input) == e.answer for e in examples])
    columns = rouge([lead1(e.input) for e in examples], [list(e.references) for e in examples], ROUGE)
    return mean_intervals("hard/lead1", columns, resamples=config.resamples, seed=config.seed)


def twin_of(trial: Trial, trials: Sequence[Trial]) -> Trial | None:
    """The trial that differs from one with wrong labels in having right ones."""
    if not trial.strategy.wrong_labels:
        return None
    wanted = as_plain(trial.strategy) | {"wrong_labels": False}
    same = (t for t in trials if t.scoring == trial.scoring and as_plain(t.strategy) == wanted)
    return next(same, None)


def _differences(
    config: HardConfig,
    metric: str,
    trials: Sequence[Trial],
    values: Mapping[Key, Mapping[str, float]],
    interval: Mapping[str, int],
) -> dict[str, float]:
    """The effect of wrong labels, and of the model, on the same examples."""
    metrics: dict[str, float] = {}
    first = config.names[0]
    for model in config.names:
        for trial in trials:
            mine, key = values[model, trial.name], f"hard/{model}/{trial.name}/{metric}_minus_"
            twin = twin_of(trial, trials)
            if twin is not None:
                metrics |= paired_difference(f"{key}{twin.name}", mine, values[model, twin.name], **interval)
            if model != first:
                metrics |= paired_difference(f"{key}{first}", mine, values[first, trial.name], **interval)
    return metrics


def write_answers(
    folder: Path,
    trials: Sequence[Trial],
    examples: Sequence[Example],
    answers: Mapping[Key, Sequence[Answers]],
    judged: Mapping[Key, Sequence[Verdict]],
    shown: Sequence[dict[str, Any]],
) -> None:
    """``answers.jsonl`` and ``trials.json``, each whole or not at all."""
    from pipelines.stage import write_json

    by_name = {trial.name: trial for trial in trials}
    lines, table = [], []
    for entry in shown:
        model, name = entry["model"], entry["strategy"]
        trial, failures = by_name[name], []
        rows = zip(examples, trial.prompts, answers[model, name], judged[model, name], strict=True)
        for example, prompt, answer, verdict in rows:
            lines.append(json.dumps(_line(model, trial, example, prompt, answer, verdict), ensure_ascii=False))
            if verdict.kind not in ("right", "failed") and len(failures) < _SHOWN_FAILURES:
                failures.append(
                    {
                        "input": example.input,
                        "kind": verdict.kind,
                        "answer": answer[0].text if trial.scoring == "generate" else verdict.answer,
                        "right": prompt.answer.strip(),
                    }
                )
        twin = twin_of(trial, trials)
        about = {
            "scoring": trial.scoring,
            "shots": trial.strategy.shots,
            "wrong_labels": trial.strategy.wrong_labels,
            "twin": None if twin is None else twin.name,
            "prompt": trial.prompts[0].text,
            "answer": prompt_answer(trial, answers[model, name][0]),
            "failures": failures,
        }
        table.append(entry | about)
    write_text(folder / "answers.jsonl", "".join(f"{line}\n" for line in lines))
    write_json(folder / "trials.json", table)


def prompt_answer(trial: Trial, answers: Answers) -> str:
    """What followed the prompt that the report shows: the generated text, or the choices with their scores."""
    if trial.scoring == "generate":
        return answers[0].text
    pairs = zip(trial.prompts[0].choices, answers, strict=True)
    return "\n".join(f"{choice.strip()}: {score.log_prob:.2f} nats" for choice, score in pairs)


def _line(
    model: str, trial: Trial, example: Example, prompt: Prompt, answers: Answers, verdict: Verdict
) -> dict[str, Any]:
    line: dict[str, Any] = {
        "model": model,
        "strategy": trial.name,
        "shots": list(prompt.shots),
        "id": example.id,
        "input": example.input,
        "right": prompt.answer.strip(),
        "answer": verdict.answer,
        "kind": verdict.kind,
        "confidence": verdict.confidence,
    }
    if example.group:
        line["group"] = example.group
    failure = next((one.failure for one in answers if one.failure is not None), None)
    if failure is not None:
        return line | {"failure": failure}
    if trial.scoring == "generate":
        return line | {"text": answers[0].text}
    return line | {"log_probs": {c.strip(): s.log_prob for c, s in zip(prompt.choices, answers, strict=True)}}
