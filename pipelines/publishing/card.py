"""A stage's card: what was made, from what, how, how well, what it is not good for, and how it is loaded.

The YAML header is made and read back by ``huggingface_hub``'s own classes, so that the Hub takes it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.errors import UserError
from pipelines.publishing.artifacts import (
    Artifact,
    artifact_of,
    configurations,
    data_files,
    finished,
    on_hub,
    origin,
    splits_of,
)
from pipelines.publishing.fields import PublishFields
from pipelines.reporting.metrics import HIGH, estimate, format_mean, is_interval_key, measure_of, read_json, write_text
from pipelines.reporting.tables import README_MEASURES, Table, mapping_table, markdown_table, results_table

if TYPE_CHECKING:
    from huggingface_hub import CardData

LICENCE = "apache-2.0"
"""Of a model that was trained from scratch, where the user says nothing."""

EMBEDDED = {"pydocs": "en", "site_packages": "en"}
"""The sets whose language is known here."""

_TEMPLATE = Path(__file__).with_name("card.md.j2")
_DATA = ("dataset", "preferences", "preferences_file", "rankings", "text")
_HOUSEKEEPING = ("output_dir", "report_to", "push_adapter", *PublishFields.__dataclass_fields__)
_WHAT = {
    "sft": ("an encoder-decoder fine-tuned on summarization", ("sft",)),
    "pretrain": ("an encoder-decoder pretrained by span corruption", ("pretraining",)),
    "ppo": ("a summarizer aligned with PPO against a learned reward model", ("ppo", "rlhf")),
    "dpo": ("a summarizer aligned with DPO on pairs of its own samples", ("dpo", "rlhf")),
    "listwise": ("a summarizer aligned with listwise DPO on ranked samples", ("dpo", "listwise", "rlhf")),
    "grpo": ("a summarizer aligned with GRPO", ("grpo", "rlhf")),
    "rloo": ("a summarizer aligned with RLOO", ("rloo", "rlhf")),
    "corpus": ("documents with summaries", ()),
    "preferences": ("pairs of summaries, one preferred to the other", ("preferences", "dpo", "reward-model")),
    "ddpm": ("a denoising diffusion model of images", ("ddpm",)),
    "bitflip": ("a diffusion model of binary images, by bit flips", ("bit-flip-diffusion",)),
    "vae": ("a variational autoencoder of images", ("vae",)),
    "gan": ("a generative adversarial network of images", ("gan",)),
    "word_model": ("a small language model of single words, by characters", ("toy-model",)),
}
_KINDS = {
    "seq2seq": ("an encoder-decoder", "summarization", ("transformers",)),
    "causal": ("a causal language model", "text-generation", ("transformers",)),
    "reward": ("a reward model that scores summaries (Bradley-Terry)", "text-classification", ("reward-model", "rlhf")),
    "adapter": ("a PEFT adapter", "summarization", ("peft",)),
    "tokenizer": ("a Unigram tokenizer with T5's conventions", None, ("transformers", "tokenizer")),
    "pipeline": ("a generative model of images", "unconditional-image-generation", ()),
    "classifier": ("a classifier of small images", "image-classification", ()),
    "dataset": ("a data set", "summarization", ()),
}
"""Kind -> what it is, the Hub's task, and tags. Libraries: only those that load it as it is; the Hub shows them."""


def write_card(
    stage_dir: Path | str,
    repo_id: str | None = None,
    *,
    branch: str | None = None,
    licence: str | None = None,
    adapter: bool = False,
    base_model: str | None = None,
) -> Path:
    """Writes ``README.md``, the card, into a finished stage's folder and returns its path.

    It holds the use of what was made, its metrics with intervals (those of the whole run where the folder lies in one),
    its limits and the stage's settings. Local paths are shown by their last part only.

    Args:
        stage_dir: folder with ``stage.json``.
        repo_id: where it is to lie on the Hub.
        branch: the branch, where it is not main.
        licence: by the Hub's name; None for the stage's own field, or what can be concluded.
        adapter: the card of the stage's LoRA adapter, into that one's folder.
        base_model: the base model on the Hub, where the stage does not know it.

    Raises:
        UserError: if it is no finished stage's folder, holds nothing to load, or cannot be written.
    """
    folder, record = finished(stage_dir)
    artifact = artifact_of(folder, adapter)
    text = card_of(artifact, record, repo_id, branch=branch, licence=licence, base_model=base_model)
    try:
        write_text(artifact.card, text)
    except OSError as error:
        problem = f"the card cannot be written ({error.strerror})"
        raise UserError("DIR/STAGE", str(folder), problem, "check the rights of the folder, and the disk") from None
    return artifact.card


