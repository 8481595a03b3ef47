"""Whether a token may push is found out before anything is trained, and said with the mend."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.config import StageConfig, config
from pipelines.errors import UserError
from pipelines.publishing.access import check_access, check_chain, check_stage
from pipelines.publishing.fields import PublishFields, check_apart, check_branch, check_licence, check_repo_id
from pipelines.seq2seq.lora import LoraFields
from pipelines.seq2seq.preferences import PreferencesConfig
from pipelines.seq2seq.sft import SFTConfig
from pipelines.stage import write_json
from tests.publishing.conftest import TOKEN
from tests.publishing.hub import Fault, Hub, account

WRITE = ["repo.content.read", "repo.write"]


def _check(hub: Hub, repo_id: str = "ada/demo", **given: Any) -> None:
    check_access(repo_id, token=TOKEN, endpoint=hub.url, **given)


@pytest.mark.parametrize("repo_id", ["ada/demo", "lab/demo"])
def test_one_may_write_in_ones_own_namespace_and_organization(hub: Hub, repo_id: str) -> None:
    _check(hub, repo_id)
    hub.new_repo(repo_id)
    _check(hub, repo_id)
    assert not [r for r in hub.requests if r.method != "GET"]  # nothing is made by asking


@pytest.mark.parametrize(
    ("who", "repo_id", "said", "mend"),
    [
        (account("ada", "read"), "ada/demo", "may only read", "role write"),
        (account("ada"), "bob/demo", "bob is somebody else: the token is that of ada", "repo_id=ada/demo"),
        (account("ada", orgs={"club": "read"}), "club/demo", "ada may only read in club", "ask an admin"),
        (account("ada", "fineGrained", scopes=[]), "ada/demo", "fine-grained token has no right", "ada's repositories"),
        (
            account("ada", "fineGrained", scopes=[("user", "ada", ["repo.content.read"])]),
            "ada/demo",
            "fine-grained token has no right",
            "give it write access",
        ),
        # a right to one repository does not include making it
        (account("ada", "fineGrained", scopes=[("model", "ada/demo", WRITE)]), "ada/demo", "has no right", "created"),
    ],
)
def test_who_may_not(hub: Hub, who: dict, repo_id: str, said: str, mend: str) -> None:
    hub.accounts[TOKEN] = who
    with pytest.raises(UserError) as caught:
        _check(hub, repo_id)
    assert said in str(caught.value)
    assert mend in str(caught.value)
    assert "\n" not in str(caught.value)
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize("scope", [("user", "ada", WRITE), ("model", "ada/demo", WRITE)])
def test_a_fine_grained_token_with_the_right(hub: Hub, scope: tuple) -> None:
    hub.accounts[TOKEN] = account("ada", "fineGrained", scopes=[scope])
    hub.new_repo("ada/demo")
    _check(hub)


def test_the_hub_has_the_last_word(hub: Hub) -> None:
    hub.new_repo("ada/demo")
    hub.faults.append(Fault("/auth-check/write", status=403, message="resource group"))
    with pytest.raises(UserError, match=r"may not write there \(403: resource group\)"):
        _check(hub)


def test_a_token_that_the_hub_does_not_know(hub: Hub) -> None:
    hub.accounts.clear()
    with pytest.raises(UserError, match="does not accept the token") as caught:
        _check(hub)
    assert "hf auth login" in str(caught.value)


def test_a_private_push_does_not_go_into_a_public_repository(hub: Hub) -> None:
    hub.new_repo("ada/demo")
    with pytest.raises(UserError, match="is there and public"):
        _check(hub, private=True)
    hub.new_repo("ada/hidden", private=True)
    _check(hub, "ada/hidden", private=True)


def test_models_and_data_sets_are_apart(hub: Hub) -> None:
    hub.new_repo("ada/demo")
    hub.accounts[TOKEN] = account("ada", "fineGrained", scopes=[("model", "ada/demo", WRITE)])
    _check(hub)
    with pytest.raises(UserError, match="has no right"):
        _check(hub, repo_type="dataset")


def test_whoami_is_asked_again_when_it_is_busy(hub: Hub, pauses: list[float]) -> None:
    hub.faults.append(Fault("whoami", status=429, headers={"Retry-After": "7"}))
    hub.faults.append(Fault("whoami", status=503))
    _check(hub)
    assert pauses == [7.0, 2.0]


def test_a_stage_is_asked_for_before_it_runs(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    config = SFTConfig(push_to_hub=True, repo_id="ada/docs-{stage}", output_dir=str(tmp_path / "sft"))
    with pytest.raises(UserError, match="there is no token"):
        check_stage(config)
    assert hub.requests == []
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    check_stage(config)
    assert [r.path for r in hub.requests] == ["/api/whoami-v2", "/api/models/ada/docs-sft"]
    check_stage(SFTConfig(output_dir=str(tmp_path / "sft")))
    assert len(hub.requests) == 2


def test_a_chain_is_asked_for_before_its_first_stage(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    fields = {"push_to_hub": True, "repo_id": "bob/docs-{stage}"}
    stages = {"sft": (SFTConfig, fields), "pairs": (PreferencesConfig, fields), "dpo": (SFTConfig, {})}
    with pytest.raises(UserError) as caught:
        check_chain(stages, tmp_path)
    assert [p.what for p in caught.value.problems] == ["repo_id", "repo_id"]
    assert [p.value for p in caught.value.problems] == ["bob/docs-sft", "bob/docs-pairs"]


def test_two_stages_do_not_go_to_one_place(tmp_path: Path) -> None:
    fields = {"push_to_hub": True, "repo_id": "ada/docs"}
    with pytest.raises(UserError, match=r"dpo\.repo_id=ada/docs: sft goes there too.*ada/docs-\{stage\}"):
        check_apart({"sft": fields, "dpo": fields}, tmp_path)
    check_apart({"sft": fields, "dpo": fields | {"branch": "dpo"}, "ppo": {"repo_id": "ada/docs"}}, tmp_path)
    check_apart({name: fields | {"repo_id": "ada/docs-{stage}"} for name in ("sft", "dpo")}, tmp_path)


@pytest.mark.parametrize("name", ["a/b/c", "ada/", "ada/de mo", "", "demo"])
def test_a_name_that_cannot_be(name: str) -> None:
    with pytest.raises(UserError, match="repo_id="):
        check_repo_id(name)


@pytest.mark.parametrize("name", ["", "a b", "refs/pr/1", "-x", "/x", "x/", "a..b", "x.lock", "a" * 40, "x~1", "."])
def test_a_branch_that_cannot_be(name: str) -> None:
    with pytest.raises(UserError, match="cannot be the name of a branch"):
        check_branch(name)


@pytest.mark.parametrize("name", [None, "main", "v1.0", "ada/lora-8", "2026_11", "a"])
def test_branches_that_can_be(name: str | None) -> None:
    check_branch(name)


def test_a_licence_that_cannot_be() -> None:
    for name in ("Apache 2.0", "", "MIT"):
        with pytest.raises(UserError, match="not a licence's name"):
            check_licence(name)
    for known in ("apache-2.0", "cc-by-nc-sa-4.0", "llama3.1", None):
        check_licence(known)


def test_what_is_wrong_with_the_fields_is_found_with_all_else() -> None:
    config = SFTConfig(push_to_hub=True, repo_id="ada/{stage}x", output_dir="runs/sft", branch="a b", licence="No!")
    ours = {"repo_id", "branch", "licence", "commit_message"}
    assert {p.what for p in config.problems()} & ours == {"branch", "licence"}
    assert {p.what for p in SFTConfig(push_to_hub=True).problems()} & ours == {"repo_id"}
    assert not {p.what for p in SFTConfig(branch="a b").problems()} & ours  # of no account where nothing is pushed


@config
class PublishFieldsOnly(LoraFields, PublishFields, StageConfig):
    """A stage with adapters and nothing else that could be wrong."""

    model: str = ""


def test_an_adapter_is_pushed_only_where_one_is_trained(tmp_path: Path) -> None:
    from pipelines.seq2seq.dpo import DPOStageConfig

    (tmp_path / "pairs").mkdir()
    given = {
        "model": "ada/t5",
        "preferences": "ada/pairs",
        "push_to_hub": True,
        "repo_id": "ada/x",
        "push_adapter": True,
    }
    assert [p.what for p in DPOStageConfig(**given).problems()] == ["push_adapter"]
    assert DPOStageConfig(**given, lora_r=4).problems() == []
    local = PublishFieldsOnly(
        model=str(tmp_path / "pairs"), push_to_hub=True, repo_id="ada/x", push_adapter=True, lora_r=4
    )
    assert [p.problem for p in local.problems()] == [
        "the adapter's base is a folder of this machine that was not pushed"
    ]
    write_json(tmp_path / "pairs" / ".hub.json", {"repo_id": "ada/sft", "kind": "seq2seq", "branch": "main"})
    assert local.problems() == []


def test_the_fields_do_not_decide_whether_a_stage_runs_again() -> None:
    from pipelines.seq2seq.sft import sft
    from pipelines.stage import fingerprint

    plain = fingerprint(sft, SFTConfig(dataset="ada/docs"))
    pushed = SFTConfig(dataset="ada/docs", push_to_hub=True, repo_id="ada/x", private=True, branch="v1", licence="mit")
    assert fingerprint(sft, pushed) == plain
    assert json.dumps(plain)
