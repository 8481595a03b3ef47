"""In a process of its own: executes the usage on every card of a Hub, and writes what each repository's content gives.

python tests/publishing/reload.py OUTPUT.json, with HF_ENDPOINT set; the repositories are ada/KIND
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def usage(card: str) -> str:
    """The Python code of a card."""
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    return code


def main(target: str, kinds: list[str]) -> None:
    from huggingface_hub import hf_hub_download

    from tests.publishing.made import output_of

    found = {}
    for kind in kinds:
        repo_type = "dataset" if kind == "pairs" else "model"
        card = Path(hf_hub_download(f"ada/{kind}", "README.md", repo_type=repo_type)).read_text(encoding="utf-8")
        print(f"--- {kind}", flush=True)
        exec(compile(usage(card), f"{kind}/README.md", "exec"), {})
        tokenizer = {"dpo-lora": "ada/sft", "prompt": "ada/word-model"}.get(kind)
        found[kind] = output_of(kind, f"ada/{kind}", tokenizer)
    Path(target).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