def base_of(artifact: Artifact, record: Mapping[str, Any]) -> str | None:
    """The base model on the Hub: of an adapter the model whose weights it changes, else what all began with."""
    run_dir = artifact.stage.resolve().parent
    if artifact.kind == "adapter":
        path = artifact.folder / "adapter_config.json"
        content = read_json(path)
        written = content.get("base_model_name_or_path") if isinstance(content, dict) else None
        return on_hub(written, run_dir) or on_hub((record.get("config") or {}).get("model"), run_dir)
    if artifact.kind in ("tokenizer", "dataset", "pipeline", "classifier"):
        return None
    found = origin(artifact.stage, record, "model", pushed=True)
    return on_hub(found, run_dir)


def card_of(
    artifact: Artifact,
    record: Mapping[str, Any],
    repo_id: str | None = None,
    *,
    branch: str | None = None,
    licence: str | None = None,
    base_model: str | None = None,
) -> str:
    """The text of the card; arguments as those of ``write_card``."""
    import jinja2
    from huggingface_hub import DatasetCard, ModelCard

    title = repo_id.split("/")[-1] if repo_id else artifact.stage.resolve().name
    config = {k: _without_path(v) for k, v in (record.get("config") or {}).items() if k not in _HOUSEKEEPING}
    metrics = _metrics(artifact.stage, record)
    base = base_model or base_of(artifact, record)
    dataset = origin(artifact.stage, record, *_DATA)
    licence = licence or (record.get("config") or {}).get("licence")
    scratch = (
        artifact.kind != "dataset"
        and base is None
        and not (artifact.kind == "adapter" or _from_unknown(artifact, record))
    )
    licence = licence or (LICENCE if scratch else None)
    task = _task(artifact, record)
    data = _header(artifact, record, metrics, title, task=task, base=base, licence=licence, dataset=dataset)
    keys = [k for k in sorted(record.get("metrics") or {}) if not is_interval_key(k)]
    own = Table(["Metric", "Value (95 % interval)"], [[k, format_mean(record["metrics"], k)] for k in keys])
    wanted = artifact.kind in ("seq2seq", "reward") or (artifact.kind == "adapter" and task == "summarization")
    table = results_table(metrics, measures=README_MEASURES) if wanted else None
    what = _WHAT.get(_kind(record), _KINDS[artifact.kind])[0]
    if artifact.kind == "adapter":
        what = f"a PEFT adapter ({artifact.detail.lower().replace('_', ' ')})"
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)  # not escaped for HTML
    body = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        kind=artifact.kind,
        title=title,
        repo_id=repo_id or f"owner/{title}",
        branch=None if branch in (None, "main") else branch,
        what=what,
        base=base or ("owner/base-model" if artifact.kind == "adapter" else None),
        licence=licence,
        recipe=record.get("recipe") or record["stage"],
        dataset=_without_path(dataset),
        task=task,
        seed=record.get("seed"),
        own_metrics=markdown_table(own) if keys else "",
        results=markdown_table(table) if table else "",
        config=markdown_table(mapping_table(config, "Field", "Value")),
        versions=", ".join(f"{k} {v}" for k, v in sorted((record.get("versions") or {}).items())),
        prefix=config.get("prefix") or "",
        prompt=_prompt(artifact, record),
        max_source=config.get("max_source_length") or 512,
        max_target=config.get("max_target_length") or config.get("max_new_tokens") or 128,
        **_loading(artifact),
        trainings=_trainings(artifact),
        sample_picture=(artifact.folder / "samples.png").is_file() and artifact.kind == "pipeline",
        copies=any(key.endswith("/copies") for key in metrics),
    )
    card = (DatasetCard if artifact.kind == "dataset" else ModelCard)(f"---\n{data.to_yaml()}\n---\n\n{body}")
    return str(card).rstrip("\n") + "\n"


