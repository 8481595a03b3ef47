"""What a finished stage's folder holds, and which files of it make up the repository.

The kind is read off the files, not off the recipe's name: whatever ``from_pretrained`` or ``load_dataset`` would load.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipelines.config import looks_local
from pipelines.errors import UserError
from pipelines.reporting.metrics import read_json
from pipelines.stage import STAGE_FILE, write_json

Kind = Literal["seq2seq", "causal", "reward", "adapter", "tokenizer", "pipeline", "classifier", "dataset"]

CARD = "README.md"
PUSHED = ".hub.json"
"""Where a stage was pushed to: what an adapter trained on it names as its base."""

ADAPTER_FOLDER = "adapter"
IGNORED = (
    "checkpoints/*",
    "logs/*",
    "runs/*",
    "critic/*",
    "value_head.safetensors",
    f"{ADAPTER_FOLDER}/*",
    "samples/*",
    "stage.json",
    "training.json",
    "timing.json",
    "log_history.json",
    "predictions.jsonl",
    "samples.jsonl",
    "*events.out.tfevents.*",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.pkl",
    "nouns/*",
    ".*",
    "*/.*",
)
"""What stays at home: checkpoints, the critic, the runner's notes, logs, pickles, and texts of the evaluation set."""

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "spiece.model")
_SHARD = 500_000_000  # bytes of a data set in one Parquet file, as `datasets` has it
_REWARD = "encoder_decoder_reward"


@dataclass(frozen=True)
class Artifact:
    """What is pushed.

    Attributes:
        kind: of what is loaded from it.
        folder: whose files go to the top of the repository.
        stage: the stage's folder, where the card lies beside ``stage.json``.
        detail: the class that loads it, of a pipeline; ``model_type`` of a model; PEFT's type of an adapter.
        task: PEFT's task type, of an adapter.
    """

    kind: Kind
    folder: Path
    stage: Path
    detail: str = ""
    task: str = ""

    @property
    def repo_type(self) -> str:
        """Of the Hub."""
        return "dataset" if self.kind == "dataset" else "model"

    @property
    def card(self) -> Path:
        """Where its card is written."""
        return (self.folder if self.folder.name == ADAPTER_FOLDER else self.stage) / CARD


def artifact_of(stage: Path, adapter: bool = False) -> Artifact:
    """What the folder of a finished stage holds.

    Args:
        stage: the folder.
        adapter: take the LoRA adapter that was trained, not the model that it was merged into.

    Raises:
        UserError: it holds nothing that others could load, or no adapter.
    """
    if adapter:
        if not (stage / ADAPTER_FOLDER / "adapter_config.json").is_file() and not _trainings(stage):
            mend = "leave --adapter out, or train with lora_r=8"
            raise UserError("DIR/STAGE", stage, "holds no LoRA adapter of its own", mend)
        if (stage / ADAPTER_FOLDER).is_dir():
            return _adapter(stage / ADAPTER_FOLDER, stage)
    for folder in (stage, *_trainings(stage)[:1]):
        found = _found(folder, stage)
        if found is not None:
            return found
    mend = "push a stage that makes a model, adapter, tokenizer, pipeline of images or data set"
    raise UserError("DIR/STAGE", stage, "holds nothing that could be loaded from the Hub", mend)


def _trainings(stage: Path) -> list[Path]:
    """The folders of a stage that trains several times, the one on most examples from the first seed first."""
    results = stage / "results.json"
    content = read_json(results) if results.is_file() else None
    runs = content.get("runs", []) if isinstance(content, dict) else []
    from pipelines.prompting.soft import run_name

    folders = [stage / run_name(run["examples"], run["seed"]) for run in runs if {"examples", "seed"} <= set(run)]
    return [folder for folder in folders if folder.is_dir()]


