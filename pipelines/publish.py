"""A stage's model card, and its way to the Hugging Face Hub.

The card is written into the stage's folder first; whatever then goes wrong on the way, it stays there. Endpoint and
token are those of ``huggingface_hub``: ``HF_ENDPOINT``, and ``HF_TOKEN`` or what ``hf auth login`` has stored.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipelines.errors import UserError
from pipelines.reporting.metrics import estimate, format_mean, is_interval_key, measure_of, read_json, write_text
from pipelines.reporting.tables import README_MEASURES, Table, mapping_table, markdown_table, results_table

CARD = "README.md"
IGNORED = (
    "checkpoints/*",
    "stage.json",
    "log_history.json",
    "predictions.jsonl",
    "samples.jsonl",
    "*events.out.tfevents.*",
    ".*",
    "*/.*",
)
"""What stays at home: checkpoints, the runner's notes, logs, and texts of the evaluation set."""

TEMPLATE = Path(__file__).parent / "reporting" / "templates" / "card.md.j2"
LICENCE = "apache-2.0"

_WHAT = {
    "sft": ("fine-tuned on summarization", "text", ["sft", "summarization"]),
    "reward": ("a reward model that scores summaries (Bradley-Terry)", "score", ["reward-model"]),
    "ppo": ("aligned with PPO against a learned reward model", "text", ["ppo", "rlhf", "summarization"]),
    "dpo": ("aligned with DPO on pairs of its own samples", "text", ["dpo", "rlhf", "summarization"]),
    "tokenizer": ("a Unigram tokenizer with T5's conventions", "tokenizer", ["tokenizer"]),
    "corpus": ("a summarization corpus", "data", ["summarization"]),
    "preferences": ("pairs of summaries, ranked", "data", ["preferences"]),
}


def write_card(stage_dir: Path | str) -> Path:
    """Writes ``README.md``, the model card, into a finished stage's folder and returns its path.

    It holds the stage's settings, its metrics with intervals (those of the whole run where the folder lies in one), the
    use of the model and its limits. Local paths are shown by their last part only.

    Args:
        stage_dir: folder with ``stage.json``.

    Raises:
        UserError: if it is no finished stage's folder, or cannot be written.
    """
    folder, record = _finished(stage_dir)
    path = folder / CARD
    try:
        write_text(path, _card(folder, record))
    except OSError as error:
        problem = f"the model card cannot be written ({error.strerror})"
        raise UserError("DIR/STAGE", str(folder), problem, "check the rights of the folder, and the disk") from None
    return path