def _header(
    artifact: Artifact,
    record: Mapping[str, Any],
    metrics: Mapping[str, float],
    title: str,
    *,
    task: str | None,
    base: str | None,
    licence: str | None,
    dataset: str | None,
) -> CardData:
    from huggingface_hub import DatasetCardData, ModelCardData

    tags = ["genalign", *_KINDS[artifact.kind][2], *_WHAT.get(_kind(record), ("", ()))[1]]
    # A name with a slash is a Hub id; everything else has no page there that the card could link to.
    linked = dataset if dataset and not _is_path(dataset) and dataset.count("/") == 1 else None
    language = EMBEDDED.get(dataset or "") if task in ("summarization", "text-classification", None) else None
    if artifact.kind == "dataset":
        folders = configurations(artifact.folder)
        files = [
            {
                "config_name": name,
                "data_files": [{"split": s, "path": f"{data_files(name, s)}-*"} for s in splits_of(folder)],
            }
            | ({"default": True} if name == "default" else {})
            for name, folder in folders.items()
        ]
        return DatasetCardData(
            language=[language] if language else None,
            license=licence,
            task_categories=[task] if task else None,
            source_datasets=[linked] if linked else None,
            pretty_name=title,
            tags=tags,
            configs=files,
        )
    if artifact.kind == "pipeline" and artifact.detail == "DDPMPipeline":
        tags.insert(1, "diffusers")  # its own class; the others' are of this package
    if artifact.kind == "adapter":
        tags.append(artifact.detail.lower().replace("_", "-"))
    elif artifact.kind in ("seq2seq", "causal"):
        tags.append(artifact.detail)
    results = _eval_results(artifact, record, metrics, str(_without_path(dataset) or "held-out data"), task)
    relation = {"adapter": "adapter"}.get(artifact.kind, "finetune") if base else None
    return ModelCardData(
        library_name="genalign",
        license=licence,
        language=language,
        tags=[tag for tag in tags if tag],
        base_model=base,
        base_model_relation=relation,
        datasets=[linked] if linked else None,
        pipeline_tag=task,
        model_name=title if results else None,
        eval_results=results or None,
    )


def _eval_results(
    artifact: Artifact, record: Mapping[str, Any], metrics: Mapping[str, float], dataset: str, task: str | None
) -> list[Any]:
    """What was measured with an interval for this very stage, for the card's ``model-index``."""
    from huggingface_hub import EvalResult

    name = artifact.stage.resolve().name
    system = name if any(key.startswith(f"{name}/") for key in metrics) else _kind(record)
    split = str((record.get("config") or {}).get("split") or "test")
    results = []
    for key in metrics:
        found = estimate(metrics, key)
        # the best known measures first, the others by name
        if not key.startswith(f"{system}/") or key + HIGH not in metrics or found is None or found.low is None:
            continue
        measure = key.removeprefix(f"{system}/")
        low, high = round(found.low, 4), round(found.high, 4)
        results.append(
            EvalResult(
                task_type=task or "feature-extraction",
                dataset_type=dataset,
                dataset_name=dataset,
                dataset_split=split,
                metric_type=measure.lower(),
                metric_name=f"{measure_of(key).label} {format_mean(metrics, key)}, 95 % bootstrap interval",
                metric_args={"confidence_level": 0.95, "low": low, "high": high},
                metric_value=round(found.value, 4),
            )
        )
    order = {"rouge1": 0, "rouge2": 1, "rougel": 2, "rougelsum": 3, "gold_win_rate": 4, "accuracy": 5, "kl": 6}
    return sorted(results, key=lambda r: (order.get(r.metric_type, len(order)), r.metric_type))


def _task(artifact: Artifact, record: Mapping[str, Any]) -> str | None:
    """The Hub's task."""
    named = (record.get("config") or {}).get("task")
    if artifact.kind in ("adapter", "seq2seq", "causal") and named in ("words", "multiple_choice"):
        return "text-generation"
    if artifact.kind in ("seq2seq", "dataset") and _kind(record) in ("pretrain", "text"):
        return None if artifact.kind == "seq2seq" else "text-generation"
    return _KINDS[artifact.kind][1]


def _from_unknown(artifact: Artifact, record: Mapping[str, Any]) -> bool:
    """Whether it began with a model that has no page on the Hub."""
    return artifact.kind != "tokenizer" and origin(artifact.stage, record, "model") is not None


