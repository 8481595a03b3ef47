"""The model card, and the push against a small server on this machine that speaks the Hub's protocol."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, constants

from pipelines.errors import UserError
from pipelines.publish import push, write_card

TOKEN = "hf_" + "SecretSecretSecretSecretSecret42"
WEIGHTS = bytes(range(256)) * 40


class Hub(ThreadingHTTPServer):
    """Repositories, pre-upload, commits and LFS objects, kept in memory."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, dict] = {}
        self.files: dict[str, bytes] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.tokens: set[str | None] = set()
        self.fail: dict[str, tuple[int, str]] = {}  # part of a path -> (status, message)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *arguments: object) -> None:
        pass

    def _answer(self, status: int, content: dict) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        if status >= 400 and "error" in content:
            self.send_header("X-Error-Message", content["error"])
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _refused(self) -> bool:
        self.server.requests.append((self.command, self.path))
        for part, (status, message) in self.server.fail.items():
            if part in self.path:
                self._answer(status, {"error": message})
                return True
        return False

    def do_GET(self) -> None:
        if not self._refused():
            self._answer(404, {"error": "Repository not found"})

    def do_PUT(self) -> None:
        body = self._body()
        if not self._refused():
            self.server.objects[self.path.rsplit("/", 1)[1]] = body
            self._answer(200, {})

    def do_POST(self) -> None:
        body = self._body()
        if self._refused():
            return
        hub = self.server
        hub.tokens.add(self.headers.get("Authorization"))
        if self.path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted['organization']}/{wanted['name']}"
            if name in hub.repos:
                self._answer(409, {"url": f"{hub.url}/{name}", "error": "You already created this model repo"})
                return
            hub.repos[name] = wanted
            self._answer(200, {"url": f"{hub.url}/{name}"})
        elif "/preupload/" in self.path:
            files = [
                {"path": f["path"], "shouldIgnore": False}
                | {"uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
                for f in json.loads(body)["files"]
            ]
            self._answer(200, {"files": files})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                o | {"actions": {"upload": {"href": f"{hub.url}/objects/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            self._answer(200, {"transfer": "basic", "objects": objects})
        elif "/commit/" in self.path:
            for line in body.splitlines():
                item = json.loads(line)
                value = item["value"]
                if item["key"] == "file":
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                elif item["key"] == "lfsFile":
                    hub.files[value["path"]] = hub.objects[value["oid"]]
            self._answer(200, {"commitUrl": f"{hub.url}/ada/demo-ppo/commit/{'a' * 40}", "commitOid": "a" * 40})
        elif self.path == "/api/validate-yaml":
            yaml.safe_load(json.loads(body)["content"].split("---")[1])
            self._answer(200, {})
        else:
            self._answer(404, {"error": f"no such endpoint {self.path}"})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    # hf_xet speaks to a storage service that only the real Hub has; the client then takes the LFS way.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    """A finished PPO stage in a run, its input stages beside it."""
    run = tmp_path / "home" / "ada" / "runs" / "demo"
    folder = run / "ppo"
    corpus = {"stage": "corpus", "state": "finished", "config": {"dataset": "pydocs"}, "metrics": {}}
    sft = {"stage": "sft", "state": "finished", "config": {"model": "google/flan-t5-small"}, "metrics": {}}
    ppo = {
        "stage": "seq2seq.ppo.ppo",
        "recipe": "summarization/ppo",
        "state": "finished",
        "config": {
            "output_dir": str(folder),
            "model": str(run / "sft"),
            "dataset": str(run / "corpus"),
            "reward_model": str(run / "reward"),
            "learning_rate": 1e-4,
            "max_target_length": 48,
            "prefix": "summarize: ",
        },
        "versions": {"trl": "1.16.0"},
        "seed": 3,
        "metrics": {"ppo/rollouts": 40},
    }
    for name, record in (("corpus", corpus), ("sft", sft), ("ppo", ppo)):
        (run / name).mkdir(parents=True)
        (run / name / "stage.json").write_text(json.dumps(record))
    metrics = {"ppo/rouge1": 27.31, "ppo/rouge1_ci_low": 26.2, "ppo/rouge1_ci_high": 28.4, "sft/rouge1": 26.0}
    (run / "metrics.json").write_text(json.dumps(metrics | {"ppo/kl": 3.0}))
    (run / "run.json").write_text("{}")
    (folder / "config.json").write_text(json.dumps({"model_type": "t5"}))
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    (folder / "log_history.json").write_text("[]")
    (folder / "checkpoints" / "checkpoint-4").mkdir(parents=True)
    (folder / "checkpoints" / "checkpoint-4" / "model.safetensors").write_bytes(b"x")
    (folder / "runs").mkdir()
    (folder / "runs" / "events.out.tfevents.1.host").write_bytes(b"x")
    (folder / ".lock").write_text("")
    return folder


def test_the_card_says_what_how_and_how_well(stage: Path) -> None:
    path = write_card(stage)
    assert path == stage / "README.md"
    card = ModelCard.load(path)
    data = card.data.to_dict()
    assert data["library_name"] == "genalign"
    assert data["base_model"] == "google/flan-t5-small"  # found through the SFT stage
    assert "license" not in data  # that of the base model, which is not known here
    assert {"genalign", "ppo", "t5"} <= set(data["tags"])
    results = {r.metric_type: r for r in card.data.eval_results}
    assert results["rouge1"].metric_value == 27.31
    assert "26.2–28.4" in results["rouge1"].metric_name
    assert results["rouge1"].dataset_name == "pydocs"  # found through the corpus stage
    assert '"summarize: " + document' in card.text
    assert "| learning_rate | 0.0001 |" in card.text
    assert "Limitations" in card.text
    assert "trl 1.16.0" in card.text


def test_the_card_tells_nothing_about_the_machine(stage: Path) -> None:
    text = write_card(stage).read_text()
    assert str(stage.parent) not in text
    assert "home/ada" not in text
    assert "output_dir" not in text
    assert "| reward_model | reward |" in text


def test_a_model_from_scratch_has_a_licence(stage: Path) -> None:
    (stage.parent / "sft" / "stage.json").write_text(json.dumps({"stage": "sft", "config": {"model": None}}))
    assert ModelCard.load(write_card(stage)).data.license == "apache-2.0"


def test_writing_the_card_again_gives_the_same_bytes(stage: Path) -> None:
    first = write_card(stage).read_bytes()
    assert write_card(stage).read_bytes() == first


@pytest.mark.parametrize("state", ["running", "failed"])
def test_an_unfinished_stage_is_refused(stage: Path, state: str) -> None:
    record = json.loads((stage / "stage.json").read_text())
    (stage / "stage.json").write_text(json.dumps(record | {"state": state}))
    with pytest.raises(UserError, match=f"the stage is {state}"):
        push(stage, "ada/demo-ppo", token=TOKEN)
    assert not (stage / "README.md").exists()


def test_a_folder_that_is_no_stage_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        write_card(tmp_path / "nothing")
    with pytest.raises(UserError, match="not a stage's folder"):
        write_card(tmp_path)


def test_push_creates_the_repository_and_uploads_what_belongs_there(hub: Hub, stage: Path) -> None:
    url = push(stage, "ada/demo-ppo", private=True, token=TOKEN, endpoint=hub.url)
    assert url.startswith(f"{hub.url}/ada/demo-ppo/commit/")
    assert hub.repos["ada/demo-ppo"]["visibility"] == "private"
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert set(hub.files) == {"README.md", "config.json", "model.safetensors"}
    assert hub.files["model.safetensors"] == WEIGHTS
    assert hashlib.sha256(WEIGHTS).hexdigest() in hub.objects  # large files go the LFS way
    assert hub.files["README.md"] == (stage / "README.md").read_bytes()


def test_push_into_a_repository_that_is_there(hub: Hub, stage: Path) -> None:
    hub.repos["ada/demo-ppo"] = {}
    push(stage, "ada/demo-ppo", token=TOKEN, endpoint=hub.url)
    assert hub.files["model.safetensors"] == WEIGHTS


def test_push_through_the_streamed_upload(hub: Hub, stage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way the client takes where hf_xet is installed, with files small enough to travel in the commit."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    (stage / "model.safetensors").rename(stage / "spiece.model")
    push(stage, "ada/demo-ppo", token=TOKEN, endpoint=hub.url)
    assert set(hub.files) == {"README.md", "config.json", "spiece.model"}
    assert hub.files["spiece.model"] == WEIGHTS


@pytest.mark.parametrize(
    ("where", "status", "said"),
    [
        ("/api/repos/create", 401, "does not accept the token"),
        ("/api/repos/create", 403, "may not write there"),
        ("/api/repos/create", 500, "the Hub answered 500"),
        ("/commit/", 403, "may not write there"),
        ("/objects/", 403, "may not write there"),
    ],
)
def test_a_refusal_is_one_line_without_the_token(
    hub: Hub, stage: Path, where: str, status: int, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    hub.fail = {where: (status, f"you sent {TOKEN}")}  # a careless server that repeats it
    with pytest.raises(UserError, match=said) as caught:
        push(stage, "ada/demo-ppo", token=TOKEN, endpoint=hub.url)
    _one_line_without_token(caught.value, stage, caplog.text)


def test_a_server_that_is_down(hub: Hub, stage: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    url = hub.url
    hub.shutdown()
    hub.server_close()
    with pytest.raises(UserError, match="did not get through") as caught:
        push(stage, "ada/demo-ppo", token=TOKEN, endpoint=url)
    _one_line_without_token(caught.value, stage, caplog.text)


def test_a_token_that_no_header_can_carry(hub: Hub, stage: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with pytest.raises(UserError, match="the token holds a blank") as caught:
        push(stage, "ada/demo-ppo", token=f"{TOKEN}\n{TOKEN}", endpoint=hub.url)
    _one_line_without_token(caught.value, stage, caplog.text)


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
    assert hub.tokens == {f"Bearer {TOKEN}"}


def test_offline(hub: Hub, stage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="offline mode is on"):
        push(stage, "ada/demo-ppo", token=TOKEN, endpoint=hub.url)
    assert (stage / "README.md").is_file()
    assert hub.requests == []


@pytest.mark.parametrize("name", ["a/b/c", "ada/", "ada/de mo", ""])
def test_a_name_that_cannot_be(hub: Hub, stage: Path, name: str) -> None:
    with pytest.raises(UserError, match="not a valid name"):
        push(stage, name, token=TOKEN, endpoint=hub.url)
    assert hub.requests == []


def test_the_command_line(hub: Hub, stage: Path) -> None:
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN}
    environment |= {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "pipelines.cli", "push", str(stage), "--repo_id", "ada/demo-ppo"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "/commit/" in done.stdout
    assert hub.files["model.safetensors"] == WEIGHTS
    hub.fail = {"/api/": (401, "no")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "does not accept the token" in done.stderr
    assert "Traceback" not in done.stderr
    assert TOKEN not in done.stderr + done.stdout
