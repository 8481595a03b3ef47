"""A checkpoint of the training loop: one file of tensors (safetensors), one of plain values (JSON), no pickle."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipelines.stage import write_json
from pipelines.training import checkpoint_folder, mark_whole

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers.training_utils import EMAModel
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler


_KEPT = 2  # checkpoints: were the newest torn, there would be one


@dataclass(frozen=True)
class Trained:
    """What training changes, by the names of the parts."""

    parts: dict[str, nn.Module]
    optimizers: dict[str, Optimizer]
    schedulers: dict[str, LRScheduler]
    averages: dict[str, EMAModel]
    scaler: torch.amp.GradScaler | None


def save_state(root: Path, trained: Trained, plain: dict[str, Any], accelerator: Accelerator) -> None:
    """Write a checkpoint, mark it as whole once it is, and remove those before the last two.

    Args:
        root: folder of the run's checkpoints.
        trained: what training changes.
        plain: ``step`` and further values that JSON can hold.
        accelerator: all processes come here; the main one writes.
    """
    folder = checkpoint_folder(root, plain["step"])
    if accelerator.is_main_process:
        write_state(folder, trained, plain)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        mark_whole(folder)
        whole = sorted(root.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
        for old in whole[:-_KEPT]:
            shutil.rmtree(old, ignore_errors=True)


def write_state(folder: Path, trained: Trained, plain: dict[str, Any]) -> None:
    """Write everything that the rest of a run depends on.

    Args:
        folder: created if missing.
        trained: what training changes.
        plain: further values that JSON can hold.
    """
    tensors: dict[str, Tensor] = {}
    plain = plain | {"phases": {}}
    for name, part in trained.parts.items():
        tensors |= {f"part/{name}/{key}": value for key, value in part.state_dict().items()}
    for name, average in trained.averages.items():
        tensors |= {f"average/{name}/{number}": value for number, value in enumerate(average.shadow_params)}
        plain["averages"] = plain.get("averages", {}) | {name: average.optimization_step}
    for phase, optimizer in trained.optimizers.items():
        state = optimizer.state_dict()
        for index, values in state["state"].items():
            tensors |= {f"optimizer/{phase}/{index}/{key}": value for key, value in values.items()}
        plain["phases"][phase] = {
            "groups": [{k: v for k, v in group.items() if k != "params"} for group in state["param_groups"]],
            "scheduler": {k: v for k, v in trained.schedulers[phase].state_dict().items() if k != "lr_lambdas"},
        }
    if trained.scaler is not None:
        plain["scaler"] = trained.scaler.state_dict()
    folder.mkdir(parents=True, exist_ok=True)
    # safetensors takes no two names of one memory; copies have their own
    own = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
    save_file(own, folder / "state.safetensors")
    write_json(folder / "state.json", plain)


def read_state(folder: Path, trained: Trained) -> dict[str, Any]:
    """Bring everything to where ``write_state`` found it; returns what it was given as ``plain``."""
    plain = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    found: dict[tuple[str, str], dict[str, Tensor]] = {}
    for name, value in load_file(folder / "state.safetensors").items():
        kind, owner, key = name.split("/", 2)
        found.setdefault((kind, owner), {})[key] = value
    for name, part in trained.parts.items():
        part.load_state_dict(found.get(("part", name), {}))
    for name, average in trained.averages.items():
        for number, shadow in enumerate(average.shadow_params):
            shadow.copy_(found["average", name][str(number)])
        average.optimization_step = plain["averages"][name]
    for phase, optimizer in trained.optimizers.items():
        _load_optimizer(optimizer, found.get(("optimizer", phase), {}), plain["phases"][phase]["groups"])
        trained.schedulers[phase].load_state_dict(plain["phases"][phase]["scheduler"] | {"lr_lambdas": [None]})
    if trained.scaler is not None:
        trained.scaler.load_state_dict(plain["scaler"])
    return plain


def _load_optimizer(optimizer: Optimizer, tensors: dict[str, Tensor], groups: list[dict[str, Any]]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for name, value in tensors.items():
        index, key = name.split("/")
        like = parameters[int(index)]
        if value.shape == like.shape:
            # in the parameter's own memory layout, which kernels go by
            value = torch.empty_like(like, dtype=value.dtype).copy_(value)
        state.setdefault(int(index), {})[key] = value
    fresh = optimizer.state_dict()["param_groups"]
    saved = [{k: tuple(v) if isinstance(v, list) else v for k, v in group.items()} for group in groups]
    optimizer.load_state_dict(
        {"state": state, "param_groups": [own | old for own, old in zip(fresh, saved, strict=True)]}
    )
