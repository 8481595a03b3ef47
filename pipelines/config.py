"""YAML -> typed dataclass -> ``key=value`` overrides; all mistakes are found before anything runs and shown at once.

A configuration is a pydantic dataclass, ``@config class SFTConfig(StageConfig)``. Its fields are ``pydantic.Field``,
each with a description, which ``--help`` prints. Combinations that cannot be are reported by ``problems()``.
"""

from __future__ import annotations

import dataclasses
import difflib
import glob
import os
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, dataclass_transform, get_args, get_origin

import yaml
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

from pipelines.errors import Problem, UserError
from pipelines.share import SHIPPED, shipped, shipped_names

T = TypeVar("T")


class _SourceMarker:
    """Marks a field that names an input; see ``Source``."""

    def __repr__(self) -> str:
        return "Source"


Source = Annotated[str, _SourceMarker(), AfterValidator(shipped)]
"""A field of this type names an input (stage folder, file, folder, hub id, or ``genalign:NAME`` for what ships with the
package): its content enters the fingerprint."""

INERT = {"inert": True}
"""``Field(..., json_schema_extra=INERT)``: the field cannot change the result, so it stays out of the fingerprint."""

DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt", ".yaml", ".yml")


@dataclass_transform(kw_only_default=True, field_specifiers=(Field,))
def config(cls: type[T]) -> type[T]:
    """Class decorator: a keyword-only pydantic dataclass that forbids unknown keys, infinities and NaN."""
    rules = ConfigDict(extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True)
    return pydantic_dataclass(cls, kw_only=True, config=rules)


@config
class StageConfig:
    """What every stage takes."""

    output_dir: str = Field("runs/stage", description="folder the stage writes into", json_schema_extra=INERT)
    seed: int = Field(0, ge=0, lt=2**32, description="seed of every random choice of the stage")

    def problems(self) -> list[Problem]:
        """Combinations of fields that cannot be. Subclasses add theirs to ``super().problems()``."""
        given = sources(self)
        empty = [name for name, value in {"output_dir": self.output_dir, **given}.items() if not value.strip()]
        found = [Problem(name, "", "is empty", "give a value, or leave the field out") for name in empty]
        for name, value in given.items():
            if value.startswith(SHIPPED):
                mend = nearest(value, [SHIPPED + known for known in shipped_names()])
                found.append(Problem(name, value, "nothing of that name ships with genalign", mend))
            elif looks_local(value) and not _exists(value):
                found.append(Problem(name, value, "no such file or folder", "mend the path"))
        return found

    def environment(self) -> dict[str, str]:
        """What outside the fields and the files they name decides the result (it enters the fingerprint)."""
        return {}


def glob_files(value: str) -> list[Path]:
    """The files that a pattern such as ``data/*.jsonl`` stands for, sorted; none where ``value`` is no pattern."""
    if not any(sign in value for sign in "*?["):
        return []
    return sorted(path for path in map(Path, glob.glob(os.path.expanduser(value))) if path.is_file())


def _exists(value: str) -> bool:
    try:
        return Path(value).expanduser().exists() or bool(glob_files(value))
    except (OSError, RuntimeError):  # too long, or the home of nobody
        return False


def looks_local(value: str) -> bool:
    """Whether ``value`` can only mean a path: a hub id is ``name`` or ``owner/name`` without a data file's suffix."""
    if value.startswith("${"):
        return False
    return value.startswith(("/", ".", "~")) or value.count("/") > 1 or value.lower().endswith(DATA_SUFFIXES)


def fields_of(cls: type) -> dict[str, Any]:
    """Name -> pydantic ``FieldInfo`` of a configuration class, in order of definition (base classes first)."""
    return dict(cls.__pydantic_fields__)


def _marked(annotation: Any) -> bool:
    if isinstance(annotation, _SourceMarker):
        return True
    return any(_marked(part) for part in get_args(annotation))


