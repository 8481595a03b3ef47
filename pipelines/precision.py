"""Choice of the arithmetic: bfloat16 where the device runs it faster, else float32.

On a CPU that depends on the machine (AVX512-BF16 and AMX gain a factor of 2 to 4, older ones lose), so it is measured
once for each machine and kept: a choice that changed from run to run would change results from run to run.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from functools import partial
from pathlib import Path

from pipelines.cache import cache_folder
from pipelines.errors import Problem, UserError, problems_of

_MINIMAL_GAIN = 1.2


def processor() -> str:
    """The name of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _time_of_step(layer, inputs, dtype) -> float:
    import torch

    # Processor time of one thread, not the wall clock: other programs on the machine must not decide.
    start = time.thread_time()
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not torch.float32):
        layer(inputs).float().square().mean().backward()
    return time.thread_time() - start


def cpu_bf16_gain(force: bool = False) -> float:
    """Time of a float32 training step over that of a bfloat16 one on this CPU (above 1: bfloat16 is faster).

    Measured once, interleaved, as a median of ratios, and kept in the cache for this processor and torch version.

    Args:
        force: measure again.
    """
    import torch

    file = cache_folder() / "precision.json"
    key = f"{processor()} / torch {torch.__version__}"
    known: dict[str, float] = {}
    if file.exists():
        try:
            known = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            known = {}
    if key in known and not force:
        return known[key]
    with torch.random.fork_rng(devices=[]):
        layer = torch.nn.Sequential(torch.nn.Linear(256, 1024), torch.nn.ReLU(), torch.nn.Linear(1024, 256))
        inputs = torch.randn(1024, 256)
    ratios = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for turn in range(23):
            slow, fast = (_time_of_step(layer, inputs, dtype) for dtype in (torch.float32, torch.bfloat16))
            if turn >= 3:  # the first turns pay for memory and kernel selection
                ratios.append(slow / fast)
    finally:
        torch.set_num_threads(threads)
    known[key] = round(statistics.median(ratios), 2)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text(json.dumps(known, indent=1), encoding="utf-8")
    os.replace(temporary, file)
    return known[key]


def choose_precision(wanted: str = "auto") -> str:
    """``wanted``, or for ``"auto"`` the fastest of ``"bf16"`` and ``"fp32"`` on this device.

    Args:
        wanted: ``"auto"``, ``"fp32"``, ``"bf16"`` or ``"fp16"``.

    Returns:
        ``"fp32"``, ``"bf16"`` or ``"fp16"``.

    Raises:
        UserError: if ``fp16`` is asked for on a CPU, where its loss scaling has no kernels to gain from, or ``bf16`` on
            a GPU without it.
    """
    import torch

    from pipelines.distributed import uses_cpu

    on_gpu = not uses_cpu()
    if wanted == "fp16" and not on_gpu:
        raise UserError("precision", wanted, "float16 needs a GPU", "give precision=auto, bf16 or fp32")
    # Without the emulation, which is slower than float32.
    fast = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    if wanted == "bf16" and on_gpu and not fast:
        mend = "give precision=auto, fp16 or fp32"
        raise UserError("precision", wanted, "this GPU has no bfloat16 arithmetic", mend)
    if wanted != "auto":
        return wanted
    if on_gpu:
        return "bf16" if fast else "fp32"
    return "bf16" if cpu_bf16_gain() >= _MINIMAL_GAIN else "fp32"


def precision_problems(wanted: str) -> list[Problem]:
    """What stands in the way of an arithmetic on this machine, before anything is loaded.

    Args:
        wanted: as for ``choose_precision``. Only ``"fp16"`` asks what there is, which takes the time to import torch.
    """
    return problems_of(partial(choose_precision, wanted)) if wanted == "fp16" else []
