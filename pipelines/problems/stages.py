"""What exercises read of stages that ran before them: whether they are what they should be, and how they were made."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pipelines.errors import Problem, UserError, problems_of
from pipelines.stage import read_stage


def finished_stage(folder: str, field: str, recipe: str) -> dict[str, Any]:
    """The ``stage.json`` of a finished stage.

    Args:
        folder: of the stage.
        field: configuration field that named it, for messages.
        recipe: what must have made it, ``family/stage``.

    Raises:
        UserError: there is none, it is not finished, or another recipe's.
    """
    mend = f"give the folder of a finished stage of {recipe}"
    record = read_stage(Path(folder).expanduser())
    if record is None:
        raise UserError(field, folder, "no stage's folder (it has no stage.json)", mend)
    if record["stage"].rpartition(".")[2] != recipe.rpartition("/")[2]:
        raise UserError(field, folder, f"holds the result of {record['stage']}", mend)
    if record.get("state") != "finished":
        raise UserError(field, folder, f"the stage is {record.get('state')}", "let it finish first")
    return record


def stage_problems(fields: Mapping[str, tuple[str | None, str]]) -> list[Problem]:
    """What is wrong with the folders that a configuration names; what a chain has yet to make is not looked at.

    Args:
        fields: field -> (folder or None, the recipe that must have made it). What does not exist is left to
            ``StageConfig.problems``.
    """
    given = {
        field: (folder, recipe)
        for field, (folder, recipe) in fields.items()
        if folder and not folder.startswith("${") and Path(folder).expanduser().exists()
    }
    return problems_of(*(partial(finished_stage, folder, field, recipe) for field, (folder, recipe) in given.items()))
