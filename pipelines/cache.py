"""Where genalign keeps what can be made again: extracted corpora, measured precision."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(*parts: str) -> Path:
    """``$GENALIGN_CACHE`` (default ``~/.cache/genalign``) and the given folders below it, created if missing."""
    root = os.environ.get("GENALIGN_CACHE") or "~/.cache/genalign"
    folder = Path(root).expanduser().joinpath(*parts)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
