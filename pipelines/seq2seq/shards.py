"""Long work on many rows, done in shards: each is written once whole, so a killed run redoes at most one of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipelines.stage import CHECKPOINTS, write_json


def run_shards(
    output_dir: str,
    name: str,
    rows: Sequence[Any],
    work: Callable[[Sequence[Any], str], list[Any]],
    *,
    size: int,
) -> list[Any]:
    """``work`` applied to all rows, ``size`` at a time, the shards shared out among the processes.

    A shard's result is kept as JSON under ``output_dir/checkpoints`` until the stage is finished. What is returned has
    been through JSON whether it was made now or before.

    Args:
        output_dir: the stage's folder, on a disk that all processes see.
        name: of the work; two works of one stage need two names.
        rows: what is worked on, the same in every process.
        work: (rows of one shard, a text that says which shard it is) -> one JSON value for each row. Its result may
            depend on the shard's rows but not on other shards.
        size: rows in a shard.

    Returns:
        One value for each row, in order, in every process.

    Raises:
        ValueError: if ``work`` returns another number of values than it got rows.
    """
    from accelerate import PartialState

    state = PartialState()
    folder = Path(output_dir) / CHECKPOINTS / name
    starts = range(0, len(rows), size)
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
    state.wait_for_everyone()
    for number, start in enumerate(starts):
        file = folder / f"{number:06d}.json"
        if number % state.num_processes != state.process_index or file.exists():
            continue
        shard = rows[start : start + size]
        made = work(shard, f"{name} {number + 1}/{len(starts)}")
        if len(made) != len(shard):
            raise ValueError(f"{name}: {len(made)} values for {len(shard)} rows")
        write_json(file, made)
    state.wait_for_everyone()
    return [
        value
        for number in range(len(starts))
        for value in json.loads((folder / f"{number:06d}.json").read_text(encoding="utf-8"))
    ]
