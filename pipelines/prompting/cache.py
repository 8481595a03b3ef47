"""Answers of endpoints, kept on disk: what was asked once is not asked (or paid for) again."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any

_FORMAT = 1


def request_key(request: dict[str, Any]) -> str:
    """A digest of everything that decides an answer.

    Args:
        request: the endpoint's address, the kind of its API, the whole body that is sent (model, prompt, parameters,
            seed) and the number of the sample; plain JSON values, and no key.
    """
    text = json.dumps([_FORMAT, request], sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


class ResponseCache:
    """A folder of answers, one file each, written under a temporary name and renamed: whole or not there.

    Several processes may share it. A file that cannot be read counts as not there, and is written anew.

    Args:
        folder: where; created with the first answer.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder).expanduser()

    def _file(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"

    def get(self, request: dict[str, Any]) -> dict[str, Any] | None:
        """The answer to a request, or None."""
        try:
            found = json.loads(self._file(request_key(request)).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found["answer"] if isinstance(found, dict) and isinstance(found.get("answer"), dict) else None

    def put(self, request: dict[str, Any], answer: dict[str, Any]) -> None:
        """Keep the answer to a request."""
        file = self._file(request_key(request))
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}.{os.getpid()}.{threading.get_ident()}.tmp")
        text = json.dumps({"request": request, "answer": answer}, ensure_ascii=False, allow_nan=False)
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)
