"""The push: the card is written first, into the stage's folder; whatever then goes wrong on the way, all stays there.

One commit holds everything, so a repository never shows half a model. Large files are uploaded before it, one by one,
and the Hub keeps those that arrived: a push that is given again sends only the rest.
"""

from __future__ import annotations

import os
import shlex
import tempfile
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.errors import Problem, UserError, problems_of
from pipelines.publishing.access import check_rights
from pipelines.publishing.artifacts import (
    ADAPTER_FOLDER,
    CARD,
    Artifact,
    artifact_of,
    files_of,
    finished,
    note_push,
    pushed_to,
)
from pipelines.publishing.card import base_of, card_of, write_card
from pipelines.publishing.client import hub, patiently
from pipelines.publishing.fields import (
    PublishFields,
    check_branch,
    check_licence,
    check_message,
    check_repo_id,
    repository,
)
from pipelines.reporting.metrics import write_text

if TYPE_CHECKING:
    from huggingface_hub import HfApi


def push(
    stage_dir: Path | str,
    repo_id: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    endpoint: str | None = None,
    *,
    branch: str | None = None,
    commit_message: str | None = None,
    licence: str | None = None,
    adapter: bool | None = None,
    base_model: str | None = None,
    checked: bool = False,
) -> str:
    """Writes the card, creates repository and branch where there are none, and commits what the stage made.

    What is left out is taken from the stage's own configuration, as it was when the stage ran.

    Args:
        stage_dir: folder of a finished stage.
        repo_id: ``owner/name``; ``{stage}`` in it stands for the folder's name.
        private: whether a repository that is created is private.
        token: a token with the right to write; None for the one that ``huggingface_hub`` has stored.
        endpoint: address of the Hub; None for the one that ``huggingface_hub`` is set to.
        branch: that is committed to; None for main.
        commit_message: of the commit.
        licence: on the card, by the Hub's name.
        adapter: push the LoRA adapter alone, not the model that it was merged into.
        base_model: the base model on the Hub, where the stage does not know it.
        checked: the token's rights were looked up just before.

    Returns:
        The address of the commit.

    Raises:
        UserError: if the folder is no finished stage's or holds nothing to load, a name is not valid, there is no token
            or no network, or the Hub refuses. The message never holds the token; the card is in the folder even so.
    """
    folder, record = finished(stage_dir)
    config = record.get("config") or {}
    wanted = repo_id or config.get("repo_id")
    if not wanted:
        raise UserError("--repo_id", "", "the stage does not know where it is to go", "give --repo_id owner/name")
    repo_id = repository(str(wanted), folder)
    private = bool(config.get("private")) if private is None else private
    branch = branch or config.get("branch")
    licence = licence or config.get("licence")
    adapter = bool(config.get("push_adapter")) if adapter is None else adapter
    message = commit_message or config.get("commit_message")
    check_repo_id(repo_id)
    check_branch(branch)
    check_message(message)
    check_licence(licence)
    artifact = artifact_of(folder, adapter)
    base = base_model or base_of(artifact, record)
    card = {"branch": branch, "licence": licence, "base_model": base}
    path = write_card(folder, repo_id, adapter=adapter, **card)
    if artifact.kind == "adapter" and base is None:
        problem = "the adapter's base model is a folder of this machine"
        mend = "push the stage it was trained on first, or give --base_model owner/name"
        raise UserError("--base_model", config.get("model") or "", problem, mend)
    options = {"branch": branch, "commit_message": commit_message, "licence": licence, "base_model": base_model}
    again = _command(folder, repo_id, {"private": private, "adapter": adapter}, options)
    with hub(repo_id, token, endpoint, kept=f"the card is in {path}", again=again) as api:
        if not checked:
            check_rights(api, repo_id, artifact.repo_type, private)
        if base and not licence:
            card["licence"] = _licence_of(api, base)
            write_text(path, card_of(artifact, record, repo_id, **card))
        with tempfile.TemporaryDirectory(prefix="genalign-push-") as work:
            files = files_of(artifact, base, Path(work)) | {CARD: path}
            return _upload(api, artifact, files, repo_id, private, branch, message or _message(record))