def _found(folder: Path, stage: Path) -> Artifact | None:
    if (folder / "model_index.json").is_file():
        return Artifact("pipeline", folder, stage, str(_json(folder / "model_index.json").get("_class_name", "")))
    if (folder / "adapter_config.json").is_file():
        return _adapter(folder, stage)
    if (folder / "dataset_dict.json").is_file():
        return Artifact("dataset", folder, stage)
    if (folder / "config.json").is_file():
        config = _json(folder / "config.json")
        model_type = str(config.get("model_type", ""))
        if config.get("_class_name") == "ImageClassifier":
            return Artifact("classifier", folder, stage, "ImageClassifier")
        if model_type == _REWARD:
            return Artifact("reward", folder, stage, model_type)
        writes = any("CausalLM" in name or "LMHead" in name for name in config.get("architectures") or ())
        if config.get("is_encoder_decoder") or not writes:
            return Artifact("seq2seq", folder, stage, model_type)
        return Artifact("causal", folder, stage, model_type)
    if any((folder / name).is_file() for name in _TOKENIZER):
        return Artifact("tokenizer", folder, stage)
    return None


def _adapter(folder: Path, stage: Path) -> Artifact:
    config = _json(folder / "adapter_config.json")
    return Artifact("adapter", folder, stage, str(config.get("peft_type", "")), str(config.get("task_type", "")))


def _json(path: Path) -> dict[str, Any]:
    content = read_json(path)
    return content if isinstance(content, dict) else {}


def files_of(artifact: Artifact, base: str | None, work: Path) -> dict[str, Path | bytes]:
    """Path in the repository -> local file, or its content where that differs; without the card.

    Args:
        artifact: what is pushed.
        base: the base model on the Hub, of an adapter.
        work: an empty folder for files that are made on the way.

    Raises:
        UserError: a data set that cannot be read.
    """
    from huggingface_hub.utils import filter_repo_objects

    if artifact.kind == "dataset":
        return dict(_parquet(artifact.folder, work))
    found: dict[str, Path | bytes] = {}
    if artifact.kind == "adapter":
        # No tokenizer: PEFT would give the base model's embeddings the length of it.
        names = ["adapter_config.json", *(p.name for p in sorted(artifact.folder.glob("adapter_model*.safetensors")))]
        found = {name: artifact.folder / name for name in names}
    else:
        paths = [p for p in sorted(artifact.folder.rglob("*")) if p.is_file()]
        names = [path.relative_to(artifact.folder).as_posix() for path in paths]
        kept = filter_repo_objects(names, ignore_patterns=[*IGNORED, CARD])
        found = {name: artifact.folder / name for name in kept}
    for name, path in found.items():
        if name.endswith("config.json") or name == "model_index.json":
            found[name] = _without_paths(path, base if name == "adapter_config.json" else None)
    return found


def _without_paths(path: Path, base: str | None) -> Path | bytes:
    """A configuration without the places on this machine that some libraries write into it; with the base given."""
    content = _json(path)
    paths = {k: v for k, v in content.items() if k.endswith("name_or_path") and isinstance(v, str) and v}
    changed = {key: "" for key, value in paths.items() if _is_here(value)}
    if base is not None:
        changed["base_model_name_or_path"] = base
    if all(content.get(key) == value for key, value in changed.items()):
        return path
    return (json.dumps(content | changed, indent=2, ensure_ascii=False) + "\n").encode()


def _is_here(value: str) -> bool:
    return looks_local(value) or Path(value).expanduser().exists()


def configurations(folder: Path) -> dict[str, Path]:
    """Name -> folder of the data sets in one: the folder's own, and those beside its splits (``rankings``)."""
    found = {"default": folder}
    found |= {p.parent.name: p.parent for p in sorted(folder.glob("*/dataset_dict.json"))}
    return found


def splits_of(folder: Path) -> list[str]:
    """The names of a saved data set's splits."""
    return [str(name) for name in _json(folder / "dataset_dict.json").get("splits", [])]


def data_files(name: str, split: str) -> str:
    """Where the Parquet files of a split lie in the repository, without number and suffix."""
    return f"data/{split}" if name == "default" else f"{name}/{split}"


