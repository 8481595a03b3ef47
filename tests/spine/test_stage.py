"""A stage's folder is whole or absent; what decides a result decides whether it is made again."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from pydantic import Field

from pipelines.config import INERT, Source, StageConfig, config, validate
from pipelines.errors import UserError
from pipelines.stage import execute, fingerprint, finished, locked, read_stage, working_folder


@config
class CountConfig(StageConfig):
    """A stage that counts its calls in a file outside."""

    text: str = Field("hello", description="what to write")
    data: Source | None = Field(None, description="an input")
    threads: int = Field(1, description="does not change the result", json_schema_extra=INERT)


CALLS: list[str] = []


def count(config: CountConfig) -> dict[str, float]:
    CALLS.append(config.text)
    folder = Path(config.output_dir)
    (folder / "checkpoints").mkdir()
    (folder / "text.txt").write_text(config.text)
    if config.text == "bad":
        raise UserError("text", config.text, "is bad", "say better")
    return {"count/length": len(config.text)}


def make(folder, **values):
    return validate(CountConfig, {"output_dir": str(folder), **values})


@pytest.fixture(autouse=True)
def _no_calls():
    CALLS.clear()


def test_finished_stage_is_whole_and_is_not_made_again(tmp_path):
    folder = tmp_path / "runs" / "count"
    assert execute(count, make(folder)) == {"count/length": 5}
    assert sorted(p.name for p in folder.iterdir()) == ["stage.json", "text.txt"]
    assert not working_folder(folder).exists()
    made = read_stage(folder)
    assert made["state"] == "finished"
    assert made["config"]["output_dir"] == str(folder)
    assert execute(count, make(folder)) == {"count/length": 5}
    assert len(CALLS) == 1
    execute(count, make(folder), force=True)
    assert len(CALLS) == 2


def test_what_decides_the_result_decides_the_fingerprint(tmp_path, monkeypatch):
    data = tmp_path / "data.jsonl"
    data.write_text("one")
    base = fingerprint(count, make(tmp_path / "a", data=str(data)))[0]
    moved = tmp_path / "moved.jsonl"
    moved.write_text("one")
    assert fingerprint(count, make(tmp_path / "b", data=str(moved)))[0] == base, "a path is not content"
    assert fingerprint(count, make(tmp_path / "a", data=str(data), threads=2))[0] == base
    assert fingerprint(count, make(tmp_path / "a", data=str(data), seed=1))[0] != base
    assert fingerprint(count, make(tmp_path / "a", data=str(data), text="x"))[0] != base
    data.write_text("two")
    assert fingerprint(count, make(tmp_path / "a", data=str(data)))[0] != base
    monkeypatch.setattr("pipelines.stage.versions", lambda: {"torch": "other"})
    assert fingerprint(count, make(tmp_path / "a", data=str(moved)))[0] != base


def test_a_stage_as_input_counts_by_its_fingerprint(tmp_path):
    first = make(tmp_path / "first")
    execute(count, first)
    second = make(tmp_path / "second", data=str(tmp_path / "first"))
    execute(count, second)
    assert finished(count, second) is not None
    execute(count, make(tmp_path / "first", text="other words"))
    assert finished(count, second) is None


def test_a_users_mistake_leaves_nothing_behind(tmp_path):
    with pytest.raises(UserError, match=r"text=bad: is bad; say better"):
        execute(count, make(tmp_path / "new" / "deep" / "count", text="bad"))
    # the checkpoints a stage began with would be kept; the toy makes that folder first, so only it may be there
    left = [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".lock"]
    assert left in ([], ["new/deep/.count.partial/stage.json", "new/deep/.count.partial/text.txt"])


def fail_early(config: CountConfig) -> dict[str, float]:
    raise UserError("data", "x", "is bad", "mend it")


def test_a_mistake_found_before_any_work_removes_the_folders_it_made(tmp_path):
    with pytest.raises(UserError):
        execute(fail_early, make(tmp_path / "new" / "deep" / "count"))
    assert list(tmp_path.iterdir()) == []


def test_an_old_result_survives_a_failing_change(tmp_path):
    folder = tmp_path / "count"
    execute(count, make(folder))
    with pytest.raises(UserError):
        execute(count, make(folder, text="bad"))
    assert (folder / "text.txt").read_text() == "hello"


@pytest.mark.parametrize("kind", ["file", "foreign", "stage"])
def test_a_folder_that_is_not_ours_is_refused(tmp_path, kind):
    folder = tmp_path / "count"
    if kind == "file":
        folder.write_text("mine")
    elif kind == "foreign":
        folder.mkdir()
        (folder / "thesis.tex").write_text("mine")
    else:
        folder.mkdir()
        (folder / "stage.json").write_text(json.dumps({"stage": "other", "fingerprint": "0", "state": "finished"}))
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"output_dir="):
        execute(count, make(folder))
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before


def test_a_stage_whose_record_was_damaged_is_made_again(tmp_path):
    folder = tmp_path / "count"
    execute(count, make(folder))
    (folder / "stage.json").write_text("{")
    assert execute(count, make(folder)) == {"count/length": 5}
    assert read_stage(folder)["state"] == "finished"


def test_an_input_that_cannot_be_read_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"data=/proc/self/mem: cannot be read"):
        execute(count, make(tmp_path / "count", data="/proc/self/mem"))
    assert list(tmp_path.iterdir()) == []


def test_a_parent_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"is a file"):
        execute(count, make(tmp_path / "file" / "count"))


def test_two_runs_cannot_write_into_one_folder(tmp_path):
    folder = tmp_path / "count"
    with locked(folder), pytest.raises(UserError, match=r"another run is writing into it"):
        execute(count, make(folder))
    assert execute(count, make(folder)) == {"count/length": 5}


def run_script(tmp_path, body, **kwargs):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(body))
    return subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60, **kwargs)


SCRIPT = """
    import os, sys
    from pathlib import Path
    from pipelines.config import StageConfig, config, validate
    from pipelines.errors import UserError
    from pipelines.recipe import guarded
    from pipelines.stage import execute

    @config
    class Big(StageConfig):
        pass

    def big(config: Big) -> dict[str, float]:
        (Path(config.output_dir) / "checkpoints").mkdir(exist_ok=True)
        with open(Path(config.output_dir) / "big.bin", "wb") as file:
            for _ in range(64):
                file.write(bytes(1 << 20))
                file.flush()
        return {"big/size": 64.0}

    raise SystemExit(guarded(lambda: execute(big, validate(Big, {"output_dir": OUT}))))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="a small file system can only be mounted by root")