def _upload(
    api: HfApi,
    artifact: Artifact,
    files: dict[str, Path | bytes],
    repo_id: str,
    private: bool,
    branch: str | None,
    message: str,
) -> str:
    kind = artifact.repo_type
    patiently(lambda: api.create_repo(repo_id, private=private or None, repo_type=kind, exist_ok=True))
    if branch not in (None, "main"):
        patiently(lambda: api.create_branch(repo_id, branch=branch, repo_type=kind, exist_ok=True))

    made = _commit(api, artifact, files, repo_id, branch, message)
    note_push(artifact.stage, repo_id, artifact, branch, made.oid)
    return str(made.commit_url)


def _commit(
    api: HfApi, artifact: Artifact, files: dict[str, Path | bytes], repo_id: str, branch: str | None, message: str
) -> Any:
    from huggingface_hub import CommitOperationAdd

    def commit() -> Any:
        # New operations each time: what a commit whose answer got lost has done is looked up anew, and not done twice.
        operations = [CommitOperationAdd(name, content) for name, content in sorted(files.items())]
        return api.create_commit(
            repo_id, operations, commit_message=message, repo_type=artifact.repo_type, revision=branch
        )

    return patiently(commit)


def _message(record: dict[str, Any]) -> str:
    return f"Upload {record.get('recipe') or record['stage']} made with genalign"


def _licence_of(api: HfApi, base: str) -> str | None:
    """The base model's licence, as its card says; None where that cannot be had, which is no reason not to push."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        data = api.model_info(base).card_data
    except HfHubHTTPError:
        return None
    found = data.get("license") if data is not None else None
    return found if isinstance(found, str) else None


def _command(folder: Path, repo_id: str, flags: dict[str, bool], options: dict[str, str | None]) -> str:
    """The command line that pushes the same again."""
    words = ["genalign", "push", str(folder), "--repo_id", repo_id, *(f"--{name}" for name, on in flags.items() if on)]
    for name, value in options.items():
        words += [f"--{name}", value] if value else []
    return shlex.join(words)


def push_stage(config: PublishFields) -> None:
    """Push what a stage has made where its configuration says so: on the main process only, the others do not wait.

    Args:
        config: of the stage, which has finished.

    Raises:
        PushError: it did not get there; what was made is in its folder.
    """
    if not config.push_to_hub or int(os.environ.get("RANK", "0")) != 0:
        return
    settings = {name: getattr(config, name) for name in ("private", "branch", "commit_message", "licence")}
    adapter = getattr(config, "push_adapter", False)
    address = push(config.output_dir, config.repo_id, adapter=adapter, checked=True, **settings)
    print(f"pushed: {address}", flush=True)


def push_missing(config: PublishFields) -> None:
    """As ``push_stage``, where the stage is not yet where its configuration says.

    Raises:
        PushError: it did not get there.
    """
    note = pushed_to(Path(config.output_dir).expanduser()) or {}
    place = (repository(str(config.repo_id), config.output_dir), config.branch or "main")
    if (note.get("repo_id"), note.get("branch")) != place:
        push_stage(config)


def refresh_cards(stages: Iterable[Path]) -> list[Problem]:
    """Push the cards of a run's stages once more: they were pushed before the run had measured what they made.

    Args:
        stages: folders; those that were not pushed, or whose card says what it said, are left alone.

    Returns:
        What could not be pushed.
    """
    noted = {stage: note for stage in stages if (note := pushed_to(stage)) is not None}
    return problems_of(*(partial(_refresh, stage, note) for stage, note in noted.items()))


def _refresh(stage: Path, note: dict[str, str]) -> None:
    from huggingface_hub import ModelCard

    folder, record = finished(stage)
    artifact = artifact_of(folder, note["kind"] == "adapter" and (folder / ADAPTER_FOLDER).is_dir())
    branch, path = None if note["branch"] == "main" else note["branch"], artifact.card
    before = path.read_text(encoding="utf-8")
    data = ModelCard(before, ignore_metadata_errors=True).data
    settings = {"branch": branch, "licence": data.get("license"), "base_model": data.get("base_model")}
    after = card_of(artifact, record, note["repo_id"], **settings)
    if after == before:
        return
    write_text(path, after)
    again = _command(folder, note["repo_id"], {"adapter": artifact.folder != artifact.stage}, {"branch": branch})
    with hub(note["repo_id"], kept=f"the card is in {path}", again=again) as api:
        _commit(api, artifact, {CARD: path}, note["repo_id"], branch, "Update the card with what the run measured")
