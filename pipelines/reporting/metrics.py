"""The flat metrics file ``metrics.json``: read, merged, written and put into words.

Keys read ``<what>/<measure>``; a mean is stored with its interval under ``<key>_ci_low`` and ``<key>_ci_high``. ROUGE
is on 0-100, rates on 0-1, KL in nats a sequence. How a measure is called and rounded stands once, in ``MEASURES``.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipelines.errors import UserError

LOW, HIGH = "_ci_low", "_ci_high"
ERROR = "_se"  # a standard error, over test images or over seeds
MINUS = "_minus_"  # sft/rouge1_minus_lead1: a paired difference


@dataclass(frozen=True)
class Measure:
    """How one measure is shown.

    Args:
        label: the name in a column header.
        unit: what stands behind the number, empty when it has none.
        digits: decimals that are shown; None for four significant digits, or none where the number is whole.
        scale: factor between the stored and the shown number (100 for a rate shown in per cent).
        signed: whether a plus sign is shown.
    """

    label: str
    unit: str = ""
    digits: int | None = 2
    scale: float = 1.0
    signed: bool = False

    def number(self, value: float) -> str:
        """``value`` (as stored) rounded for reading, without its unit."""
        if self.digits is None:
            shown = f"{value:,.0f}" if float(value).is_integer() else f"{value:.4g}"
            return shown.replace("-", "−")
        shown = round(value * self.scale, self.digits) + 0.0  # + 0.0 turns -0.0 into 0.0
        return f"{shown:{'+' if self.signed else ''},.{self.digits}f}".replace("-", "−")


def _percent(label: str) -> Measure:
    return Measure(label, "%", digits=1, scale=100.0)


MEASURES: dict[str, Measure] = {
    "rouge1": Measure("ROUGE-1", digits=1),
    "rouge2": Measure("ROUGE-2", digits=1),
    "rougeL": Measure("ROUGE-L", digits=1),
    "rougeLsum": Measure("ROUGE-Lsum", digits=1),
    "length": Measure("Length", "words", digits=1),
    "compression": Measure("Compression", digits=2),
    "novel_unigrams": _percent("Novel words"),
    "novel_bigrams": _percent("Novel bigrams"),
    "repetition": _percent("Repetition"),
    "gold": Measure("Gold score", digits=1),
    "proxy": Measure("Proxy reward", digits=2, signed=True),
    "gold_win_rate": _percent("Gold win rate"),
    "kl": Measure("KL", "nats", digits=2),
    "accuracy": _percent("Pairs ranked right"),
    "train_accuracy": _percent("Training pairs ranked right"),
    "length_accuracy": _percent("Baseline: the longer one wins"),
    "calibration_error": _percent("Calibration error"),
    "loss": Measure("Loss", "nats", digits=3),
    "eval_loss": Measure("Held-out loss", "nats", digits=3),
    "train_loss": Measure("Training loss", "nats", digits=3),
    "eval_perplexity": Measure("Held-out perplexity", digits=1),
    "truncated_sources": _percent("Sources cut"),
    "truncated_targets": _percent("Targets cut"),
    "truncated_documents": _percent("Documents cut"),
    "truncated_summaries": _percent("Summaries cut"),
    "frechet_distance": Measure("Fréchet distance", digits=2),
    "grey_frechet_distance": Measure("Fréchet distance, grey levels", digits=2),
    "precision": _percent("Precision"),
    "recall": _percent("Recall"),
    "confidence": _percent("Classifier's confidence"),
    "classifier/accuracy": _percent("Images told rightly"),
    "binary_accuracy": _percent("Binary images told rightly"),
    "class_coverage": _percent("Classes covered"),
    "class_entropy": Measure("Class entropy", "nats", digits=2),
    "nearest_distance": Measure("Distance to a training image", digits=2),
    "nearest_ratio": Measure("Distance to the nearest training image (held-out images: 1)", digits=2),
    "copies": _percent("Copies"),
    "bound": Measure("Bound", "nats", digits=2),
    "bound_monte_carlo_error": Measure("Bound, Monte Carlo error", "nats", digits=3),
    "negative_elbo": Measure("Negative ELBO", "nats", digits=2),
    "importance_weighted": Measure("Importance-weighted bound", "nats", digits=2),
    "reconstruction": Measure("Reconstruction", "nats", digits=2),
    "bits_per_pixel": Measure("Bound", "bits a pixel", digits=4),
    "vae/bits_per_pixel": Measure("Negative ELBO", "bits a pixel", digits=4),
    "parameters": Measure("Parameters", digits=0),
    "steps": Measure("Steps", digits=0),
    "train_runtime": Measure("Training", "minutes", digits=1, scale=1 / 60),
    "train_cpu_runtime": Measure("Training", "CPU minutes", digits=1, scale=1 / 60),
    "seconds_a_sample": Measure("Sampling", "ms an image", digits=2, scale=1000.0),
}


@dataclass(frozen=True)
class Estimate:
    """A value with its interval, in stored units; ``low`` and ``high`` are None when the file holds no interval."""

    value: float
    low: float | None = None
    high: float | None = None


def measure_of(key: str) -> Measure:
    """The measure of a metrics key, whole or by its last part; an unknown one goes by its own name."""
    name = key.rsplit("/", 1)[-1]
    if MINUS in name:
        return Measure(name.replace("_", " "), digits=1, signed=True)
    return MEASURES.get(key) or MEASURES.get(name) or Measure(name.replace("_", " "), digits=None)


def estimate(metrics: Mapping[str, float], key: str) -> Estimate | None:
    """The value stored under ``key`` with its interval, or None when there is none."""
    if key not in metrics:
        return None
    return Estimate(metrics[key], metrics.get(key + LOW), metrics.get(key + HIGH))


def format_interval(metrics: Mapping[str, float], key: str) -> str:
    """The interval as ``23.2–25.0``, else the standard error as ``± 0.4``; empty when there is neither."""
    found = estimate(metrics, key)
    if found is None:
        return ""
    if found.low is None or found.high is None:
        return f"± {measure_of(key).number(metrics[key + ERROR])}" if key + ERROR in metrics else ""
    low, high = (measure_of(key).number(end) for end in (found.low, found.high))
    return f"{low}–{high}" if found.low >= 0 and low[0] != "+" else f"{low} to {high}"


def format_mean(metrics: Mapping[str, float], key: str, missing: str = "–") -> str:
    """The value and its interval as ``24.1 (23.2–25.0)``, with its unit behind when it is a per cent.

    Args:
        metrics: the flat metrics.
        key: ``<what>/<measure>``.
        missing: what is returned when the key is absent.
    """
    found = estimate(metrics, key)
    if found is None:
        return missing
    measure = measure_of(key)
    text = measure.number(found.value) + (" %" if measure.unit == "%" else "")
    interval = format_interval(metrics, key)
    return f"{text} ({interval})" if interval else text


def is_interval_key(key: str) -> bool:
    """Whether ``key`` holds one end of another key's interval, or its standard error."""
    return key.endswith((LOW, HIGH, ERROR))


