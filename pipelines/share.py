"""Where what ships beside the package lies: recipes, launcher configurations, the problem set's pages."""

from __future__ import annotations

from pathlib import Path


def shared_folder(name: str) -> Path:
    """``recipes``, ``accelerate_configs`` or ``docs/problems``: beside the package in a checkout, inside it in an
    installed wheel."""
    package = Path(__file__).parent
    inside = package / "_share" / name
    return inside if inside.is_dir() else package.parent / name


SHIPPED = "genalign:"
"""How a source that ships with the package begins: ``genalign:t5-docstrings``."""
_ASSETS = Path(__file__).parent / "assets"


def shipped_names() -> list[str]:
    """What ships with the package: the folders of ``pipelines/assets``."""
    return sorted(path.name for path in _ASSETS.glob("*") if path.is_dir() and path.name != "__pycache__")


def shipped(source: str) -> str:
    """The folder that ``genalign:NAME`` means; anything else, and a name that nothing has, as it is."""
    name = source.removeprefix(SHIPPED)
    return str(_ASSETS / name) if source != name and name in shipped_names() else source
