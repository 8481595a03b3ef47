"""What a model needs so that FSDP2 can cut it into parts and one whole model is saved in the end."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel


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
