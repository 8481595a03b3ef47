"""A mistake that all processes of a run have is said by the first one; the others wait for their end in silence."""

import signal
import subprocess
import sys

import pytest

SCRIPT = """
import time
from pipelines import recipe
from pipelines.errors import Problem, UserError

plain, recipe._PATIENCE = time.sleep, {patience}

def sleep(seconds):
    print("waiting", flush=True)
    plain(seconds)

def work():
    time.sleep = sleep
    raise UserError.of([Problem("field", 1, "is wrong", "mend it")], shared={shared})

raise SystemExit(recipe.guarded(work))
"""


@pytest.mark.parametrize(
    ("rank", "shared", "patience", "ended", "says"),
    [
        (0, True, 60.0, False, "error: field=1: is wrong; mend it\n"),
        (1, True, 60.0, True, ""),  # by the launcher, while it waits
        (1, False, 60.0, True, ""),
        (1, True, 0.1, False, ""),  # the launcher is slow
        (1, False, 0.1, False, "error: field=1: is wrong; mend it (process 1)\n"),  # a mistake of its own
    ],
)
def test_who_says_a_mistake(root, monkeypatch, rank, shared, patience, ended, says):
    monkeypatch.setenv("RANK", str(rank))
    command = [sys.executable, "-c", SCRIPT.format(patience=patience, shared=shared)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=root) as process:
        if ended:
            assert process.stdout.readline() == "waiting\n"
            process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (2, says)
