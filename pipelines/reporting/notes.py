"""What a reader must know before believing the numbers: what is unfinished, what was cut, what is undecided."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from pipelines.reporting.metrics import MINUS, estimate, format_mean
from pipelines.reporting.run import Run, Stage, is_number
from pipelines.reporting.sections.data import flat
from pipelines.reporting.sections.ppo import KINDS as PPO_KINDS
from pipelines.reporting.sections.ppo import over_optimisation
from pipelines.reporting.sections.problems import failed_checks
from pipelines.reporting.tables import BASELINES, system_label, systems_in

LARGE_KL = 10.0
"""Nats a sequence, above which a policy has little left of the model it started from."""


def notes(run: Run) -> list[str]:
    """Plain sentences, the gravest first; empty when there is nothing to warn of."""
    return list(
        dict.fromkeys(
            [*_unfinished(run), *_exercises(run), *_intervals(run), *_policies(run), *_data(run), *_versions(run)]
        )
    )


def _unfinished(run: Run) -> Iterator[str]:
    open_stages = [f"{s.name} ({s.state})" for s in run.stages if not s.finished]
    if open_stages:
        yield f"The run is not complete: {', '.join(open_stages)}. Give the same command again to go on."


def _exercises(run: Run) -> Iterator[str]:
    for stage in run.stages:
        failed, count = failed_checks(stage)
        if failed:
            yield f"{stage.name}: {failed} of its {count} checked statements do not hold."


def _intervals(run: Run) -> Iterator[str]:
    base = system_label(run.reference)
    for system in systems_in(run.metrics, run.order):
        key = f"{system}/gold_win_rate"
        found = estimate(run.metrics, key)
        if found is None or found.low is None or found.high is None:
            continue
        if found.low <= 0.5 <= found.high:
            yield f"{system_label(system)} against {base} is undecided: win rate {format_mean(run.metrics, key)}."
        elif found.high < 0.5:
            yield f"{system_label(system)} loses against {base} under the gold judge: {format_mean(run.metrics, key)}."
    for baseline in BASELINES:
        key = f"{run.reference}/rouge1{MINUS}{baseline}"
        found = estimate(run.metrics, key)
        if found is not None and found.low is not None and found.low <= 0:
            against = f"{system_label(baseline)}: difference in ROUGE-1 {format_mean(run.metrics, key)}"
            yield f"{base} is not shown to be better than the baseline {against}."
    found = estimate(run.metrics, "reward/accuracy")
    if found is not None and found.low is not None and found.low <= 0.5:
        yield f"The reward model may be guessing: accuracy {format_mean(run.metrics, 'reward/accuracy')}."


def _policies(run: Run) -> Iterator[str]:
    for system in systems_in(run.metrics, run.order):
        found = estimate(run.metrics, f"{system}/kl")
        if found is not None and found.value > LARGE_KL:
            far = f"{found.value:.1f} nats a sequence"
            base = system_label(run.reference)
            yield f"{system_label(system)} is {far} away from {base}, more than {LARGE_KL:.0f}."
    for stage in run.of_kind(*PPO_KINDS):
        verdict = over_optimisation(stage)
        if verdict.endswith("over-optimised."):
            yield f"{stage.name}: {verdict[0].lower()}{verdict[1:]}"


def _data(run: Run) -> Iterator[str]:
    for stage in run.stages:
        for warning in stage.record.get("warnings") or []:
            yield f"{stage.name}: {warning}"
        cut = [_cut(name, value) for name, value in _counts(stage).items() if "truncated" in name and is_number(value)]
        if any(cut):
            yield f"{stage.name}: {', '.join(filter(None, cut))}. What lay beyond the length limit was not read."


def _cut(name: str, value: float) -> str:
    """``7.3 % of sources cut``; empty when nothing was."""
    if value <= 0:
        return ""
    what = re.sub(r"_?truncated_?", "", re.split(r"[/ ]", name)[-1]).replace("_", " ") or "texts"
    if isinstance(value, float) and value <= 1:
        return f"{100 * value:.1f} % of {what} cut" if value >= 0.001 else f"under 0.1 % of {what} cut"
    return f"{value:,.0f} {what} cut"


def _counts(stage: Stage) -> Mapping[str, object]:
    stats = stage.json("stats.json")
    return {**(flat(stats) if isinstance(stats, Mapping) else {}), **stage.metrics}


def _versions(run: Run) -> Iterator[str]:
    seen: dict[str, set[str]] = {}
    for stage in run.stages:
        for package, version in stage.versions.items():
            seen.setdefault(package, set()).add(str(version))
    mixed = [f"{package} ({', '.join(sorted(found))})" for package, found in sorted(seen.items()) if len(found) > 1]
    if mixed:
        yield f"Stages were made with different versions of {', '.join(mixed)}."