def test_a_full_disk_is_one_line_and_the_run_goes_on_from_there(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("this machine allows no mounts")
    try:
        done = run_script(tmp_path, SCRIPT.replace("OUT", repr(str(disk / "big"))))
        assert done.returncode == 2, done.stderr
        (line,) = done.stderr.strip().splitlines()
        assert line.startswith("error: output_dir=")
        assert "the disk is full; free some space and give the same command again" in line
        assert not (disk / "big").exists()
        subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True)
        assert run_script(tmp_path, SCRIPT.replace("OUT", repr(str(disk / "big")))).returncode == 0
    finally:
        subprocess.run(["umount", str(disk)], check=False)


def test_a_folder_that_may_not_be_written_is_one_line(tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir()
    if os.geteuid() != 0:
        closed.chmod(0o555)
    elif subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(closed)], capture_output=True).returncode:
        pytest.skip("root may write anywhere, and this machine allows no read-only mount")
    try:
        done = run_script(tmp_path, SCRIPT.replace("OUT", repr(str(closed / "big"))))
    finally:
        if os.geteuid() == 0:
            subprocess.run(["umount", str(closed)], check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.strip() == (
        f"error: output_dir={closed / 'big'}: may not be written; choose a folder you may write"
    )


def test_termination_leaves_a_resumable_working_folder(tmp_path):
    body = """
        import sys, time
        from pathlib import Path
        from pipelines.config import StageConfig, config, validate
        from pipelines.recipe import guarded
        from pipelines.stage import execute

        @config
        class Slow(StageConfig):
            pass

        def slow(config: Slow) -> dict[str, float]:
            file = Path(config.output_dir) / "checkpoints" / "one"
            if file.exists():
                return {"slow/resumed": 1.0}
            file.parent.mkdir()
            file.touch()
            print("ready", flush=True)
            time.sleep(60)
            return {"slow/resumed": 0.0}

        raise SystemExit(guarded(lambda: print(execute(slow, validate(Slow, {"output_dir": OUT})))))
    """.replace("OUT", repr(str(tmp_path / "slow")))
    script = tmp_path / "slow.py"
    script.write_text(textwrap.dedent(body))
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline().strip() == "ready"
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "give the same command again" in errors
    assert read_stage(working_folder(tmp_path / "slow"))["state"] == "interrupted"
    again = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    assert "{'slow/resumed': 1.0}" in again.stdout
    assert read_stage(tmp_path / "slow")["state"] == "finished"


def not_a_number(config: CountConfig) -> dict[str, float]:
    return {"count/mean": float("nan")}


def test_a_metric_that_is_no_number_does_not_finish_a_stage(tmp_path):
    with pytest.raises(UserError, match=r"count/mean=nan"):
        execute(not_a_number, make(tmp_path / "count"))
    assert not (tmp_path / "count").exists()
