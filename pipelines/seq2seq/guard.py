"""The guard of a trainer's first batch, taken as it is laid out: each completion beside its own source."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipelines.seq2seq.stacks import Order
from pipelines.seq2seq.view import check_log_probs


def check_batch(
    model: Any,
    sources: dict[str, Tensor | None],
    completion_ids: Tensor,
    completion_mask: Tensor,
    found: Tensor,
    *,
    order: Order | Tensor,
    temperature: float = 1.0,
) -> None:
    """Compare log-probabilities of a batch with the plain class's, which is given each row's own source.

    Compared are the first and the last completion of the first and of the last source: rows that have lost their
    source, or were given their neighbour's, differ from the plain class by as much as the sources do.

    Args:
        model: a view, or a PEFT model around one.
        sources: (B, …) each under its name in the plain class's forward; None for what there is none of.
        completion_ids: (R, T) padded on the right, without a start token.
        completion_mask: (R, T), 1 on the real tokens.
        found: (R, T) log-probabilities of the whole batch, made without dropout.
        order: how the R rows belong to the B sources.
        temperature: what the logits were divided by.

    Raises:
        RuntimeError: they differ.
    """
    numbers = torch.arange(len(completion_ids), device=completion_ids.device)
    count = len(next(iter(sources.values())))
    # Not by `spread_rows`: how rows find their source is part of what is checked.
    if isinstance(order, Tensor):
        owners = order
    else:
        owners = numbers % count if order == "sample-major" else numbers // (len(numbers) // count)
    rows = torch.cat([(owners == owners[end]).nonzero()[[0, -1], 0] for end in (0, -1)]).unique()
    given = {name: value[owners[rows]] for name, value in sources.items() if value is not None}
    check_rows(model, given, completion_ids[rows], completion_mask[rows], found[rows], temperature=temperature)


def check_rows(
    model: Any,
    sources: dict[str, Tensor],
    completion_ids: Tensor,
    completion_mask: Tensor,
    found: Tensor,
    *,
    temperature: float = 1.0,
) -> None:
    """``view.check_log_probs`` row by row, so that no more memory is taken than a training step takes.

    Args:
        model: as there, and so the others.
        sources: (R, …) one for every row.
        completion_ids: (R, T).
        completion_mask: (R, T).
        found: (R, T).
        temperature: what the logits were divided by.

    Raises:
        RuntimeError: log-probabilities differ.
    """
    for row in torch.arange(len(completion_ids), device=completion_ids.device).split(1):
        given = {name: value[row] for name, value in sources.items()}
        check_log_probs(model, given, completion_ids[row], completion_mask[row], found[row], temperature=temperature)
