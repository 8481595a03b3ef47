"""``genalign doctor``: what this machine has, what will be used, and what is off."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from pipelines.stage import versions

_OPTIONAL = {
    "diffusers": "image models (pip install 'genalign[images]')",
    "trackio": "report_to=trackio",
    "latex2mathml": "the problem set (pip install 'genalign[problems]')",
    "wandb": "report_to=wandb",
}


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


def _devices() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return ["CPU only (no CUDA device is visible)"]
    return [
        f"{properties.name}, {_gib(properties.total_memory)}, compute capability {properties.major}.{properties.minor}"
        for properties in (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
    ]


def _precision() -> list[str]:
    import torch

    from pipelines.precision import choose_precision, cpu_bf16_gain

    gain = cpu_bf16_gain()
    lines = [f"CPU: a bf16 training step is {gain:.2f} times as fast as an fp32 one (measured here once)"]
    if torch.cuda.is_available():
        lines.append(f"GPU: bf16 {'supported' if torch.cuda.is_bf16_supported() else 'not supported'}, fp16 supported")
    return [*lines, f"precision=auto takes {choose_precision()}"]


def _launching() -> list[str]:
    from pipelines.launching import launcher_problems
    from pipelines.runner import shared_folder

    lines = []
    for file in sorted(shared_folder("accelerate_configs").glob("*.yaml")):
        problems = launcher_problems(file)
        lines += [f"{file.stem}: {problem}" for problem in problems] or [f"{file.stem}: accelerate reads it"]
    return lines


def _off() -> list[str]:
    import importlib.util

    lines = ["usage telemetry of TRL and huggingface_hub", "pickled weights and remote code"]
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        lines.append("the Hub (HF_HUB_OFFLINE is set)")
    for package, use in _OPTIONAL.items():
        if importlib.util.find_spec(package) is None:
            lines.append(f"{package} is not installed: {use}")
    if shutil.which("chromium") is None and shutil.which("google-chrome") is None:
        lines.append("no Chromium: the report's browser test is skipped")
    return lines


def examine() -> str:
    """The report as text, one heading for each matter."""
    import torch

    from pipelines.cache import cache_folder

    folder = Path("runs") if Path("runs").is_dir() else Path.cwd()
    usage = shutil.disk_usage(folder)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cached = sum(f.stat().st_size for f in cache_folder().rglob("*") if f.is_file())
    matters = {
        "versions": [f"{name} {version}" for name, version in versions().items()],
        "devices": _devices(),
        "precision": _precision(),
        "threads": [f"{cores} cores, {torch.get_num_threads()} threads (OMP_NUM_THREADS changes it)"],
        "disk": [
            f"{_gib(usage.free)} free of {_gib(usage.total)} at {folder.resolve()}",
            f"{_gib(cached)} in the cache {cache_folder()}",
        ],
        "launching": _launching(),
        "off": _off(),
    }
    return "\n".join(f"{matter}\n" + "\n".join(f"  {line}" for line in lines) for matter, lines in matters.items())
