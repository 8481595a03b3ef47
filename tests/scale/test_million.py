"""A million documents: training starts within seconds, in the memory that ten thousand take, and survives kill -9."""

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow.json
import pyarrow.parquet
import pytest

from tests.chain.conftest import fork_server
from tests.scale.conftest import documents, preferences, write_lines

pytestmark = pytest.mark.slow

MILLION, TEN_THOUSAND = 1_000_000, 10_000
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Makes documents or pairs, in a format, so many of them; each once."""
    folder = tmp_path_factory.mktemp("million")

    def made(kind: str, suffix: str, count: int) -> Path:
        path = folder / f"{kind}_{count}.{suffix}"
        if not path.exists() and suffix == "jsonl":
            write_lines(path, (documents if kind == "documents" else preferences)(count))
        elif not path.exists():
            pyarrow.parquet.write_table(pyarrow.json.read_json(made(kind, "jsonl", count)), path)
        return path

    return made


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Command lines in processes that have their imports done."""
    with fork_server(HERE.parent / "chain" / "forkserver.py", tmp_path_factory.mktemp("logs")) as found:
        yield found


def _words(stage, source, tiny_t5, output, **fields):
    given = {
        "model": tiny_t5,
        ("dataset" if stage == "sft" else "preferences"): source,
        "output_dir": output,
        "streaming": "true",
        "max_steps": 6,
        "save_steps": 3,
        "logging_steps": 1,
        "batch_size": 16,
        "precision": "fp32",
        "report_to": "none",
        "max_source_length": 48,
        "max_target_length": 12,
        "max_validation": 100,
        **({"max_test": 100} if stage == "dpo" else {}),
        **fields,
    }
    return [f"{key}={value}" for key, value in given.items()]


# The peak of the recipe's own address space: what wait4 says would be that of the process that started it.
_TELLING = """
import atexit, re, runpy, sys
peak = re.compile(r"VmHWM:\\s+(\\d+)")
atexit.register(lambda: print("PEAK", peak.search(open("/proc/self/status").read()).group(1)))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def _peak(root, stage, words):
    """Peak resident memory in MiB, and seconds, of a recipe in a fresh interpreter."""
    start = time.monotonic()
    script = str(root / "recipes" / "summarization" / f"{stage}.py")
    done = subprocess.run([sys.executable, "-c", _TELLING, script, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout.rpartition("PEAK ")[2]) / 1024, time.monotonic() - start


@pytest.mark.parametrize(("stage", "kind"), [("sft", "jsonl"), ("sft", "parquet"), ("dpo", "jsonl")])
def test_memory_and_start_do_not_grow_with_the_set(root, sets, tiny_t5, tmp_path, stage, kind):
    what = "documents" if stage == "sft" else "pairs"
    found = {}
    for count in (TEN_THOUSAND, MILLION):
        words = _words(stage, sets(what, kind, count), tiny_t5, tmp_path / str(count))
        found[count] = _peak(root, stage, words)
    (small, quick), (large, long) = found[TEN_THOUSAND], found[MILLION]
    print(
        f"{stage} {kind}: {small:.0f} MiB and {quick:.1f} s for 10,000, {large:.0f} MiB and {long:.1f} s for 1,000,000"
    )
    assert large < 1.1 * small
    assert long - quick < 6


def test_weights_hold_in_a_long_mixture(sets):
    from pipelines.config import validate
    from pipelines.corpus.stream import corpus_stream
    from pipelines.seq2seq.sft import SFTConfig
    from pipelines.seq2seq.streamed import StreamedExamples

    fields = {
        "dataset": str(sets("documents", "jsonl", MILLION)),
        "streaming": True,
        "max_steps": 1000,
        "tokenizer": "x/y",
    }
    fields["mixture"] = [{"source": str(sets("documents", "parquet", TEN_THOUSAND)), "weight": 0.25, "name": "small"}]
    settings = validate(SFTConfig, fields)
    run = StreamedExamples(corpus_stream(settings, step_size=64), 1000, lambda rows: rows)
    counts = Counter(run.sets(range(64_000)).tolist())
    assert counts[1] / 64_000 == pytest.approx(0.2, abs=0.01 * 0.2)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_killed_in_the_middle_of_a_million_it_goes_on_exactly(server, sets, tiny_t5, tmp_path, stage):
    what = "documents" if stage == "sft" else "pairs"
    fields = {"max_steps": 24, "save_steps": 4, "shuffle_buffer": 80}
    folders = [tmp_path / "whole", tmp_path / "killed"]
    words = [_words(stage, sets(what, "jsonl", MILLION), tiny_t5, folder, **fields) for folder in folders]
    assert server.run("--recipe", f"summarization/{stage}", *words[0])[0] == 0
    for step in (7, 11):  # the second time it begins at step 4 again, so that it dies at step 15
        code, printed = server.run("--recipe", f"summarization/{stage}", *words[1], kill_at_step=step)
        assert code == -signal.SIGKILL, printed
    code, printed = server.run("--recipe", f"summarization/{stage}", *words[1])
    assert code == 0, printed
    for name in ("model.safetensors", "log_history.json"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name
    metrics = [json.loads((folder / "stage.json").read_text())["metrics"] for folder in folders]
    assert metrics[0] == metrics[1]
