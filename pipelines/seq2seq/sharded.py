"""What a model needs so that FSDP2 can cut it into parts and one whole model is saved in the end."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, Trainer


def share_embedding(model: PreTrainedModel) -> None:
    """Make embeddings of one weight one module.

    transformers gives encoder and decoder a module each for the same weight; FSDP2 then takes it for the weight of two
    groups and refuses.

    Args:
        model: before it is cut; what it computes and how its weights are called stay the same.
    """
    own = model.get_input_embeddings()
    for module in model.modules():
        for name, child in list(module.named_children()):
            if child is not own and type(child) is type(own) and child.weight is own.weight:
                setattr(module, name, own)


def without_tied(model: PreTrainedModel, state: dict[str, Tensor]) -> dict[str, Any]:
    """A state gathered from all processes without the copies that stand for tied weights.

    Gathering makes a tensor of every name, and ``save_pretrained`` knows tied weights by their common memory.

    Args:
        model: whose state it is.
        state: name -> tensor; empty on all processes but the first.
    """
    tied = getattr(model, "all_tied_weights_keys", {})
    return {name: value for name, value in state.items() if tied.get(name) not in state}


class InParts:
    """Mixin of Trainers whose models FSDP2 may cut into parts."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.is_fsdp_enabled:
            share_embedding(self.model)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict if state_dict is None else without_tied(self.model, state_dict))


class TrainerInParts(InParts, Trainer):
    """transformers' ``Trainer`` of a model that may be in parts."""


@contextlib.contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Within, each process holds all weights of a model in parts, to measure it; others are left as they are.

    Only the forward of a model in parts gathers what it needs; what reads weights beside it, or calls the forward on
    some processes more often than on others, has to stand in here. All processes have to enter and leave.
    """
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if parts:
        # Else the first part that is called, by whoever samples before the first step, takes itself for the root.
        parts[0]._get_fsdp_state()._lazy_init()
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(True, recurse=False)
            part.reshard()


def save_whole(model: PreTrainedModel, folder: str | Path, *, main: bool) -> None:
    """``save_pretrained`` by one process, of a model that may be in parts. All processes have to call this.

    Args:
        model: of the run.
        folder: written into.
        main: whether this process writes.
    """
    state = whole_state(model)
    if main:
        model.save_pretrained(folder, state_dict=None if state is None else without_tied(model, state))


def whole_state(model: nn.Module) -> dict[str, Tensor] | None:
    """The weights of a model in parts, whole, by name; None of another model. All processes have to call this."""
    if not any(isinstance(module, FSDPModule) for module in model.modules()):
        return None
    state = model.state_dict()
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in state.items()}
