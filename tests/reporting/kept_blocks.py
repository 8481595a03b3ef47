"""Documents with marks, and what stands between them."""

from __future__ import annotations

from pathlib import Path

from pipelines.reporting import readme


def document(folder: Path, *names: str) -> Path:
    path = folder / "page.md"
    blocks = [f"<!-- results:begin {name} -->\nold\n<!-- results:end {name} -->" for name in names]
    path.write_text("\n\n".join(["# Page", *blocks, "end\n"]) if names else f"{readme.BEGIN}\n{readme.END}\n")
    return path


def block(path: Path, name: str) -> str:
    return path.read_text().split(f"<!-- results:begin {name} -->")[1].split(f"<!-- results:end {name} -->")[0]


def cells(text: str, first: str) -> list[str]:
    """The cells of the table row that begins with a text."""
    (row,) = [line for line in text.splitlines() if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in row.strip("|").split("|")]
