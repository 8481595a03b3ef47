"""Where training curves go: TensorBoard, trackio or Weights & Biases; under the same names from every kind of loop.

Names are those of transformers' integrations: ``train/loss``, ``train/learning_rate``, ``eval/loss`` …, which
``rewrite_logs`` makes of the keys of ``log_history.json``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import netrc
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipelines.errors import Problem

PROJECT = "genalign"
LOGS = "logs"
"""Folder below a stage's in which TensorBoard's and wandb's files lie."""

_PACKAGES = {"tensorboard": "tensorboard", "trackio": "trackio", "wandb": "wandb"}
_OFF = ("1", "true", "yes", "on")


def tracker_problems(report_to: str) -> list[Problem]:
    """What stands in the way of a tracker: a package that is not installed, an account that nobody logged in to."""
    package = _PACKAGES.get(report_to)
    if package is None:
        return []
    if importlib.util.find_spec(package) is None:
        mend = f"pip install {package}, or give report_to=tensorboard"
        return [Problem("report_to", report_to, f"the package {package} is not installed", mend)]
    if report_to == "wandb" and not _wandb_offline() and not _wandb_key():
        mend = "run `wandb login`, or set WANDB_MODE=offline and `wandb sync` later"
        return [Problem("report_to", report_to, "nobody is logged in to Weights & Biases", mend)]
    return []


def _wandb_offline() -> bool:
    mode = os.environ.get("WANDB_MODE", "")
    if mode:
        return mode in ("offline", "disabled", "dryrun")
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in _OFF


def _wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = (
        os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").partition("//")[2].partition("/")[0].partition(":")[0]
    )
    for name in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        with contextlib.suppress(OSError, netrc.NetrcParseError, TypeError):
            if netrc.netrc(os.path.expanduser(name)).authenticators(host):
                return True
    return False


def run_name(output_dir: str | Path) -> str:
    """``RUN-STAGE``, by which a tracker knows a stage: the names of its folder and of the one above."""
    folder = Path(output_dir).expanduser().absolute()
    stage = folder.name.removeprefix(".").removesuffix(".partial")
    return f"{folder.parent.name}-{stage}"


@contextlib.contextmanager
def tracked(config: Any) -> Iterator[None]:
    """A stage's time: its curves go into its own folder and under its own name, and are closed when it ends.

    Args:
        config: of the stage, its output_dir the working folder. Without ``report_to`` nothing happens.
    """
    report_to = getattr(config, "report_to", "none")
    if report_to == "none":
        yield
        return
    logs = Path(config.output_dir).expanduser() / LOGS
    variables = {}
    if report_to == "wandb":
        logs.mkdir(exist_ok=True)
        variables |= {"WANDB_DIR": str(logs), "WANDB_NAME": run_name(config.output_dir)}
        os.environ.setdefault("WANDB_PROJECT", PROJECT)
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # no crash reports
        if _wandb_offline():
            os.environ.setdefault("WANDB_MODE", "offline")
    if report_to == "trackio":
        os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        _close(report_to)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _close(report_to: str) -> None:
    """End the run of a tracker that keeps one for the whole process: the next stage's is another."""
    tracker = sys.modules.get(report_to)
    if tracker is None:
        return
    if report_to == "wandb" and tracker.run is not None:
        tracker.finish()
    if report_to == "trackio" and tracker.context_vars.current_run.get() is not None:
        tracker.finish()


def named(entry: Mapping[str, float]) -> dict[str, float]:
    """A log's entry under the names that trackers show: ``loss`` as ``train/loss``, ``eval_loss`` as ``eval/loss``."""
    from transformers.integrations import rewrite_logs

    return rewrite_logs(dict(entry))