def sources(instance: Any) -> dict[str, str]:
    """Dotted name -> value of every input that the fields of type ``Source`` name (inside lists and dicts too)."""

    def leaves(name: str, value: Any) -> Iterator[tuple[str, str]]:
        if isinstance(value, str):
            yield name, value
        elif isinstance(value, dict):
            for key, item in value.items():
                yield from leaves(f"{name}.{key}", item)
        elif isinstance(value, (list, tuple)):
            for index, item in enumerate(value):
                yield from leaves(f"{name}.{index}", item)

    found: dict[str, str] = {}
    for name, info in fields_of(type(instance)).items():
        value = getattr(instance, name)
        if isinstance(value, list) and value and all(map(dataclasses.is_dataclass, value)):
            for index, item in enumerate(value):
                found.update({f"{name}.{index}.{key}": source for key, source in sources(item).items()})
        elif _marked(info.annotation) or any(isinstance(m, _SourceMarker) for m in info.metadata):
            found.update(leaves(name, value))
    return found


def nearest(word: str, words: Iterator[str] | list[str]) -> str:
    """``"; did you mean 'x'?"`` for the nearest of ``words``, or the whole list where none is near."""
    words = list(words)
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"the keys are: {', '.join(words)}"


def type_name(annotation: Any) -> str:
    """A readable name of a type: ``int``, ``str or null``, ``one of 'a', 'b'``, ``list of str``."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_name(args[0])
    if origin in (Union, types.UnionType):
        return " or ".join(type_name(a) for a in args)
    if origin is typing.Literal:
        return "one of " + ", ".join(repr(a) for a in args)
    if origin is list:
        return f"list of {type_name(args[0])}"
    if origin is dict:
        return f"mapping of {type_name(args[0])} to {type_name(args[1])}"
    if annotation is type(None):
        return "null"
    return getattr(annotation, "__name__", str(annotation))


def _takes_text_only(annotation: Any) -> bool:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _takes_text_only(args[0])
    if origin in (Union, types.UnionType):
        return all(a is type(None) or _takes_text_only(a) for a in args)
    if origin is typing.Literal:
        return all(isinstance(a, str) for a in args)
    return annotation is str


def _takes_null(annotation: Any) -> bool:
    if get_origin(annotation) is Annotated:
        return _takes_null(get_args(annotation)[0])
    return annotation is type(None) or (
        get_origin(annotation) in (Union, types.UnionType) and type(None) in get_args(annotation)
    )


def split_overrides(items: list[str]) -> list[tuple[str, str]]:
    """``["a=1", "b.c=x"]`` -> ``[("a", "1"), ("b.c", "x")]``.

    Raises:
        UserError: one line for every item without ``=`` or without a key.
    """
    pairs, problems = [], []
    for item in items:
        key, sign, value = item.partition("=")
        if not sign or not key.strip():
            problems.append(Problem("override", item, "not of the form key=value", "write it as key=value"))
        pairs.append((key.strip(), value))
    if problems:
        raise UserError.of(problems)
    return pairs


def override(cls: type, values: dict[str, Any], key: str, text: str) -> None:
    """Set ``values[key]`` from the command line: as it stands for a text field, read as YAML for the others."""
    name, _, inner = key.partition(".")
    info = fields_of(cls).get(name)
    if inner:
        table = values.setdefault(name, {})
        if isinstance(table, dict):
            table[inner] = text
        else:
            values[key] = text  # there is no such key, which validation will say
        return
    if info is not None and _takes_text_only(info.annotation):
        values[name] = None if text in ("null", "none", "None") and _takes_null(info.annotation) else text
        return
    try:
        values[name] = yaml.safe_load(text) if text else text
    except yaml.YAMLError:
        values[name] = text


def _explain(error: dict[str, Any], cls: type, where: str) -> Problem:
    name = str(error["loc"][0]) if error["loc"] else ""
    info = fields_of(cls)[name]
    dotted = ".".join(str(part) for part in error["loc"] if not str(part).startswith(("function-", "constrained-")))
    if error["type"] == "missing":
        return Problem(where + name, "", "a value is needed", f"give {where}{name}=… ({info.description})")
    wanted = type_name(info.annotation)
    default = "" if info.is_required() else f", such as {info.get_default(call_default_factory=True)!r}"
    message = error["msg"][0].lower() + error["msg"][1:]
    # Inside a union pydantic reports each branch; the field's own name is what the user can act on.
    shown = where + (name if get_origin(info.annotation) in (Union, types.UnionType) else dotted)
    return Problem(shown, error["input"], message, f"give {wanted}{default}")


def validate(cls: type[T], values: dict[str, Any], where: str = "") -> T:
    """The configuration of class ``cls`` made from plain ``values``.

    Args:
        cls: a class made by ``@config``.
        values: field name -> value, as read from YAML and the command line.
        where: put before every field's name in messages (``"sft."``).

    Raises:
        UserError: with one line for every unknown key, wrong type, value out of range and impossible combination.
    """
    known = fields_of(cls)
    problems = [
        Problem(where + key, values[key], "unknown key", nearest(key, list(known)))
        for key in values
        if key not in known
    ]
    kept = {key: value for key, value in values.items() if key in known}
    adapter = TypeAdapter(cls)
    bad: dict[str, None] = {}
    try:
        return _checked(adapter.validate_python(kept), problems, bad, where)
    except ValidationError as error:
        for item in error.errors():
            name = str(item["loc"][0])
            if name not in bad:
                problems.append(_explain(item, cls, where))
            bad[name] = None
    kept = {key: value for key, value in kept.items() if key not in bad}
    try:
        # The sound fields are checked against one another even when others are wrong, so that all shows at once.
        rest = adapter.validate_python(kept)
    except ValidationError:
        raise UserError.of(problems) from None
    return _checked(rest, problems, bad, where)


def _checked(instance: T, problems: list[Problem], bad: dict[str, None], where: str) -> T:
    for p in instance.problems():
        if p.what.split(".")[0] not in bad:
            problems.append(dataclasses.replace(p, what=where + p.what))
    if problems:
        raise UserError.of(problems)
    return instance


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice (PyYAML silently keeps the last)."""


