"""Whether runs differ in the seed alone, so that what they measured may be averaged over them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from pipelines.errors import UserError
from pipelines.reporting.metrics import is_interval_key
from pipelines.reporting.run import Run, Stage

COUNTS = ("parameters", "steps", "train_examples", "test_examples")
"""Measures of a trained image model, and of what measured it, that do not depend on the seed."""

# Where a stage is written, tracked and pushed to says nothing about its result.
_DECIDES_NOTHING = (
    "output_dir",
    "report_to",
    "push_to_hub",
    "repo_id",
    "private",
    "branch",
    "commit_message",
    "licence",
)
_SAME = 1e-6  # relative; the same classifier on the same machine gives the same bits


def configurations(run: Run) -> dict[str, dict[str, Any]]:
    """The fields that decide what each stage of a run finds, in the form in which runs are compared and kept.

    Left out are what is null, what decides nothing, and the seed, except that of the classifier in whose features the
    others are measured: with another one no two figures compare. An input is named by its content (its digest), and by
    ``${STAGE}`` where a stage of the run made it: the same data at another place is the same data.

    Args:
        run: the run; its unfinished stages too.

    Returns:
        Stage -> its recipe and fields, the stages in order.
    """
    found = {stage.name: {"recipe": stage.record.get("recipe"), **_decided(stage, run)} for stage in run.stages}
    if (name := judge(found)) in found:
        found[name]["seed"] = next(stage for stage in run.stages if stage.name == name).config.get("seed")
    return found


def _decided(stage: Stage, run: Run) -> dict[str, Any]:
    made = {other.record["fingerprint"]: f"${{{other.name}}}" for other in run.stages if "fingerprint" in other.record}
    inputs = {name: made.get(value, value) for name, value in (stage.record.get("inputs") or {}).items()}
    own = str(stage.config.get("output_dir", stage.folder)).rpartition("/")[0]
    return {
        name: _named(value, name, inputs, own)
        for name, value in stage.config.items()
        if value is not None and name != "seed" and name not in _DECIDES_NOTHING
    }


def _named(value: Any, name: str, inputs: Mapping[str, str], own: str) -> Any:
    """A field's value with every input in it named by what it is instead of where it lies."""
    if isinstance(value, Mapping):
        return {key: _named(item, f"{name}.{key}", inputs, own) for key, item in value.items()}
    if isinstance(value, list):
        return [_named(item, f"{name}.{place}", inputs, own) for place, item in enumerate(value)]
    if name in inputs:
        return inputs[name]
    inside = isinstance(value, str) and own and value.startswith(f"{own}/")
    return f"${{{value.removeprefix(f'{own}/')}}}" if inside else value


def judge(stages: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The stage that trained the classifier which the image models are measured by; None where none of the run's did.

    Args:
        stages: as ``configurations`` gives them.
    """
    for fields in stages.values():
        if str(fields.get("recipe")).endswith("/measure"):
            match = re.fullmatch(r"\$\{(.+)\}", str(fields.get("classifier")))
            return match and match[1]
    return None


def check_stages(
    stages: Mapping[str, Mapping[str, Any]], other: Mapping[str, Mapping[str, Any]], where: str, than: str
) -> None:
    """Refuse a run whose stages have other fields than those of the first one.

    Args:
        stages: those of the first run, as ``configurations`` gives them.
        other: those of the run that is looked at.
        where: the folder of that run.
        than: what the first run is called.

    Raises:
        UserError: naming the field.
    """
    mend = f"give runs that differ from {than} in the seed alone"
    if list(stages) != list(other):
        raise UserError("--run", where, f"has the stages {', '.join(other)}, not {', '.join(stages)}", mend)
    for name, fields in stages.items():
        for field in sorted({*fields, *other[name]}):
            if fields.get(field) != other[name].get(field):
                both = (json.dumps(given.get(field), ensure_ascii=False) for given in (other[name], fields))
                if (name, field) == (judge(stages), "seed"):
                    mend = f"give {name}.seed={fields[field]}: what two classifiers measure does not compare"
                raise UserError("--run", where, f"{name}.{field} is {' in it, not '.join(both)}", mend)


def check_measured(
    metrics: Mapping[str, float], other: Mapping[str, float], classifier: str | None, where: str, than: str
) -> None:
    """Refuse a run of image models that counted something else, or was measured by another classifier, than the first.

    This is looked at beside the fields: networks change with the code, and a classifier trained with the same seed on
    another machine is another one. Its own measures tell, for its seed alone decides what they are taken on.

    Args:
        metrics: those of the first run.
        other: those of the run that is looked at.
        classifier: the stage that trained the classifier; None where there is none.
        where, than: see ``check_stages``.

    Raises:
        UserError: naming the measure.
    """
    for key in sorted({*metrics, *other}):
        stage, _, measure = key.rpartition("/")
        timed = "runtime" in measure or "@" in measure
        of_classifier = stage == classifier and not is_interval_key(key) and not timed
        if not of_classifier and measure not in COUNTS and key != "measure/samples":
            continue
        one, two = metrics.get(key), other.get(key)
        if one is None or two is None or not math.isclose(one, two, rel_tol=_SAME):
            mend = f"give runs that differ from {than} in the seed alone"
            if of_classifier and measure not in COUNTS:
                mend = "measure all of them by one classifier: measure.classifier=FOLDER"
            raise UserError("--run", where, f"{key} is {two} in it, not {one}", mend)
