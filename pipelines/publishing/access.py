"""Whether a token may write into a repository: asked before hours of training, not after them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.errors import Problem, UserError, problems_of
from pipelines.publishing.client import PushError, hub, patiently
from pipelines.publishing.fields import PublishFields, check_apart, repository

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_TOKENS = "https://huggingface.co/settings/tokens"


def check_access(
    repo_id: str,
    repo_type: str = "model",
    private: bool = False,
    token: str | None = None,
    endpoint: str | None = None,
) -> None:
    """Find out from the Hub whether the token may push to a repository, or create it.

    Args:
        repo_id: ``owner/name``.
        repo_type: ``model`` or ``dataset``.
        private: whether what is pushed must not be seen by others.
        token: None for the one that ``huggingface_hub`` has stored.
        endpoint: address of the Hub; None for the one that ``huggingface_hub`` is set to.

    Raises:
        UserError: there is no token or no network, the Hub does not know the token, it may not write there, the
            repository is somebody else's, or it is public and ``private`` is asked for.
    """
    with hub(repo_id, token, endpoint) as api:
        check_rights(api, repo_id, repo_type, private)


def check_rights(api: HfApi, repo_id: str, repo_type: str, private: bool) -> None:
    """As ``check_access``, with a client at hand."""
    owner = repo_id.split("/")[0]
    who = patiently(api.whoami)
    grant = (who.get("auth") or {}).get("accessToken") or {}
    roles = {who["name"]: "admin"} | {org["name"]: org.get("roleInOrg", "write") for org in who.get("orgs", ())}
    groups = {org["name"] for org in who.get("orgs", ()) if org.get("resourceGroups")}
    if grant.get("role") == "read":
        problem = f"the token of {who['name']} may only read"
        raise PushError(
            "repo_id", repo_id, problem, f"make one with the role write at {_TOKENS}, and set HF_TOKEN to it"
        )
    if owner not in roles:
        others = [name for name in roles if name != who["name"]]
        problem = f"{owner} is somebody else: the token is that of {who['name']}"
        problem += f", who is in {', '.join(sorted(others))}" if others else ""
        raise PushError(
            "repo_id", repo_id, problem, f"give repo_id={who['name']}/{repo_id.split('/')[1]}, or log in as {owner}"
        )
    if roles[owner] == "read" and owner not in groups:
        problem = f"{who['name']} may only read in {owner}"
        raise PushError(
            "repo_id", repo_id, problem, f"ask an admin of {owner} for the role write, or push to {who['name']}/…"
        )
    there = _repository(api, repo_id, repo_type)
    if grant.get("role") == "fineGrained" and not _granted(grant, owner, repo_id, repo_type, there is not None):
        problem = "the fine-grained token has no right to write there"
        scope = "the repository" if there is not None else f"{owner}'s repositories (this one is to be created)"
        raise PushError("repo_id", repo_id, problem, f"give it write access to {scope} at {_TOKENS}")
    if there is None:
        return
    if private and there.private is False:
        problem = "the repository is there and public, and private=true asks for a private one"
        raise PushError("repo_id", repo_id, problem, "make it private on its page, or give another name")
    patiently(lambda: api.auth_check(repo_id, repo_type=repo_type, write=True))


def _repository(api: HfApi, repo_id: str, repo_type: str) -> Any:
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return patiently(lambda: api.repo_info(repo_id, repo_type=repo_type))
    except RepositoryNotFoundError:
        return None


def _granted(grant: dict[str, Any], owner: str, repo_id: str, repo_type: str, exists: bool) -> bool:
    """Whether a fine-grained token's scopes include writing: to the namespace, or to the repository where it exists."""
    wanted = {("user", owner), ("org", owner)} | ({(repo_type, repo_id)} if exists else set())
    for scope in (grant.get("fineGrained") or {}).get("scoped") or ():
        entity = scope.get("entity") or {}
        if (entity.get("type"), entity.get("name")) in wanted and "repo.write" in scope.get("permissions", ()):
            return True
    return False


def check_stage(config: PublishFields) -> None:
    """Ask for the rights of what a stage is to push, before it is made; nothing where it pushes nothing.

    Raises:
        UserError: as ``check_access``.
    """
    if config.push_to_hub:
        _check_all([(repository(config.repo_id, config.output_dir), config.repo_type, config.private)])


def check_chain(stages: Mapping[str, tuple[type, Mapping[str, Any]]], run_dir: Path) -> None:
    """The same for all stages of a chain, before the first of them runs.

    Args:
        stages: name -> class of its configuration, and its plain fields (its inputs may yet have to be made).
        run_dir: the folder of the run.

    Raises:
        UserError: one line for each repository that could not be pushed to, or that two stages would be pushed to.
    """
    pushed = {name: found for name, found in stages.items() if found[1].get("push_to_hub") and found[1].get("repo_id")}
    check_apart({name: fields for name, (_, fields) in pushed.items()}, run_dir)
    _check_all(
        (repository(str(fields["repo_id"]), run_dir / name), cls.repo_type, bool(fields.get("private")))
        for name, (cls, fields) in pushed.items()
    )


def _check_all(places: Iterable[tuple[str, str, bool]]) -> None:
    """In a run of several processes all call this: the main one asks, and all end alike."""
    wanted = list(dict.fromkeys(places))
    if not wanted:
        return
    problems: list[Problem] = []
    if int(os.environ.get("RANK", "0")) == 0:
        problems = problems_of(*(partial(check_access, *place) for place in wanted))
    together = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if together:
        problems = _agreed(problems)
    if problems:
        raise UserError.of(problems, shared=together)


def _agreed(problems: list[Problem]) -> list[Problem]:
    """What the main process found, on every process."""
    from accelerate.utils import broadcast_object_list

    from pipelines.distributed import joined_processes

    joined_processes()
    told = [problems]
    broadcast_object_list(told)
    return told[0]
