"""``samples.jsonl``: some of the completions that a policy was trained on, rollout by rollout, for people to read."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SAMPLES_FILE = "samples.jsonl"
LONGEST_DOCUMENT = 400
"""Characters of a document that a line keeps."""


class SampleTable:
    """A JSON line a completion: rollout, id, document (its beginning), text, reward, gold where there is a judge, kl.

    Args:
        file: where the lines go; None keeps none.
        writes: whether this is the process that writes.
    """

    def __init__(self, file: str | Path | None, *, writes: bool = True):
        self.file = Path(file) if file is not None and writes else None

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Append the lines of a rollout."""
        if self.file is None:
            return
        with self.file.open("a", encoding="utf-8") as file:
            for row in rows:
                text = row["document"]
                short = text if len(text) <= LONGEST_DOCUMENT else text[: LONGEST_DOCUMENT - 1] + "…"
                file.write(json.dumps(row | {"document": short}, ensure_ascii=False) + "\n")

    def rewind(self, rollout: int) -> None:
        """Take out what rollout ``rollout`` and later ones wrote: a resumed run samples them again."""
        if self.file is None or not self.file.exists():
            return
        # The last line may have been cut by the kill.
        lines = [line for line in self.file.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
        temporary = self.file.with_name(f".{self.file.name}.tmp")
        temporary.write_bytes(b"".join(line for line in lines if json.loads(line)["rollout"] < rollout))
        os.replace(temporary, self.file)
