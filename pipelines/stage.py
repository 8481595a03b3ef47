"""Running one stage: fingerprint, lock, working folder, resume, atomic finish.

A stage writes into a hidden working folder ``.NAME.partial`` beside its own; only when it is finished is that folder
renamed to ``NAME``, so a stage's folder is either whole or absent. A killed run leaves the working folder, and the same
command goes on from the checkpoints in it, if its fingerprint is still the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

import pipelines
from pipelines.config import as_plain, fields_of, glob_files, sources
from pipelines.errors import UserError
from pipelines.memory import keep_freed_memory
from pipelines.precision import choose_precision
from pipelines.tracking import tracked

STAGE_FILE = "stage.json"
CHECKPOINTS = "checkpoints"
_PATIENCE = 10.0  # seconds

# A change of any of these may change a result, so a stage made with other versions is made again.
_DECIDING_PACKAGES = (
    "accelerate",
    "datasets",
    "diffusers",
    "numpy",
    "peft",
    "rouge-score",
    "tokenizers",
    "torch",
    "transformers",
    "trl",
)


def versions() -> dict[str, str]:
    """Package name -> installed version of Python, genalign and every package that can change a result."""
    found = {"genalign": pipelines.__version__, "python": platform.python_version()}
    for package in _DECIDING_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def write_json(path: Path, value: Any) -> None:
    """Write JSON under a temporary name and rename it, so that the file is never seen half-written."""
    temporary = path.with_name(f".{path.name}.tmp")
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def read_stage(folder: Path) -> dict[str, Any] | None:
    """The ``stage.json`` of a stage's folder, or None where there is none or it is not one."""
    try:
        found = json.loads((folder / STAGE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and "fingerprint" in found else None


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


_LARGE = 2**30  # bytes; reading more than that before every start would take longer than the start
_SAMPLED = 2**20


def _files_digest(files: dict[str, Path]) -> str:
    large = sum(file.stat().st_size for file in files.values()) > _LARGE
    return _digest([(name, _sampled_digest(file) if large else _file_digest(file)) for name, file in files.items()])


def _file_digest(path: Path) -> str:
    if path.stat().st_size > _LARGE:
        return _sampled_digest(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sampled_digest(path: Path) -> str:
    """Size, time of the last change, and a mebibyte of the beginning, the middle and the end."""
    about, parts = path.stat(), []
    with path.open("rb") as file:
        for start in (0, about.st_size // 2, about.st_size - _SAMPLED):
            file.seek(max(0, start))
            parts.append(hashlib.sha256(file.read(_SAMPLED)).hexdigest())
    return _digest([about.st_size, about.st_mtime_ns, parts])


def identity(value: str) -> str:
    """What an input is, by content: a stage folder's fingerprint, a file's or folder's digest, or the name itself.

    Files of more than a gibibyte (together, in a folder) count by size, time of the last change and samples.

    Args:
        value: a path or a hub id.
    """
    path = Path(value).expanduser()
    if path.is_file():
        return _file_digest(path)
    if path.is_dir():
        made = read_stage(path)
        if made is not None:
            return made["fingerprint"]
        files = sorted(p for p in path.rglob("*") if p.is_file())
        return _files_digest({str(file.relative_to(path)): file for file in files})
    if matched := glob_files(value):
        return _files_digest({f"{place}/{file.name}": file for place, file in enumerate(matched)})
    return value


def fingerprint(function: Callable, config: Any) -> tuple[str, dict[str, str]]:
    """The digest that decides whether a stage must run again, and the identity of each of its inputs.

    It covers the function's name, every field that can change the result, the inputs' content and the versions.

    Raises:
        UserError: if an input cannot be read.
    """
    inputs = {}
    for name, value in sources(config).items():
        try:
            inputs[name] = identity(value)
        except OSError as error:
            problem = f"cannot be read ({error.strerror or error})"
            raise UserError(name, value, problem, "give a readable file or folder") from error
    kept = {
        name: value
        for name, value in as_plain(config).items()
        # Where a stage lies decides nothing: a run that was moved or copied is still finished.
        if name != "output_dir" and not (fields_of(type(config))[name].json_schema_extra or {}).get("inert")
    }
    for name in inputs:
        # An input counts by its content: the same data under another path is the same data.
        holder: Any = kept
        *outer, last = name.split(".")
        for part in outer:
            holder = holder[int(part)] if isinstance(holder, list) else holder[part]
        holder[int(last) if isinstance(holder, list) else last] = None
    whole = [stage_name(function), kept, inputs, versions(), config.environment()]
    return _digest(whole), inputs


def stage_name(function: Callable) -> str:
    """The name a stage function goes by: its module and name without the package's (``seq2seq.sft.sft``)."""
    return f"{function.__module__}.{function.__qualname__}".removeprefix("pipelines.")


@contextlib.contextmanager
def locked(folder: Path, what: str = "output_dir") -> Iterator[None]:
    """Hold the only right to write into ``folder``.

    The lock file lies beside it while it is held; a process that dies frees the lock and leaves the file.

    Raises:
        UserError: if another process holds it.
    """
    lock = FileLock(str(folder.with_name(f".{folder.name}.lock")), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            what, folder, "another run is writing into it", "wait until it ends, or choose another output_dir"
        ) from None
    try:
        yield
    finally:
        # Removed while it is still held: whoever opened this very file before takes no lock on a file without a name.
        with contextlib.suppress(OSError):
            os.unlink(lock.lock_file)
        lock.release()


def _disk_is_full(error: Exception, folder: Path) -> bool:
    text = str(error)
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return True
    if "No space left on device" in text or "os error 28" in text:
        return True
    # torch's writer says no more than that its stream broke.
    return "inline_container" in text and shutil.disk_usage(folder.parent).free < 1 << 20


@contextlib.contextmanager
def plain_os_errors(folder: Path) -> Iterator[None]:
    """Turn a full disk, missing rights and the like into one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        number = getattr(error, "errno", None)
        if _disk_is_full(error, folder):
            mend = "free some space and give the same command again: it goes on from there"
            raise UserError("output_dir", folder, "the disk is full", mend) from error
        at = getattr(error, "filename", None)
        inside = at is None or str(at).startswith(str(folder.parent)) or str(folder).startswith(str(at))
        if number in (errno.EACCES, errno.EPERM, errno.EROFS) and inside:
            raise UserError("output_dir", folder, "may not be written", "choose a folder you may write") from error
        raise


def make_folder(folder: Path) -> list[Path]:
    """Create ``folder`` and its parents; returns those created, outermost first, so that a failure can remove them.

    Raises:
        UserError: if a file stands where a folder must be.
    """
    missing = []
    for path in (folder, *folder.parents):
        if path.is_dir():
            break
        if path.exists():
            raise UserError("output_dir", folder, f"{path} is a file", "choose another output_dir")
        missing.append(path)
    with plain_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return missing[::-1]


def remove_empty(folders: list[Path]) -> None:
    """Remove those of the folders that hold nothing (a lock file counts as nothing), innermost first."""
    for folder in reversed(folders):
        with contextlib.suppress(OSError):
            for lock in folder.glob(".*.lock"):
                lock.unlink()
            folder.rmdir()


def working_folder(folder: Path) -> Path:
    """Where the unfinished stage of ``folder`` lies."""
    return folder.with_name(f".{folder.name}.partial")


def _has_files(folder: Path) -> bool:
    return any(path.is_file() for path in folder.rglob("*"))


def _refuse_foreign(folder: Path, name: str) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError("output_dir", folder, "is a file", "choose another output_dir")
    made = read_stage(folder)
    # A stage's folder whose stage.json was damaged is still a stage's: it is made again.
    if made is None and any(folder.iterdir()) and not (folder / STAGE_FILE).is_file():
        raise UserError("output_dir", folder, "holds files that no stage made", "choose an empty or new folder")
    if made is not None and made["stage"] != name:
        raise UserError("output_dir", folder, f"holds the result of {made['stage']}", "choose another output_dir")


def _swap_in(work: Path, folder: Path) -> None:
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(work, folder)
    shutil.rmtree(old, ignore_errors=True)


def finished(function: Callable, config: Any) -> dict[str, Any] | None:
    """The ``stage.json`` of the stage's folder if it is finished and nothing that decides it has changed, else None."""
    made = read_stage(Path(config.output_dir).expanduser())
    if made is None or made.get("state") != "finished":
        return None
    return made if made["fingerprint"] == fingerprint(function, config)[0] else None


def execute(function: Callable, config: Any, *, recipe: str = "", force: bool = False) -> dict[str, float]:
    """Run a stage into ``config.output_dir`` unless it is finished there; returns its metrics.

    In a run of several processes (``accelerate launch``) all call this; the main one decides, locks and renames.

    Args:
        function: a stage, ``(config dataclass) -> metrics``.
        config: its configuration.
        recipe: ``family/stage``, noted in ``stage.json``.
        force: run it even if it is finished.

    Raises:
        UserError: for a user's mistake; the folder is then as it was before.
    """
    keep_freed_memory()
    folder = Path(config.output_dir).expanduser()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return _execute_together(function, config, folder, recipe, force)
    made = None if force else finished(function, config)
    if made is not None:
        return made["metrics"]
    with _prepared(function, config, folder, recipe, force) as (work, record):
        mine = dataclasses.replace(config, output_dir=str(work))
        with tracked(mine):
            metrics = function(mine)
        _finish(work, folder, record, metrics)
    return metrics


def _execute_together(function: Callable, config: Any, folder: Path, recipe: str, force: bool) -> dict[str, float]:
    from accelerate.utils import broadcast_object_list

    from pipelines.distributed import joined_processes, launched_strategy

    state = joined_processes()
    with contextlib.ExitStack() as stack:
        # [problems, metrics of a finished stage, precision]: what the main process found, so that all go the same way.
        verdict: list[Any] = [None, None, None]
        record: dict[str, Any] = {}
        if state.is_main_process:
            try:
                problems = config.launch_problems(launched_strategy()) if hasattr(config, "launch_problems") else []
                if problems:
                    raise UserError.of(problems)
                made = None if force else finished(function, config)
                verdict[1] = made and made["metrics"]
                if made is None:
                    _, record = stack.enter_context(_prepared(function, config, folder, recipe, force))
                    if getattr(config, "precision", None) == "auto":
                        verdict[2] = choose_precision()  # two machines might measure and choose differently
            except UserError as error:
                verdict[0] = error.problems
        broadcast_object_list(verdict)
        if verdict[0] is not None:
            raise UserError.of(verdict[0], shared=True)
        if verdict[1] is not None:
            return verdict[1]
        work = working_folder(folder)
        _check_shared(folder, work)
        mine = dataclasses.replace(config, output_dir=str(work), **({"precision": verdict[2]} if verdict[2] else {}))
        with tracked(mine):
            metrics = function(mine)
        state.wait_for_everyone()
        if state.is_main_process:
            _finish(work, folder, record, metrics)
        state.wait_for_everyone()
    return metrics


def _check_shared(folder: Path, work: Path) -> None:
    """Refuse a folder that not every process sees: checkpoints of machines apart could not be gone on from."""
    from accelerate.utils import gather_object

    until = time.monotonic() + _PATIENCE
    while not (seen := work.is_dir()) and time.monotonic() < until:
        time.sleep(0.1)  # a network file system shows what another machine made a little later
    blind = [number for number, sees in enumerate(gather_object([seen])) if not sees]
    if blind:
        problem = f"process {blind[0]} does not see it"
        raise UserError("output_dir", folder, problem, "choose a folder on a file system that all machines share")


@contextlib.contextmanager
def _prepared(
    function: Callable, config: Any, folder: Path, recipe: str, force: bool
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Hold the lock and an open working folder; a mistake found before any work was done leaves nothing behind."""
    digest, inputs = fingerprint(function, config)
    _refuse_foreign(folder, stage_name(function))
    created = make_folder(folder.parent)
    try:
        with plain_os_errors(folder), locked(folder):
            work = working_folder(folder)
            before = read_stage(work)
            if force or before is None or before["fingerprint"] != digest:
                shutil.rmtree(work, ignore_errors=True)
            fresh = not work.exists()
            work.mkdir(exist_ok=True)
            record = {
                "stage": stage_name(function),
                "recipe": recipe,
                "state": "running",
                "config": as_plain(config),
                "fingerprint": digest,
                "inputs": inputs,
                "versions": versions(),
                "seed": config.seed,
                "duration_seconds": 0.0 if before is None or fresh else before["duration_seconds"],
                "metrics": {},
            }
            write_json(work / STAGE_FILE, record)
            start = time.monotonic()
            record["_start"] = start
            try:
                with plain_os_errors(folder):
                    yield work, record
            except BaseException as error:
                if isinstance(error, UserError) and not _has_files(work / CHECKPOINTS):
                    shutil.rmtree(work, ignore_errors=True)
                elif work.exists():
                    record.pop("_start", None)
                    record["state"] = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
                    record["duration_seconds"] += round(time.monotonic() - start, 1)
                    with contextlib.suppress(OSError):
                        write_json(work / STAGE_FILE, record)
                raise
    except UserError:
        remove_empty(created)
        raise


def _finish(work: Path, folder: Path, record: dict[str, Any], metrics: dict[str, float]) -> None:
    bad = [key for key, value in metrics.items() if not (isinstance(value, (int, float)) and abs(value) < float("inf"))]
    if bad:
        raise UserError(bad[0], metrics[bad[0]], "the stage ended with a metric that is not a number", "see its log")
    record["duration_seconds"] += round(time.monotonic() - record.pop("_start"), 1)
    record |= {"state": "finished", "metrics": metrics}
    shutil.rmtree(work / CHECKPOINTS, ignore_errors=True)
    write_json(work / STAGE_FILE, record)
    _swap_in(work, folder)