def _loading(artifact: Artifact) -> dict[str, Any]:
    """Classes, shapes and splits that the usage names."""
    found: dict[str, Any] = {"auto_class": "", "pipeline": "", "module": "", "channels": 1, "side": 8, "steps": None}
    found |= {"splits": [], "configurations": [], "columns": ""}
    if artifact.kind == "adapter":
        found["auto_class"] = {"SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM"}.get(
            artifact.task, "AutoPeftModelForCausalLM"
        )
    elif artifact.kind == "pipeline":
        from pipelines.images.saved import PIPELINES

        found |= {"pipeline": artifact.detail, "module": PIPELINES.get(artifact.detail, ("", "diffusers"))[1]}
        schedule = artifact.folder / "scheduler" / "scheduler_config.json"
        if artifact.detail.endswith("DDPMPipeline") and schedule.is_file():
            content = read_json(schedule)  # diffusers' own default may be more than the scheduler has
            found["steps"] = content.get("num_train_timesteps") if isinstance(content, dict) else None
    elif artifact.kind == "classifier":
        config = read_json(artifact.folder / "config.json")
        if isinstance(config, dict):
            found |= {
                name: config[given]
                for name, given in (("channels", "channels"), ("side", "sample_size"))
                if given in config
            }
    elif artifact.kind == "dataset":
        folders = configurations(artifact.folder)
        found |= {"splits": splits_of(artifact.folder), "configurations": list(folders)}
        found["columns"] = markdown_table(_columns(folders))
    return found


def _columns(folders: Mapping[str, Path]) -> Table:
    rows = []
    for name, folder in folders.items():
        splits = splits_of(folder)
        info = read_json(folder / splits[0] / "dataset_info.json") if splits else {}
        features = info.get("features", {}) if isinstance(info, dict) else {}
        rows.append([name, ", ".join(splits), ", ".join(features)])
    return Table(["Configuration", "Splits", "Columns"], rows, numeric=False)


def _trainings(artifact: Artifact) -> int:
    """How many trainings the stage did of which one is pushed."""
    path = artifact.stage / "results.json"
    if artifact.folder == artifact.stage or not path.is_file():
        return 1
    content = read_json(path)
    return len(content.get("runs", [])) if isinstance(content, dict) else 1


def _prompt(artifact: Artifact, record: Mapping[str, Any]) -> str:
    """Something to be completed, written as the model was trained to read it."""
    config = record.get("config") or {}
    if artifact.kind in ("adapter", "causal", "seq2seq") and "strategy" in config:
        from pipelines.prompting.soft import soft
        from pipelines.prompting.strategies import render
        from pipelines.prompting.tasks import Choice, Example

        texts = {"words": "apple", "multiple_choice": "Where do fish live?"}
        choices = (Choice("A", "in water"), Choice("B", "in trees")) if config.get("task") == "multiple_choice" else ()
        example = Example(
            "", texts.get(str(config.get("task")), "The text that is to be put into one line."), "A", choices
        )
        from pipelines.config import config_class

        known = {k: v for k, v in config.items() if k in config_class(soft).__pydantic_fields__}
        return render(config_class(soft)(**known).written(), example, []).text
    return str(config.get("prefix") or "") + "The text that is to be put into one line."


def _kind(record: Mapping[str, Any]) -> str:
    return str(record.get("recipe") or record["stage"]).replace(".", "/").split("/")[-1]


def _is_path(value: object) -> bool:
    return isinstance(value, str) and (value.startswith(("/", "~", ".")) or Path(value).expanduser().exists())


def _without_path(value: Any) -> Any:
    """A local path by its last part: where a file lay on one's machine is nobody's business."""
    if isinstance(value, dict):
        return {k: _without_path(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_path(v) for v in value]
    return Path(value).name if _is_path(value) and value else value


def _metrics(folder: Path, record: Mapping[str, Any]) -> dict[str, float]:
    """The run's metrics where the folder lies in one, with the stage's own."""
    found: dict[str, float] = {}
    path = folder.resolve().parent / "metrics.json"
    if path.is_file() and (path.parent / "run.json").is_file():
        content = read_json(path)
        found |= content if isinstance(content, dict) else {}
    return found | (record.get("metrics") or {})
