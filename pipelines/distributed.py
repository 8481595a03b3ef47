"""The processes of a run started by ``accelerate launch``: how they find one another."""

from __future__ import annotations

import contextlib
import os
import socket
from datetime import timedelta
from typing import TYPE_CHECKING, Literal

from pipelines.errors import Problem, UserError

if TYPE_CHECKING:
    from accelerate import PartialState

TIMEOUT = "GENALIGN_TIMEOUT"
"""Environment variable: seconds that a process waits for the others in one operation."""

# Long: process 0 may well tokenize for an hour while the others wait. A process that is lost is noticed by ``peers``.
_TIMEOUT = 2 * 60 * 60
_SIOCGIFADDR = 0x8915

Strategy = Literal["ddp", "fsdp", "zero2", "zero3"]
"""How processes share the work: each with the whole model, or with parts of it (FSDP2, DeepSpeed ZeRO)."""


def launched_strategy() -> Strategy:
    """How the processes that this one was launched with share the work, as ``accelerate launch`` says it to them."""
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        return "fsdp"
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        return "zero3" if os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3" else "zero2"
    return "ddp"


def strategy_problems(config_class: type, strategy: Strategy, what: str = "distributed_type") -> list[Problem]:
    """Why a stage cannot train under a strategy; nothing where it can, or trains nothing.

    Args:
        config_class: of the stage. Those that train have ``parallelism``.
        strategy: how it is, or is to be, launched.
        what: who or what asks for it, for the message.
    """
    known = getattr(config_class, "parallelism", None)
    if known is None or strategy in known:
        return []
    problem = "this recipe needs the whole model in each process"
    return [Problem(what, strategy, problem, "launch with accelerate_configs/ddp.yaml, or multi_node.yaml")]


def uses_cpu() -> bool:
    """Whether training takes place on the CPU, because that was asked for or because there is no GPU."""
    import torch

    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true") or not torch.cuda.is_available()


def waiting_time() -> float:
    """Seconds that a process waits for the others in one operation (``GENALIGN_TIMEOUT``; two hours where it is unset).

    Raises:
        UserError: if the variable is no positive number.
    """
    given = os.environ.get(TIMEOUT, str(_TIMEOUT))
    with contextlib.suppress(ValueError):
        if 0 < float(given) < 1e9:
            return float(given)
    raise UserError(TIMEOUT, given, "is no number of seconds above 0", f"give one, such as {_TIMEOUT}, or unset it")


def joined_processes() -> PartialState:
    """accelerate's ``PartialState``, joined to the processes that were launched with this one, which it watches.

    Raises:
        UserError: if fewer processes found each other than were launched: accelerate then goes on with one process that
            takes itself for the only one, and N of them would do the same work N times. Or if there are fewer GPUs than
            processes, or what was launched cannot train here.
    """
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    from pipelines.peers import watch_peers

    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched == 1:
        return PartialState()
    on_cpu = uses_cpu()
    _check_devices(on_cpu)
    if on_cpu and int(os.environ.get("LOCAL_WORLD_SIZE", launched)) < launched:
        _choose_interface()
    state = PartialState(cpu=on_cpu, timeout=timedelta(seconds=waiting_time()))
    if state.num_processes != launched:
        mend = "launch with accelerate_configs/cpu_ddp.yaml (and ACCELERATE_USE_CPU=true) or ddp.yaml"
        raise UserError("WORLD_SIZE", launched, f"only {state.num_processes} of the processes joined", mend)
    watch_peers(state)
    if on_cpu and launched_strategy() == "fsdp":
        # accelerate 1.15 asks for a strategy of GPUs before it looks at FSDP, and copies the model whole without a word
        # elsewhere. Sharding itself works on the CPU.
        state.distributed_type = DistributedType.MULTI_GPU
    return state


def _check_devices(on_cpu: bool) -> None:
    import torch

    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if not on_cpu and here > torch.cuda.device_count():
        problem = f"this machine has {torch.cuda.device_count()} GPUs for {here} processes"
        raise UserError(
            "num_processes", here, problem, "launch as many processes as it has, or ACCELERATE_USE_CPU=true"
        )


def _choose_interface() -> None:
    """Have gloo talk over the network interface that leads to the first machine.

    It would take the address of this machine's name, which often is a loopback's that no other machine can reach.
    """
    if os.environ.get("GLOO_SOCKET_IFNAME"):
        return
    try:
        import fcntl

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((os.environ["MASTER_ADDR"], 9))  # a datagram socket's connect sends nothing
            mine = probe.getsockname()[0]
            for _, name in socket.if_nameindex():
                with contextlib.suppress(OSError):
                    request = name.encode()[:15].ljust(256, b"\0")
                    if socket.inet_ntoa(fcntl.ioctl(probe, _SIOCGIFADDR, request)[20:24]) == mine:
                        os.environ["GLOO_SOCKET_IFNAME"] = name
                        return
    except (ImportError, OSError, KeyError):
        return  # no Linux, or an address of another kind: gloo chooses
