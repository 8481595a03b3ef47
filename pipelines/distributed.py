"""The processes of a run started by ``accelerate launch``."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from pipelines.errors import UserError

if TYPE_CHECKING:
    from accelerate import PartialState


def joined_processes() -> PartialState:
    """accelerate's ``PartialState``, joined to the processes that were launched with this one.

    Raises:
        UserError: if fewer processes found each other than were launched: accelerate then goes on with one process that
            takes itself for the only one, and N of them would do the same work N times.
    """
    import torch
    from accelerate import PartialState

    launched = int(os.environ.get("WORLD_SIZE", "1"))
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true") or not torch.cuda.is_available()
    state = PartialState(cpu=on_cpu) if launched > 1 else PartialState()
    if state.num_processes != launched:
        mend = "launch with accelerate_configs/cpu_ddp.yaml (and ACCELERATE_USE_CPU=true) or ddp.yaml"
        raise UserError("WORLD_SIZE", launched, f"only {state.num_processes} of the processes joined", mend)
    return state
