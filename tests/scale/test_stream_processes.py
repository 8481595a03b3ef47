"""Two processes train on a stream what one does, and so does a killed one of them when it is given again."""

import json
import signal
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests.chain.conftest import fork_server
from tests.scale.conftest import documents, preferences, write_lines

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Command lines in processes that have their imports done."""
    with fork_server(HERE.parent / "chain" / "forkserver.py", tmp_path_factory.mktemp("logs")) as found:
        yield found


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_two_processes_do_on_a_stream_what_one_does(root, server, tiny_t5, tmp_path, stage):
    make, field = (documents, "dataset") if stage == "sft" else (preferences, "preferences")
    sets = [write_lines(tmp_path / f"{word}.jsonl", make(120, word=word)) for word in ("read", "sort")]
    mixture = f"[{{source: {sets[1]}, weight: 0.5}}]"
    words = [f"{field}={sets[0]}", f"mixture={mixture}", "streaming=true", "shuffle_buffer=32", f"model={tiny_t5}"]
    words += ["max_steps=9", "save_steps=3", "logging_steps=1", "lr_scheduler=constant", "warmup_ratio=0.0"]
    words += ["precision=fp32", "report_to=none", "max_source_length=32", "max_target_length=12", "learning_rate=1e-3"]
    words.append("eval_batch_size=3")
    if stage == "sft":
        _without_dropout(tiny_t5, tmp_path / "model")
        words = [word if not word.startswith("model=") else f"model={tmp_path / 'model'}" for word in words]
    recipe = ("--recipe", f"summarization/{stage}")
    one = [*words, "batch_size=8", f"output_dir={tmp_path / 'one'}"]
    assert server.run(*recipe, *one, kill_at_step=5)[0] == -signal.SIGKILL
    code, printed = server.run(*recipe, *one)
    assert code == 0, printed
    launcher = root / "accelerate_configs" / "cpu_ddp.yaml"
    ranks = tmp_path / "ranks"
    ranks.mkdir()
    script = str(root / "recipes" / "summarization" / f"{stage}.py")
    joined = ["--config_file", str(launcher), str(root / "tests" / "chain" / "joined.py"), str(ranks), script]
    code, printed, errors = server.answer(
        "--launch",
        *joined,
        *words,
        "batch_size=4",
        f"output_dir={tmp_path / 'two'}",
        env={"ACCELERATE_USE_CPU": "true"},
    )
    assert code == 0, errors[-3000:]
    assert sorted(path.name for path in ranks.iterdir()) == ["0-of-2", "1-of-2"]
    weights = [load_file(tmp_path / folder / "model.safetensors") for folder in ("one", "two")]
    assert max(float(abs(weights[0][name] - weights[1][name]).max()) for name in weights[0]) <= 1e-5
    histories = [json.loads((tmp_path / folder / "log_history.json").read_text()) for folder in ("one", "two")]
    losses = [[entry["loss"] for entry in history if "loss" in entry] for history in histories]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert len(losses[0]) == 9


def _without_dropout(model: Path, folder: Path) -> None:
    """A copy of a model whose generators of several processes do not matter."""
    import shutil

    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dropout_rate": 0.0}))
