"""The pretraining recipe: killed with -9 it ends with the same bits; two processes do what one does."""

import json
import random
import signal
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests.chain.conftest import HERE, digests

STEPS, BETWEEN = 16, 4
WORDS = [
    "max_source_length=40",
    "max_target_length=16",
    "text_validation_fraction=0.2",
    "precision=fp32",
    "batch_size=8",
    "d_model=32",
    "d_kv=8",
    "d_ff=64",
    "num_layers=1",
    "optimizer=adafactor",
    "learning_rate=0.02",
    "gap_choice=principal",
    f"max_steps={STEPS}",
    f"save_steps={BETWEEN}",
    "logging_steps=2",
    "eval_steps=4",
    "eval_batch_size=5",
    "eval_examples=12",
    "rouge_examples=7",
    "report_to=none",
]


@pytest.fixture(scope="module")
def recipe(uninterrupted, tmp_path_factory) -> list[str]:
    """The command line, but for its output_dir: text in sentences, the toy corpus's pairs and tokenizer."""
    from datasets import load_from_disk

    documents = load_from_disk(str(uninterrupted / "corpus"))["train"]["document"]
    file = tmp_path_factory.mktemp("text") / "text.jsonl"
    lines = [" ".join(documents[k].capitalize() for k in (i, i * i % 96, 5 * i % 96)) for i in range(len(documents))]
    file.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), encoding="utf-8")
    data = [f"text={file}", f"pairs={uninterrupted / 'corpus'}", f"tokenizer={uninterrupted / 'tokenizer'}"]
    return ["--recipe", "summarization/pretrain", *data, *WORDS]


@pytest.mark.slow
def test_killed_at_random_steps(genalign, recipe, tmp_path):
    words = [*recipe, "copy_steps=5", "gradient_accumulation=2", "keep=best", "dropout=0.1"]
    code, printed = genalign.run(*words, f"output_dir={tmp_path / 'a' / 'pretrain'}")
    assert code == 0, printed[-2000:]
    draw, done = random.Random(3), 0
    for longest in (STEPS // 2, STEPS):
        kill = draw.randrange(BETWEEN + 1, longest - done + 1)  # the step it dies in, counted from where it goes on
        argv = [*words, f"output_dir={tmp_path / 'b' / 'pretrain'}"]
        code, printed = genalign.run(*argv, kill_at_step=2 * kill)
        assert code == -signal.SIGKILL, printed[-2000:]
        complete = list((tmp_path / "b" / ".pretrain.partial").rglob("checkpoint-*/complete"))
        newest = max(int(path.parent.name.rpartition("-")[2]) for path in complete)
        # only where it went on from the newest checkpoint does it get so far in so many steps
        assert newest == done + (kill - 1) // BETWEEN * BETWEEN
        done = newest
    code, printed = genalign.run(*argv)
    assert code == 0, printed[-2000:]
    once, again = (digests(tmp_path / name) for name in "ab")
    assert once == again
    assert {"pretrain/model.safetensors", "pretrain/log_history.json"} <= set(again)
    made = [json.loads((tmp_path / name / "pretrain" / "stage.json").read_text()) for name in "ab"]
    assert made[0]["metrics"] == made[1]["metrics"]
    assert made[0]["metrics"]["pretrain/tokens"] > 0


def test_two_processes_do_what_one_does(root, genalign, recipe, tmp_path):
    words = [*recipe[2:], "dropout=0.0", "max_steps=6", "save_steps=6", "logging_steps=1", "eval_steps=3"]
    code, printed, errors = genalign.answer(*recipe[:2], *words, f"output_dir={tmp_path / 'one'}")
    assert code == 0, printed + errors
    ranks = tmp_path / "ranks"
    ranks.mkdir()
    launched = ["--launch", "--config_file", str(root / "accelerate_configs" / "cpu_ddp.yaml")]
    launched += [str(Path(HERE) / "joined.py"), str(ranks), str(root / "recipes" / "summarization" / "pretrain.py")]
    words += ["batch_size=4", f"output_dir={tmp_path / 'two'}"]
    code, printed, errors = genalign.answer(*launched, *words, cwd=tmp_path, env={"ACCELERATE_USE_CPU": "true"})
    assert code == 0, errors[-3000:]
    assert sorted(path.name for path in ranks.iterdir()) == ["0-of-2", "1-of-2"]
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert max(float(abs(one[name] - two[name]).max()) for name in one) <= 1e-5
    histories = [json.loads((tmp_path / name / "log_history.json").read_text()) for name in ("one", "two")]
    assert len(histories[0]) == len(histories[1])
    assert sum("eval_rouge1" in entry for entry in histories[0]) == 3
    for first, second in zip(*histories, strict=True):
        assert first == pytest.approx(second, rel=1e-4, abs=1e-4)
