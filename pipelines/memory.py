"""Memory that a process has freed stays with it.

Training frees and takes the same megabytes many times a step. The C library gives them back to the system each time by
default, and the system hands out zeroed pages again at the first touch of each: on a CPU that is a tenth of a step.
"""

from __future__ import annotations

import ctypes
import sys

# Parameters of glibc's mallopt(3).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_LARGEST_MMAP_THRESHOLD = 32 * 2**20  # glibc refuses more


def keep_freed_memory() -> bool:
    """Let the allocator keep what is freed, for this process from now on; blocks above 32 MiB are still given back.

    Returns:
        Whether it was done: only glibc (Linux) knows how.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    wanted = (
        (_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD),
        (_M_TRIM_THRESHOLD, 2**31 - 1),
        (_M_TOP_PAD, 64 * 2**20),
    )
    return all(mallopt(name, value) == 1 for name, value in wanted)
