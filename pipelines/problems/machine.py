"""Where exercises compute: one process, its device, and what a piece of work takes of the clock."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

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


def least_seconds(actions: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Wall-clock seconds of each action on one thread: the least of some repeats.

    What else runs on a machine only ever adds time, so the least is the estimate that it disturbs least. The actions
    take turns, so that a slow spell falls on all of them; each is done once before, unmeasured.

    Args:
        actions: name -> what is timed.
        repeats: times that each is measured, at least 1.
    """
    import torch

    def wait() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    found = dict.fromkeys(actions, float("inf"))
    with one_thread():
        for action in actions.values():
            action()
        for _ in range(repeats):
            for name, action in actions.items():
                wait()
                start = time.perf_counter()
                action()
                wait()
                found[name] = min(found[name], time.perf_counter() - start)
    return found
