"""The fields of a stage whose result can be pushed, and what can be wrong with them before anything runs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from pipelines.config import INERT, config
from pipelines.errors import Problem, UserError, problems_of

STAGE = "{stage}"
"""What in ``repo_id`` stands for the name of the stage's folder."""

_BRANCH = re.compile(r"(?!refs/|-|/|\.)(?!.*(\.\.|//|/\.|@\{))[\w./+-]*[\w+-]")
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]*")


@config
class PublishFields:
    """Whether the result is pushed to the Hub when it is finished, and where to."""

    repo_type: ClassVar[Literal["model", "dataset"]] = "model"
    """What kind of repository the stage's result belongs in."""

    push_to_hub: bool = Field(False, description="push the result to the Hub when finished", json_schema_extra=INERT)
    repo_id: str | None = Field(
        None,
        description="owner/name on the Hub; {stage} in it stands for the name of the stage's folder",
        json_schema_extra=INERT,
    )
    private: bool = Field(False, description="create the repository as a private one", json_schema_extra=INERT)
    branch: str | None = Field(
        None,
        description="branch that is committed to, made from main where there is none; null: main",
        json_schema_extra=INERT,
    )
    commit_message: str | None = Field(
        None, description="of the push; null: says what was made", json_schema_extra=INERT
    )
    licence: str | None = Field(
        None,
        description="licence on the card, by the Hub's name (apache-2.0, cc-by-4.0 …); null: that of the base model on "
        "the Hub, apache-2.0 of a model trained from scratch, none of a data set",
        json_schema_extra=INERT,
    )

    def problems(self) -> list[Problem]:
        """What cannot be pushed: a name, branch, message or licence that the hub refuses, an adapter of no training."""
        found = super().problems()
        if not self.push_to_hub:
            return found
        if not self.repo_id:
            found.append(Problem("repo_id", "", "push_to_hub=true needs to know where to", "give repo_id=owner/name"))
        else:
            found += problems_of(partial(check_repo_id, repository(self.repo_id, self.output_dir)))
        found += problems_of(
            partial(check_branch, self.branch),
            partial(check_message, self.commit_message),
            partial(check_licence, self.licence),
        )
        if getattr(self, "push_adapter", False) and not getattr(self, "lora_r", 0):
            found.append(Problem("push_adapter", True, "no adapter is trained", "give lora_r=8, or leave it out"))
        elif getattr(self, "push_adapter", False) and (model := getattr(self, "model", None)):
            from pipelines.publishing.artifacts import on_hub

            if Path(model).expanduser().is_dir() and on_hub(model) is None:
                mend = "push that stage first, or push the merged model: leave push_adapter out"
                problem = "the adapter's base is a folder of this machine that was not pushed"
                found.append(Problem("push_adapter", True, problem, mend))
        return found


def repository(repo_id: str, folder: str | Path) -> str:
    """``repo_id`` with the name of the stage's folder put in.

    >>> repository("ada/docs-{stage}", "runs/demo/dpo")
    'ada/docs-dpo'
    """
    return repo_id.replace(STAGE, Path(folder).expanduser().resolve().name)


def check_repo_id(repo_id: str) -> None:
    """Refuse what cannot be a repository's name.

    Raises:
        UserError: if it is not ``owner/name`` as the Hub takes it.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    mend = "give owner/name, of letters, digits, -, _ and ."
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise UserError("repo_id", repo_id, "not a valid name", mend) from None
    if "/" not in repo_id:
        raise UserError("repo_id", repo_id, "does not say whose repository it is", mend)


def check_branch(branch: str | None) -> None:
    """Refuse what cannot be a branch's name.

    Raises:
        UserError: it is none, or a commit's id.
    """
    if branch is None:
        return
    if not _BRANCH.fullmatch(branch) or branch.endswith((".lock", ".")) or re.fullmatch(r"[0-9a-f]{40}", branch):
        mend = "give letters, digits, -, _, . and /, such as v1; null for main"
        raise UserError("branch", branch, "cannot be the name of a branch", mend)


def check_message(message: str | None) -> None:
    """Refuse an empty commit message.

    Raises:
        UserError: it has no letter.
    """
    if message is not None and not message.strip():
        raise UserError("commit_message", message, "is empty", "say something, or leave the field out")


def check_licence(licence: str | None) -> None:
    """Refuse what cannot be a licence's name on the Hub.

    Raises:
        UserError: it holds other letters than such names have.
    """
    if licence is not None and not _LICENCE.fullmatch(licence):
        mend = "give its name on the Hub in small letters, such as apache-2.0, mit, cc-by-sa-4.0 or other"
        raise UserError("licence", licence, "not a licence's name", mend)


def check_apart(stages: Mapping[str, Mapping[str, Any]], run_dir: Path) -> None:
    """Refuse two stages of a chain that would be pushed over one another.

    Args:
        stages: stage -> its plain fields.
        run_dir: the run's folder.

    Raises:
        UserError: if two go to the same branch of the same repository.
    """
    taken: dict[tuple[str, str], str] = {}
    problems = []
    for name, fields in stages.items():
        if not fields.get("push_to_hub") or not fields.get("repo_id"):
            continue
        place = repository(str(fields["repo_id"]), run_dir / name), str(fields.get("branch") or "main")
        if place in taken:
            mend = f"put {STAGE} into it, as in {place[0]}-{STAGE}, or give {name}.push_to_hub=false"
            problem = f"{taken[place]} goes there too, and would be overwritten"
            problems.append(Problem(f"{name}.repo_id", fields["repo_id"], problem, mend))
        taken.setdefault(place, name)
    if problems:
        raise UserError.of(problems)
