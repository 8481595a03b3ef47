"""Freed memory stays with the process."""

import json
import subprocess
import sys
from pathlib import Path

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


HEAP = """
import ctypes
from pipelines.memory import keep_freed_memory
assert keep_freed_memory()
library = ctypes.CDLL(None)
library.malloc.restype = ctypes.c_void_p
middle, flags = library.malloc(20 * 2**20) + 10 * 2**20, None
for line in open("/proc/self/smaps"):
    first = line.split()[0]
    if "-" in first and not first.endswith(":"):
        begin, end = (int(part, 16) for part in first.split("-"))
        inside = begin <= middle < end
    elif first == "VmFlags:" and inside:
        flags = line.split()[1:]
print(" ".join(flags))
"""


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="a system without huge pages")
def test_what_is_taken_next_is_advised_to_lie_in_huge_pages():
    result = subprocess.run([sys.executable, "-c", HEAP], capture_output=True, text=True, check=True)
    assert "hg" in result.stdout.split()