def _mapping_without_repeats(loader: _StrictLoader, node: yaml.MappingNode) -> dict:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if isinstance(key, (str, int)) and key in seen:
            raise yaml.MarkedYAMLError(problem=f"the key {key!r} stands twice", problem_mark=key_node.start_mark)
        if isinstance(key, (str, int)):
            seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_repeats)


def read_yaml(path: str | Path, what: str = "config") -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        UserError: missing, a folder, unreadable, not UTF-8, not YAML (with the line), or not a mapping.
    """
    path = Path(path).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(what, path, "no such file", "mend the path") from None
    except IsADirectoryError:
        raise UserError(what, path, "is a folder", "give the YAML file in it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(what, path, f"cannot be read ({error})", "give a readable UTF-8 YAML file") from None
    try:
        loaded = yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error)
        raise UserError(what, f"{path}{line}", f"not valid YAML ({reason})", "mend that line") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise UserError(what, path, f"holds a {type(loaded).__name__}, not keys and values", "write key: value lines")
    return {str(key): value for key, value in loaded.items()}


def as_plain(instance: Any) -> dict[str, Any]:
    """The fields as plain YAML/JSON values."""
    return dataclasses.asdict(instance)


def config_class(function: Callable) -> type:
    """The configuration class a stage function takes, read from the annotation of its only parameter."""
    hints = typing.get_type_hints(function)
    hints.pop("return", None)
    (cls,) = hints.values()
    return cls


def describe(cls: type) -> str:
    """The ``--help`` table: every field with its type, default and meaning."""
    import textwrap

    lines = []
    for name, info in fields_of(cls).items():
        default = "needed" if info.is_required() else repr(info.get_default(call_default_factory=True))
        lines.append(f"  {name}  ({type_name(info.annotation)}; default {default})".replace("default needed", "needed"))
        lines.extend(textwrap.wrap(info.description or "", 96, initial_indent="      ", subsequent_indent="      "))
    return "\n".join(lines)
