"""Where exercises compute: one process, its device, and what a piece of work takes of the clock."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from pipelines.errors import UserError

if TYPE_CHECKING:
    import torch


def own_device() -> torch.device:
    """The device of this process.

    Raises:
        UserError: if several processes were launched: an exercise is small, and all of them would do the same work.
    """
    from accelerate import PartialState

    state = PartialState()
    if state.num_processes > 1:
        mend = "start with accelerate_configs/cpu.yaml, or without a launcher"
        raise UserError("processes", state.num_processes, "an exercise is computed by one", mend)
    return state.device


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread, so that times depend less on what else the machine does; afterwards as before."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Seconds(NamedTuple):
    """What a piece of work takes.

    Attributes:
        wall: of the clock on the wall.
        processor: of this thread on the processor: what the wall's clock would show if nothing else ran. The wall's
            where a GPU computes.
    """

    wall: float
    processor: float


def least_seconds(actions: Mapping[str, Sequence[Callable[[], object]]], repeats: int) -> dict[str, Seconds]:
    """Seconds of each action on one thread: each of its pieces at its least over some repeats, added up.

    What else runs on a machine only ever adds time, so the least is the estimate that it disturbs least, and short
    pieces have a chance of not being disturbed at all. The actions take turns, so that a slow spell falls on all of
    them; each is done once before, unmeasured.

    Args:
        actions: name -> the pieces of work that are timed, one after the other.
        repeats: times that each is measured, at least 1.
    """
    import torch

    on_gpu = torch.cuda.is_available()

    def now() -> tuple[float, float]:
        if on_gpu:
            torch.cuda.synchronize()
        wall = time.perf_counter()
        return wall, wall if on_gpu else time.thread_time()

    least = {name: [Seconds(float("inf"), float("inf"))] * len(pieces) for name, pieces in actions.items()}
    with one_thread():
        for turn in range(repeats + 1):
            for name, pieces in actions.items():
                for place, piece in enumerate(pieces):
                    before = now()
                    piece()
                    taken = (after - start for after, start in zip(now(), before, strict=True))
                    if turn:
                        least[name][place] = Seconds(*map(min, taken, least[name][place]))
    return {name: Seconds(*map(sum, zip(*pieces, strict=True))) for name, pieces in least.items()}