def check_repo_id(repo_id: str) -> None:
    """Refuse what cannot be a repository's name.

    Raises:
        UserError: if it is not ``owner/name`` as the Hub takes it.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        mend = "give owner/name, of letters, digits, -, _ and ."
        raise UserError("repo_id", repo_id, "not a valid name", mend) from None


def push(
    stage_dir: Path | str,
    repo_id: str,
    private: bool = False,
    token: str | None = None,
    endpoint: str | None = None,
) -> str:
    """Writes the model card, creates the repository where there is none, and uploads the stage's folder.

    Args:
        stage_dir: folder of a finished stage.
        repo_id: ``owner/name``.
        private: whether a repository that is created is private.
        token: a token with the right to write; None for the one that ``huggingface_hub`` has stored.
        endpoint: address of the Hub; None for the one that ``huggingface_hub`` is set to.

    Returns:
        The address of the commit.

    Raises:
        UserError: if the folder is no finished stage's, the name is not valid, there is no token or no network, or the
            Hub refuses. The message never holds the token; the card is in the folder all the same.
    """
    folder, record = _finished(stage_dir)
    check_repo_id(repo_id)
    write_card(stage_dir)
    from huggingface_hub import HfApi, constants, get_token

    if constants.is_offline_mode():
        problem = f"offline mode is on; {_kept(folder)}"
        raise UserError("repo_id", repo_id, problem, "unset HF_HUB_OFFLINE and push again")
    token = (token or get_token() or "").strip()
    if not token:
        mend = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"
        raise UserError("repo_id", repo_id, f"there is no token to push with; {_kept(folder)}", mend)
    if not re.fullmatch(r"[!-~]+", token):
        # The client would quote such a token in its own error.
        problem = f"the token holds a blank, a line end or a letter beyond ASCII; {_kept(folder)}"
        raise UserError("repo_id", repo_id, problem, "copy it again, as one word")
    with _one_line_errors(repo_id, folder, token):
        # The user agent would otherwise name the installed packages and the tool that calls.
        constants.HF_HUB_DISABLE_TELEMETRY = True
        api = HfApi(endpoint=endpoint, token=token, library_name="genalign")
        kind = "dataset" if _what(record)[1] == "data" else "model"
        created = api.create_repo(repo_id, private=private or None, repo_type=kind, exist_ok=True)
        commit = api.upload_folder(
            repo_id=created.repo_id,
            folder_path=folder,
            repo_type=kind,
            commit_message=f"Upload {record.get('recipe') or record['stage']} made with genalign",
            ignore_patterns=list(IGNORED),
        )
    return str(commit.commit_url)


def _finished(stage_dir: Path | str) -> tuple[Path, dict[str, Any]]:
    folder = Path(stage_dir).expanduser()
    if not folder.is_dir():
        raise UserError("DIR/STAGE", str(folder), "no such folder", "give the folder of a finished stage")
    if not (folder / "stage.json").is_file():
        raise UserError("DIR/STAGE", str(folder), "not a stage's folder (no stage.json)", "give runs/NAME/STAGE")
    record = read_json(folder / "stage.json")
    if not isinstance(record, dict) or "stage" not in record:
        raise UserError("DIR/STAGE", str(folder), "its stage.json is damaged", "run the stage again")
    if record.get("state") != "finished":
        raise UserError("DIR/STAGE", str(folder), f"the stage is {record.get('state')}", "let it finish, then push it")
    return folder, record


def _kept(folder: Path) -> str:
    return f"the model card is in {folder / CARD}"


@contextlib.contextmanager
def _one_line_errors(repo_id: str, folder: Path, token: str) -> Iterator[None]:
    """Turns every failure of the client into one line without the token, and keeps the token out of the logs."""
    hide = _HideToken(token)
    # A handler sees the records of every logger below it; a filter on a logger would see only its own.
    handlers = [h for name in ("", "huggingface_hub") for h in logging.getLogger(name).handlers]
    for handler in handlers:
        handler.addFilter(hide)
    try:
        yield
    except Exception as error:
        # Not chained: the client's own exception may quote the request's headers.
        problem, mend = _explained(error, token)
        raise UserError("repo_id", repo_id, f"{problem}; {_kept(folder)}", mend) from None
    finally:
        for handler in handlers:
            handler.removeFilter(hide)


def _explained(error: BaseException, token: str) -> tuple[str, str]:
    """What went wrong and how to mend it, without the token."""
    from huggingface_hub.errors import HfHubHTTPError

    text = getattr(error, "server_message", None) or str(error)
    text = " ".join(text.replace(token, "***").split())[:300]
    cause: BaseException | None = error  # an upload in a thread wraps the answer of the Hub
    while cause is not None and not isinstance(cause, HfHubHTTPError):
        cause = cause.__cause__
    if cause is None:
        problem = f"the push did not get through ({type(error).__name__}: {text})"
        return problem, "check the network, HF_ENDPOINT and the token, then push again"
    status = cause.response.status_code
    return {
        401: ("the Hub does not accept the token (401)", "log in again with `hf auth login`, or set HF_TOKEN"),
        403: ("the token may not write there (403)", "use a token with the right to write, or your own namespace"),
        404: ("the Hub knows no such repository or endpoint (404)", "check repo_id and HF_ENDPOINT"),
    }.get(status, (f"the Hub answered {status} ({text})", "push again later, or mend what it names"))


class _HideToken(logging.Filter):
    """Replaces the token in whatever is logged while it is in use."""

    def __init__(self, token: str) -> None:
        super().__init__()
        self.token = token

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if self.token in message:
            record.msg, record.args = message.replace(self.token, "***"), ()
        return True


def _kind(record: Mapping[str, Any]) -> str:
    return re.split(r"[/.]", str(record.get("recipe") or record["stage"]))[-1]


def _what(record: Mapping[str, Any]) -> tuple[str, str, list[str]]:
    kind = _kind(record)
    return _WHAT.get(kind, (f"made by the stage {kind}", "files", [kind]))


def _card(folder: Path, record: Mapping[str, Any]) -> str:
    import jinja2
    from huggingface_hub import ModelCard, ModelCardData

    what, output, tags = _what(record)
    config = {k: _without_path(v) for k, v in (record.get("config") or {}).items() if k not in _HOUSEKEEPING}
    metrics = _metrics(folder, record)
    title = folder.resolve().name
    base = _origin(folder, record, "model")
    base = base if base and not _is_path(base) else None
    dataset = _origin(folder, record, "dataset")
    # A name with a slash is a Hub id; everything else has no page there that the card could link to.
    on_hub = dataset is not None and not _is_path(dataset) and dataset.count("/") == 1
    dataset = _without_path(dataset)
    results = _eval_results(folder, record, metrics, str(dataset or "held-out documents"))
    model_type = _model_type(folder)
    data = ModelCardData(
        library_name="genalign",
        # What started from another model falls under that model's licence, which is not known here.
        license=None if base else LICENCE,
        language="en",
        tags=["genalign", *tags, *([model_type] if model_type else [])],
        base_model=base,
        datasets=[dataset] if on_hub else None,
        pipeline_tag="summarization" if output == "text" else None,
        model_name=title if results else None,
        eval_results=results or None,
    )
    keys = [k for k in sorted(record.get("metrics") or {}) if not is_interval_key(k)]
    own = Table(["Metric", "Value (95 % interval)"], [[k, format_mean(record["metrics"], k)] for k in keys])
    table = results_table(metrics, measures=README_MEASURES) if output in ("text", "score") else None
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    body = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title,
        what=what,
        output=output,
        base=base,
        recipe=record.get("recipe") or record["stage"],
        dataset=dataset,
        seed=record.get("seed"),
        own_metrics=markdown_table(own) if keys else "",
        results=markdown_table(table) if table else "",
        config=markdown_table(mapping_table(config, "Field", "Value")),
        versions=", ".join(f"{k} {v}" for k, v in sorted((record.get("versions") or {}).items())),
        auto_class=_auto_class(folder, output),
        prefix=json.dumps(config.get("prefix") or ""),
        max_source=config.get("max_source_length") or 512,
        max_target=config.get("max_target_length") or 128,
    )
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")
    return str(card).rstrip("\n") + "\n"


_HOUSEKEEPING = ("output_dir", "push_to_hub", "repo_id", "report_to")


def _is_path(value: object) -> bool:
    return isinstance(value, str) and (value.startswith(("/", "~", ".")) or Path(value).expanduser().exists())


def _without_path(value: object) -> object:
    """A local path by its last part: where a file lay on one's machine is nobody's business."""
    if isinstance(value, dict):
        return {k: _without_path(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_path(v) for v in value]
    return Path(value).name if _is_path(value) and value else value


def _origin(folder: Path, record: Mapping[str, Any], field: str) -> str | None:
    """What a field names in the end: through the stages it came from, to a Hub id, an embedded set or a file."""
    value = (record.get("config") or {}).get(field)
    for _ in range(20):  # a chain is never that long; two folders that name each other would be endless
        if not isinstance(value, str) or not value:
            return None
        for place in (Path(value).expanduser(), folder.resolve().parent / Path(value).name):
            if (place / "stage.json").is_file():
                earlier = read_json(place / "stage.json")
                value = (earlier.get("config") or {}).get(field) if isinstance(earlier, dict) else None
                break
        else:
            return value
    return None


def _metrics(folder: Path, record: Mapping[str, Any]) -> dict[str, float]:
    """The run's metrics where the folder lies in one, with the stage's own."""
    found: dict[str, float] = {}
    path = folder.resolve().parent / "metrics.json"
    if path.is_file() and (path.parent / "run.json").is_file():
        content = read_json(path)
        found |= content if isinstance(content, dict) else {}
    return found | (record.get("metrics") or {})


def _eval_results(folder: Path, record: Mapping[str, Any], metrics: Mapping[str, float], dataset: str) -> list[Any]:
    """What was measured on held-out data for this very stage, for the card's ``model-index``."""
    from huggingface_hub import EvalResult

    name = folder.resolve().name
    system = name if any(key.startswith(f"{name}/") for key in metrics) else _kind(record)
    results = []
    for measure in ("rouge1", "rouge2", "rougeL", "rougeLsum", "gold_win_rate", "accuracy", "kl"):
        key = f"{system}/{measure}"
        found = estimate(metrics, key)
        if found is not None:
            results.append(
                EvalResult(
                    task_type="summarization",
                    dataset_type=dataset,
                    dataset_name=dataset,
                    dataset_split="test",
                    metric_type=measure.lower(),
                    metric_name=f"{measure_of(key).label} {format_mean(metrics, key)}, 95 % bootstrap interval",
                    metric_value=round(found.value, 4),
                )
            )
    return results


def _model_type(folder: Path) -> str | None:
    path = folder / "config.json"
    content = read_json(path) if path.is_file() else None
    return content.get("model_type") if isinstance(content, dict) else None


def _auto_class(folder: Path, output: str) -> str | None:
    if output == "text" and (folder / "config.json").is_file():
        return "AutoModelForSeq2SeqLM"
    return None