def check_metrics(metrics: Mapping[str, object], where: str) -> dict[str, float]:
    """The metrics as plain floats and ints.

    Raises:
        UserError: if a value is not a number, or is NaN or infinite; ``where`` says where it came from.
    """
    checked: dict[str, float] = {}
    for key, value in metrics.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise UserError(f"{where} {key}", value, "not a number", "metrics are flat: one number under each key")
        if not math.isfinite(value):
            raise UserError(
                f"{where} {key}",
                value,
                "not a finite number",
                "the stage diverged or divided by zero: lower its learning rate, or look at its data",
            )
        checked[key] = value
    return checked


def read_json(path: Path) -> object:
    """The content of a JSON file.

    Raises:
        UserError: if the file is missing, unreadable, not UTF-8 or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError("file", str(path), "no such file", "check the path, or run the stage that writes it") from None
    except OSError as error:
        raise UserError("file", str(path), f"cannot be read ({error.strerror})", "check the path") from None
    except UnicodeDecodeError:
        raise UserError("file", str(path), "not UTF-8 text", "it was damaged: run its stage again") from None
    except json.JSONDecodeError as error:
        raise UserError("file", str(path), f"not valid JSON ({error})", "it was damaged: run its stage again") from None


def read_metrics(path: Path | str) -> dict[str, float]:
    """The metrics of a file.

    Raises:
        UserError: if it is missing, not a JSON object, or holds anything but finite numbers.
    """
    path = Path(path)
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError("metrics", str(path), "not a JSON object", "give the metrics.json of a run folder")
    return check_metrics(content, path.name)


def write_metrics(path: Path | str, metrics: Mapping[str, float]) -> Path:
    """Writes the metrics, keys sorted, whole or not at all.

    Raises:
        UserError: if a value is not a finite number; the file is left as it was.
    """
    path = Path(path)
    checked = check_metrics(metrics, path.name)
    write_text(path, json.dumps(checked, indent=2, sort_keys=True, allow_nan=False) + "\n")
    return path


def merge_metrics(path: Path | str, new: Mapping[str, float]) -> dict[str, float]:
    """Puts ``new`` over what the file holds (nothing, if there is no file), writes it and returns the whole.

    Raises:
        UserError: if the file or ``new`` holds anything but finite numbers.
    """
    path = Path(path)
    merged = {**(read_metrics(path) if path.exists() else {}), **new}
    write_metrics(path, merged)
    return merged


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file with line ends of one kind; see ``write_bytes``."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file under a temporary name beside it, then renames: no reader ever sees half of it.

    Raises:
        OSError: if the folder cannot be written; the old file is then untouched and no temporary one is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