def _parquet(folder: Path, work: Path) -> Iterator[tuple[str, Path]]:
    """The splits as Parquet files: what `datasets` itself pushes, and what the Hub's viewer reads."""
    from datasets import load_from_disk

    for name, place in configurations(folder).items():
        try:
            splits = load_from_disk(str(place))
        except Exception as error:
            problem = f"its data set cannot be read ({type(error).__name__})"
            raise UserError("DIR/STAGE", place, problem, "run the stage again") from error
        for split, data in splits.items():
            count = max(1, math.ceil((data.data.nbytes or 0) / _SHARD))
            for number in range(count):
                path = f"{data_files(name, split)}-{number:05d}-of-{count:05d}.parquet"
                (work / path).parent.mkdir(parents=True, exist_ok=True)
                data.shard(count, number, contiguous=True).to_parquet(str(work / path))
                yield path, work / path


# --- where a stage came from, and went to ---


def finished(stage_dir: Path | str) -> tuple[Path, dict[str, Any]]:
    """A finished stage's folder and its ``stage.json``.

    Raises:
        UserError: it is none, or not finished.
    """
    folder = Path(stage_dir).expanduser()
    if not folder.is_dir():
        raise UserError("DIR/STAGE", str(folder), "no such folder", "give the folder of a finished stage")
    if not (folder / STAGE_FILE).is_file():
        raise UserError("DIR/STAGE", str(folder), "not a stage's folder (no stage.json)", "give runs/NAME/STAGE")
    record = read_json(folder / STAGE_FILE)
    if not isinstance(record, dict) or "stage" not in record:
        raise UserError("DIR/STAGE", str(folder), "its stage.json is damaged", "run the stage again")
    if record.get("state") != "finished":
        raise UserError("DIR/STAGE", str(folder), f"the stage is {record.get('state')}", "let it finish, then push it")
    return folder, record


def note_push(stage: Path, repo_id: str, artifact: Artifact, branch: str | None, commit: str) -> None:
    """Write where the stage is on the Hub."""
    write_json(
        stage / PUSHED, {"repo_id": repo_id, "kind": artifact.kind, "branch": branch or "main", "commit": commit}
    )


def pushed_to(stage: Path) -> dict[str, str] | None:
    """Where the stage was pushed to: ``repo_id``, ``kind``, ``branch`` and ``commit``; None where it was not."""
    note = _json(stage / PUSHED) if (stage / PUSHED).is_file() else {}
    return {str(k): str(v) for k, v in note.items()} if {"repo_id", "kind", "branch"} <= set(note) else None


def on_hub(value: str | None, run_dir: Path | None = None) -> str | None:
    """The Hub's name of a model: the name itself, or where the stage that lies in that folder was pushed to.

    Args:
        value: folder or hub id.
        run_dir: the folder of a run, where a stage is looked for that has moved with it.
    """
    if not value:
        return None
    places = [Path(value).expanduser(), *([run_dir / Path(value).name] if run_dir else [])]
    for place in places:
        note = pushed_to(place)
        # Of another branch than main the name alone would load something else.
        if note is not None and note["kind"] in ("seq2seq", "causal") and note["branch"] == "main":
            return note["repo_id"]
    return None if any(place.exists() for place in places) or looks_local(value) else value


def origin(folder: Path, record: Mapping[str, Any], *fields: str, pushed: bool = False) -> str | None:
    """What a stage's input is in the end: followed through the stages it came from, to a hub id, a set or a file.

    Args:
        folder: the stage's.
        record: its ``stage.json``.
        fields: names of the input, the first that a stage has is followed.
        pushed: stop at a stage that was pushed, and name its repository.
    """
    run_dir = folder.resolve().parent
    value = _first(record, fields)
    for _ in range(20):  # a chain is never that long; two folders that name each other would be endless
        if not isinstance(value, str) or not value:
            return None
        if pushed and _is_here(value) and (found := on_hub(value, run_dir)):
            return found
        for place in (Path(value).expanduser(), run_dir / Path(value).name):
            if (place / STAGE_FILE).is_file():
                value = _first(_json(place / STAGE_FILE), fields)
                break
        else:
            return value
    return None


def _first(record: Mapping[str, Any], fields: tuple[str, ...]) -> Any:
    config = record.get("config") or {}
    return next((config[name] for name in fields if config.get(name)), None)
