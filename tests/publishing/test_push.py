"""The push, with the official client against a server on this machine that speaks the Hub's protocol."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, constants

from pipelines.errors import UserError
from pipelines.publishing import client
from pipelines.publishing.push import push, refresh_cards
from tests.publishing.conftest import TOKEN, WEIGHTS, add_adapter, environment, write_stage
from tests.publishing.hub import Fault, Hub, account

PUSHED = {"README.md", "config.json", "model.safetensors"}


def _push(hub: Hub, stage: Path, repo_id: str | None = "ada/demo-ppo", **given: Any) -> str:
    return push(stage, repo_id, token=TOKEN, endpoint=hub.url, **given)


# --- what arrives ---


def test_it_creates_the_repository_and_uploads_what_belongs_there(hub: Hub, stage: Path) -> None:
    url = _push(hub, stage, private=True)
    assert url.startswith(f"{hub.url}/ada/demo-ppo/commit/")
    assert hub.repos["model", "ada/demo-ppo"].private
    files = hub.files("ada/demo-ppo")
    assert set(files) == PUSHED
    assert files["model.safetensors"] == WEIGHTS
    assert hashlib.sha256(WEIGHTS).hexdigest() in hub.objects  # large files go the LFS way
    assert files["README.md"] == (stage / "README.md").read_bytes()
    assert len(hub.commits("ada/demo-ppo")) == 1  # whole or not at all
    assert hub.commits("ada/demo-ppo")[0]["title"] == "Upload summarization/ppo made with genalign"


def test_the_token_goes_to_the_hub_and_not_to_the_storage(hub: Hub, stage: Path) -> None:
    _push(hub, stage)
    assert {r.authorization for r in hub.requests if r.host == "127.0.0.1"} == {f"Bearer {TOKEN}"}
    to_storage = [r for r in hub.requests if r.host == "localhost"]
    assert to_storage
    assert {r.authorization for r in to_storage} == {None}


def test_a_branch_and_a_message(hub: Hub, stage: Path) -> None:
    _push(hub, stage, branch="lora/v1", commit_message="The second try")
    assert hub.files("ada/demo-ppo") == {}
    assert set(hub.files("ada/demo-ppo", revision="lora/v1")) == PUSHED
    assert [c["title"] for c in hub.commits("ada/demo-ppo", revision="lora/v1")] == ["The second try"]
    assert 'revision="lora/v1"' in hub.files("ada/demo-ppo", revision="lora/v1")["README.md"].decode()
    (stage / "config.json").write_text('{"model_type": "t5", "is_encoder_decoder": true, "d_model": 8}')
    _push(hub, stage, branch="lora/v1")  # a branch that is there
    assert len(hub.commits("ada/demo-ppo", revision="lora/v1")) == 2


def test_what_the_stage_was_told_is_the_default(hub: Hub, stage: Path) -> None:
    record = json.loads((stage / "stage.json").read_text())
    record["config"] |= {"repo_id": "lab/docs-{stage}", "private": True, "branch": "v1", "licence": "mit"}
    (stage / "stage.json").write_text(json.dumps(record))
    _push(hub, stage, None)
    assert hub.repos["model", "lab/docs-ppo"].private
    assert ModelCard(hub.files("lab/docs-ppo", revision="v1")["README.md"].decode()).data.license == "mit"
    _push(hub, stage, "ada/other", branch="v2")
    assert ("model", "ada/other") in hub.repos
    assert "v2" in hub.repos["model", "ada/other"].branches


def test_no_repository_is_named(hub: Hub, stage: Path) -> None:
    with pytest.raises(UserError, match="give --repo_id owner/name"):
        _push(hub, stage, None)
    assert hub.requests == []


def test_given_again_it_sends_and_commits_nothing(hub: Hub, stage: Path) -> None:
    first = _push(hub, stage)
    sent = hub.sent("/storage/")
    assert _push(hub, stage) == first
    assert len(hub.commits("ada/demo-ppo")) == 1
    assert hub.sent("/storage/") == sent == len(WEIGHTS)


def test_the_licence_is_that_of_the_base_model(hub: Hub, stage: Path) -> None:
    card = b"---\nlicense: cc-by-sa-4.0\n---\n"
    hub.new_repo("google/flan-t5-small").branches["main"][-1]["files"]["README.md"] = ("regular", card)
    _push(hub, stage)
    pushed = ModelCard(hub.files("ada/demo-ppo")["README.md"].decode())
    assert pushed.data.license == "cc-by-sa-4.0"
    assert "falls under the licence" not in pushed.text


def test_no_file_names_a_place_on_this_machine(hub: Hub, stage: Path) -> None:
    table = {"model_type": "t5", "is_encoder_decoder": True, "_name_or_path": str(stage.parent / "sft"), "d_model": 8}
    (stage / "config.json").write_text(json.dumps(table))
    _push(hub, stage)
    files = hub.files("ada/demo-ppo")
    assert json.loads(files["config.json"]) == table | {"_name_or_path": ""}
    assert not [path for path, content in files.items() if str(stage.parents[3]).encode() in content]


def test_preferences_go_into_a_data_sets_repository(hub: Hub, tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    folder = write_stage(tmp_path / "pairs", "summarization/preferences", {"dataset": "pydocs"})
    rows = Dataset.from_list([{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(5)])
    DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(str(folder))
    (folder / "samples.jsonl").write_text("{}\n")
    url = _push(hub, folder, "ada/pairs")
    assert url.startswith(f"{hub.url}/datasets/ada/pairs/commit/")
    assert set(hub.files("ada/pairs", "dataset")) == {
        "README.md",
        "data/train-00000-of-00001.parquet",
        "data/test-00000-of-00001.parquet",
    }
    sent = hub.sent("/storage/")
    _push(hub, folder, "ada/pairs")  # the Parquet files are made anew, and are the same
    assert hub.sent("/storage/") == sent


def test_the_cards_of_a_run_are_pushed_again_with_its_measurements(hub: Hub, stage: Path, monkeypatch) -> None:
    metrics = (stage.parent / "metrics.json").read_text()
    (stage.parent / "metrics.json").unlink()
    _push(hub, stage, licence="mit", branch="v1")
    assert refresh_cards([stage, stage.parent / "sft"]) == []  # nothing new, or never pushed: nothing is asked
    (stage.parent / "metrics.json").write_text(metrics)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    assert [p.problem.split(";")[0] for p in refresh_cards([stage])] == ["there is no token to push with"]
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    (stage / "README.md").write_bytes(hub.files("ada/demo-ppo", revision="v1")["README.md"])
    assert refresh_cards([stage]) == []
    assert len(hub.commits("ada/demo-ppo", revision="v1")) == 2
    card = ModelCard(hub.files("ada/demo-ppo", revision="v1")["README.md"].decode())
    assert [r.metric_type for r in card.data.eval_results] == ["rouge1"]
    assert card.data.license == "mit"
    assert 'revision="v1"' in card.text
    assert hub.sent("/storage/") == len(WEIGHTS)


# --- adapters ---


def test_an_adapter_names_the_repository_of_its_base(hub: Hub, stage: Path) -> None:
    add_adapter(stage)
    with pytest.raises(UserError, match="base model is a folder of this machine") as caught:
        _push(hub, stage, "ada/demo-lora", adapter=True)
    assert "push the stage it was trained on first" in str(caught.value)
    assert hub.requests == []
    sft = stage.parent / "sft"
    (sft / "config.json").write_text('{"model_type": "t5", "is_encoder_decoder": true}')
    (sft / "model.safetensors").write_bytes(WEIGHTS)
    _push(hub, sft, "ada/demo-sft")
    _push(hub, stage, "ada/demo-lora", adapter=True)
    files = hub.files("ada/demo-lora")
    assert set(files) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "ada/demo-sft"
    assert ModelCard(files["README.md"].decode()).data.base_model == "ada/demo-sft"
    _push(hub, stage, "ada/demo-merged")  # the whole model now names its nearest base, too
    assert set(hub.files("ada/demo-merged")) == PUSHED
    assert ModelCard(hub.files("ada/demo-merged")["README.md"].decode()).data.base_model == "ada/demo-sft"


def test_the_base_of_an_adapter_can_be_given(hub: Hub, stage: Path) -> None:
    add_adapter(stage)
    _push(hub, stage, "ada/demo-lora", adapter=True, base_model="ada/elsewhere")
    files = hub.files("ada/demo-lora")
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "ada/elsewhere"


# --- what goes wrong ---


@pytest.mark.parametrize(
    ("part", "status", "said"),
    [
        ("/api/repos/create", 401, "does not accept the token"),
        ("/api/repos/create", 403, "may not write there"),
        ("/api/repos/create", 404, "knows no such repository or endpoint"),
        ("/api/validate-yaml", 400, "the Hub answered 400"),
        ("/preupload/", 403, "may not write there"),
        ("/commit/", 403, "may not write there"),
        ("/commit/", 413, "the Hub answered 413"),
        ("/storage/", 403, "may not write there"),
    ],
)
def test_a_refusal_is_one_line_without_the_token(
    hub: Hub, stage: Path, pauses: list[float], part: str, status: int, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    fault = Fault(part, status, times=-1, message=f"you sent {TOKEN}")  # a careless server that repeats it
    hub.faults.append(fault)
    with pytest.raises(UserError, match=said) as caught:
        _push(hub, stage)
    _one_line_without_token(caught.value, stage, caplog.text)
    assert f"genalign push {stage} --repo_id ada/demo-ppo" in str(caught.value)
    assert pauses == []  # it would be refused again
    fault.times = 0
    _push(hub, stage)
    assert set(hub.files("ada/demo-ppo")) == PUSHED


@pytest.mark.parametrize(
    ("part", "status", "headers", "waited"),
    [
        ("/api/repos/create", 500, {}, [1.0, 2.0]),
        ("/api/repos/create", 429, {"Retry-After": "9"}, [9.0, 9.0]),
        ("/api/repos/create", 429, {"ratelimit": '"api";r=0;t=30'}, [30.0, 30.0]),
        ("/api/repos/create", 0, {}, [1.0, 2.0]),
        ("/branch/", 502, {}, [1.0, 2.0]),
        ("/preupload/", 500, {}, [1, 2]),  # the client's own patience
        ("/objects/batch", 0, {}, [1, 2]),
        ("/storage/", 429, {"Retry-After": "5"}, [6.0, 6.0]),
        ("/commit/", 503, {}, [1.0, 2.0]),
        ("/commit/", 429, {"Retry-After": "4"}, [4.0, 4.0]),
        ("/commit/", 0, {}, [1.0, 2.0]),
    ],
)
def test_what_passes_is_waited_for(
    hub: Hub, stage: Path, pauses: list[float], part: str, status: int, headers: dict[str, str], waited: list[float]
) -> None:
    hub.faults.append(Fault(part, status, times=2, headers=headers))
    _push(hub, stage, branch="v1")
    assert set(hub.files("ada/demo-ppo", revision="v1")) == PUSHED
    assert pauses == waited
    assert hub.sent("/storage/") == len(WEIGHTS) * (3 if part == "/storage/" else 1)


def test_a_commit_whose_answer_got_lost_is_not_made_twice(hub: Hub, stage: Path, pauses: list[float]) -> None:
    hub.faults.append(Fault("/commit/", too_late=True))
    url = _push(hub, stage)
    assert len(hub.commits("ada/demo-ppo")) == 1
    assert url.endswith(hub.commits("ada/demo-ppo")[0]["oid"])
    assert hub.sent("/storage/") == len(WEIGHTS)
    assert pauses == [1.0]


def test_a_hub_that_asks_for_an_hour_is_not_waited_for(hub: Hub, stage: Path, pauses: list[float]) -> None:
    hub.faults.append(Fault("/api/repos/create", 429, headers={"Retry-After": "3600"}, message="too many"))
    with pytest.raises(UserError, match=r"the Hub asks for patience \(429: too many\)"):
        _push(hub, stage)
    assert pauses == []


def test_a_large_upload_that_is_cut_sends_the_broken_part_again(hub: Hub, stage: Path, pauses: list[float]) -> None:
    hub.part_size = 1_000_000
    content = os.urandom(3_500_000)
    (stage / "model.safetensors").write_bytes(content)
    second = f"{hashlib.sha256(content).hexdigest()}/2"
    hub.faults.append(Fault(second, cut_after=400_000, method="PUT"))
    _push(hub, stage)
    assert hub.files("ada/demo-ppo")["model.safetensors"] == content
    parts = [(r.path.rsplit("/", 1)[1], r.received) for r in hub.requests if r.method == "PUT"]
    assert parts == [("1", 1_000_000), ("2", 400_000), ("2", 1_000_000), ("3", 1_000_000), ("4", 500_000)]
    assert pauses == [1]


def test_a_push_that_broke_off_is_finished_by_another(
    hub: Hub, stage: Path, pauses: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    first, second = os.urandom(300_000), os.urandom(400_000)
    (stage / "model.safetensors").unlink()
    (stage / "model-00001-of-00002.safetensors").write_bytes(first)
    (stage / "model-00002-of-00002.safetensors").write_bytes(second)
    dead = Fault(hashlib.sha256(second).hexdigest(), times=-1, cut_after=100_000, method="PUT")
    hub.faults.append(dead)
    with pytest.raises(UserError, match="did not get through") as caught:
        _push(hub, stage)
    _one_line_without_token(caught.value, stage, caplog.text)
    assert "what is there already is not sent again" in str(caught.value)
    assert "/storage/" not in str(caught.value) + caplog.text  # an upload's address is signed, as good as a key
    assert hub.commits("ada/demo-ppo") == []  # no half model
    dead.times = 0
    before = len(hub.requests)
    _push(hub, stage)
    files = hub.files("ada/demo-ppo")
    assert (files["model-00001-of-00002.safetensors"], files["model-00002-of-00002.safetensors"]) == (first, second)
    again = [r for r in hub.requests[before:] if r.method == "PUT"]
    assert [(r.path.split("/")[2].split("?")[0], r.received) for r in again] == [
        (hashlib.sha256(second).hexdigest(), 400_000)
    ]


def test_a_hub_that_says_nothing_is_given_up(hub: Hub, stage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "SILENCE", 0.2)
    monkeypatch.setattr(client, "TRIES", 2)
    hub.faults.append(Fault("/api/repos/create", times=-1, hang=2.0))
    with pytest.raises(UserError, match="did not get through") as caught:
        _push(hub, stage)
    assert "ReadTimeout" in str(caught.value)


def test_a_server_that_is_down(hub: Hub, stage: Path, pauses: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    url = hub.url
    hub.shutdown()
    hub.server_close()
    with pytest.raises(UserError, match="did not get through") as caught:
        push(stage, "ada/demo-ppo", token=TOKEN, endpoint=url)
    _one_line_without_token(caught.value, stage, caplog.text)
    assert pauses == [1.0, 2.0, 4.0]


def test_a_token_that_no_header_can_carry(hub: Hub, stage: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with pytest.raises(UserError, match="the token holds a blank") as caught:
        push(stage, "ada/demo-ppo", token=f"{TOKEN}\n{TOKEN}", endpoint=hub.url)
    _one_line_without_token(caught.value, stage, caplog.text)
    assert hub.requests == []


def _one_line_without_token(error: UserError, stage: Path, log: str) -> None:
    assert "\n" not in str(error)
    assert str(stage / "README.md") in str(error)
    assert TOKEN not in str(error)
    assert error.__cause__ is None
    assert error.__suppress_context__ or error.__context__ is None
    assert TOKEN not in log
    assert (stage / "README.md").is_file()
    assert not [p for p in stage.rglob("*") if p.is_file() and TOKEN.encode() in p.read_bytes()]


def test_no_token(hub: Hub, stage: Path) -> None:
    with pytest.raises(UserError, match="there is no token"):
        push(stage, "ada/demo-ppo", endpoint=hub.url)
    assert (stage / "README.md").is_file()
    assert hub.requests == []


def test_the_token_of_the_environment_is_used(hub: Hub, stage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    push(stage, "ada/demo-ppo", endpoint=hub.url)
    assert {r.authorization for r in hub.requests} == {f"Bearer {TOKEN}", None}


def test_offline(hub: Hub, stage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="offline mode is on"):
        _push(hub, stage)
    assert (stage / "README.md").is_file()
    assert hub.requests == []


def test_the_clients_settings_are_as_before(hub: Hub, stage: Path) -> None:
    from huggingface_hub.utils import _http, get_session

    factory, telemetry = _http._GLOBAL_CLIENT_FACTORY, constants.HF_HUB_DISABLE_TELEMETRY
    _push(hub, stage)
    assert factory is _http._GLOBAL_CLIENT_FACTORY
    assert telemetry == constants.HF_HUB_DISABLE_TELEMETRY
    assert get_session().timeout.read is None


@pytest.mark.parametrize("name", ["a/b/c", "ada/", "ada/de mo", "demo"])
def test_a_name_that_cannot_be(hub: Hub, stage: Path, name: str) -> None:
    with pytest.raises(UserError, match="repo_id="):
        _push(hub, stage, name)
    assert hub.requests == []
    assert not (stage / "README.md").exists()


# --- the command line ---


def test_the_command_line(hub: Hub, stage: Path, tmp_path: Path) -> None:
    variables = environment(hub, tmp_path / "hf")
    words = [
        "push",
        str(stage),
        "--repo_id",
        "ada/demo-{stage}",
        "--private",
        "--branch",
        "v1",
        "--commit_message",
        "Hi",
    ]
    refused = Fault("/commit/", 403, times=-1, message="quota")
    hub.faults.append(refused)
    done = _genalign(words, variables)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert "may not write there (403: quota)" in done.stderr
    again = f"genalign push {stage} --repo_id ada/demo-ppo --private --branch v1 --commit_message Hi"
    assert f"`{again}`" in done.stderr
    refused.times = 0
    done = _genalign(again.split()[1:], variables)
    assert done.returncode == 0, done.stderr
    assert "/ada/demo-ppo/commit/" in done.stdout
    assert [c["title"] for c in hub.commits("ada/demo-ppo", revision="v1")] == ["Hi"]
    assert hub.sent("/storage/") == len(WEIGHTS)  # by the first of the two
    hub.accounts[TOKEN] = account("ada", "read")
    done = _genalign(words, variables)
    assert done.returncode == 2
    assert "may only read" in done.stderr


def _genalign(words: list[str], variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipelines.cli", *words]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120, check=False)
    assert TOKEN not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


# --- Xet ---


def test_small_files_travel_in_the_commit_whatever_the_storage(hub: Hub, stage: Path, monkeypatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    (stage / "model.safetensors").rename(stage / "vocab.json")
    _push(hub, stage)
    assert set(hub.files("ada/demo-ppo")) == {"README.md", "config.json", "vocab.json"}


def test_a_mirror_without_xet_is_one_line_that_says_how(
    hub: Hub, stage: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    with pytest.raises(UserError, match="HF_HUB_DISABLE_XET=1") as caught:
        _push(hub, stage)
    _one_line_without_token(caught.value, stage, caplog.text)
