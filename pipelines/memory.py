"""Memory that a process has freed stays with it, in huge pages.

Training frees and takes the same megabytes many times a step. The C library gives them back to the system each time by
default, and the system hands out zeroed pages again at the first touch of each: on a CPU that is a tenth of a step.
What then remains is the processor's search for the address of each page of 4 KiB; in pages of 2 MiB there are fewer.
"""

from __future__ import annotations

import ctypes
import functools
import sys

# Parameters of glibc's mallopt(3), and Linux's advice to madvise(2).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_MADV_HUGEPAGE = 14
_LARGEST_MMAP_THRESHOLD = 32 * 2**20  # glibc refuses more
_HUGE_PAGE = 2 * 2**20
_BLOCK, _BLOCKS = 31 * 2**20, 32  # taken from the heap, just under 1 GiB in all


@functools.cache
def keep_freed_memory() -> bool:
    """Let the allocator keep what is freed, for this process from now on; blocks above 32 MiB are still given back.

    Returns:
        Whether it was done: only glibc (Linux) knows how.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        library = ctypes.CDLL(None)
        mallopt = library.mallopt
    except (OSError, AttributeError):
        return False
    wanted = (
        (_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD),
        (_M_TRIM_THRESHOLD, 2**31 - 1),
        (_M_TOP_PAD, 64 * 2**20),
    )
    done = all(mallopt(name, value) == 1 for name, value in wanted)
    if done:
        _heap_in_huge_pages(library)
    return done


def _heap_in_huge_pages(library: ctypes.CDLL) -> None:
    """Ask for huge pages in the next GiB of the heap; none of it is touched, so none of it is taken yet.

    glibc's own setting for this (GLIBC_TUNABLES) is read only before a process begins. Where the system has no huge
    pages to give, the advice is without effect.
    """
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.free.restype, library.free.argtypes = None, [ctypes.c_void_p]
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    blocks = sorted(block for _ in range(_BLOCKS) if (block := library.malloc(_BLOCK)))
    neighbours = bool(blocks) and blocks[-1] - blocks[0] < _BLOCK * (_BLOCKS + 1)  # the heap grows in one piece
    if neighbours:
        first, last = -(-blocks[0] // _HUGE_PAGE), (blocks[-1] + _BLOCK) // _HUGE_PAGE
        library.madvise(first * _HUGE_PAGE, (last - first) * _HUGE_PAGE, _MADV_HUGEPAGE)
    for block in blocks:
        library.free(block)
