"""Freed memory stays with the process."""

import json
import subprocess
import sys

import pytest

SCRIPT = """
import json, resource, sys
import numpy
from pipelines.memory import keep_freed_memory
done = keep_freed_memory() if sys.argv[1] == "keep" else None
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def work():
    parts = [numpy.ones(2**21, numpy.float32) for _ in range(8)]  # 8 MiB each
    return sum(float(part[0]) for part in parts)
work(); work()
before = faults()
for _ in range(5):
    work()
print(json.dumps([done, faults() - before]))
"""


def ran(how):
    result = subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_no_page_is_asked_for_twice():
    (_, without), (done, kept) = ran("leave"), ran("keep")
    assert done is True
    assert kept < 1000 < without / 5
