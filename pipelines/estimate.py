"""``genalign estimate``: memory of each device and time, for every training stage of a chain, before anything runs.

The step of a stage is run without values (``estimate_step``); what is added here is what lies beside a step: optimizer
states, models that only score, keys and values of generation, what a launcher cuts into parts or holds twice, and how
many steps there are. Memory is that of tensors; a GPU's libraries take another half gibibyte to a gibibyte.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.errors import UserError

if TYPE_CHECKING:
    from pipelines.runner import Chain

GIB = 2**30
_FP32, _HALF = 4, 2
# A heap holds what lives in it and the gaps between: measured over SFT, reward model and DPO, a tenth more.
_HEAP = 1.1


@dataclass(frozen=True)
class Device:
    """What a device can do, by its maker.

    Attributes:
        memory: bytes.
        half: dense bf16 FLOP/s.
        single: fp32 FLOP/s (of GPUs with TF32 off).
        bandwidth: bytes a second.
        runs: whose operations it runs, ``cuda`` or ``cpu``.
    """

    memory: float
    half: float
    single: float
    bandwidth: float
    runs: str = "cuda"


# Vendors' data sheets, dense figures.
DEVICES = {
    "rtx-4090": Device(24 * GIB, 165e12, 82.6e12, 1.01e12),
    "rtx-3090": Device(24 * GIB, 71e12, 35.6e12, 0.94e12),
    "l4": Device(24 * GIB, 121e12, 30.3e12, 0.30e12),
    "a10g": Device(24 * GIB, 70e12, 35e12, 0.60e12),
    "a100-40gb": Device(40 * GIB, 312e12, 19.5e12, 1.56e12),
    "a100-80gb": Device(80 * GIB, 312e12, 19.5e12, 2.04e12),
    "h100-80gb": Device(80 * GIB, 989e12, 67e12, 3.35e12),
    "h200": Device(141 * GIB, 989e12, 67e12, 4.8e12),
    "cpu": Device(0, 0.2e12, 0.1e12, 0.02e12, "cpu"),
}

# Training examples of sets that the shipped chains name, so that their number need not be looked up.
EXAMPLES = {"edinburghnlp/xsum": 204_045, "abisee/cnn_dailymail": 287_113, "allenai/scitldr": 1_992}

LAUNCHERS = ("single", "ddp", "fsdp", "zero2", "zero3")
_TRAINS = ("sft", "pretrain", "reward", "dpo", "listwise", "ppo", "grpo", "rloo")


@dataclass(frozen=True)
class Launch:
    """How a stage is started.

    Attributes:
        kind: one of ``LAUNCHERS``.
        processes: devices.
    """

    kind: str = "single"
    processes: int = 1

    @classmethod
    def of(cls, name: str, processes: int | None) -> Launch:
        """A kind, or a launcher file of accelerate.

        Raises:
            UserError: neither, or the file says neither how the work is shared nor by how many.
        """
        from pipelines.config import read_yaml
        from pipelines.launching import strategy_of

        if name in LAUNCHERS:
            return cls(name, processes or (1 if name == "single" else 8))
        if not Path(name).suffix:
            mend = f"give one of {', '.join(LAUNCHERS)}, or a file of accelerate_configs"
            raise UserError("--launcher", name, "no such launcher", mend)
        table = read_yaml(name, "--launcher")
        count = processes or table.get("num_processes", 1)
        if not isinstance(count, int) or count < 1:
            raise UserError("num_processes", count, f"not a number from 1 in {name}", "mend it, or give --processes")
        return cls(strategy_of(name) if count > 1 else "single", count)


@dataclass
class StageEstimate:
    """What a stage takes on each device.

    Attributes:
        stage: its name in the chain.
        recipe: ``family/stage``.
        model: what is trained.
        parameters: of the trained model.
        trained: those that are trained.
        weights: bytes of the trained model.
        optimizer: bytes of the optimizer's states.
        gradients: bytes.
        activations: bytes held at the end of a forward pass.
        peak: bytes of activations, gradients and temporary tensors at once (less than the sum, as gradients come while
            activations go).
        others: models that only score -> bytes.
        cache: bytes of keys and values of generation.
        sampling: bytes that a rollout holds at once beside the models, its keys and values among them.
        after: bytes of the reference that the trained model is measured against, loaded when training has ended.
        total: most bytes at once.
        steps: optimizer steps; None where the number of examples is not known.
        flops: of one step on all devices, with its share of sampling.
        seconds: of the stage.
    """

    stage: str
    recipe: str
    model: str
    parameters: int
    trained: int
    weights: float
    optimizer: float
    gradients: float
    activations: float
    peak: float
    others: dict[str, float] = field(default_factory=dict)
    cache: float = 0.0
    sampling: float = 0.0
    after: float = 0.0
    total: float = 0.0
    steps: int | None = None
    flops: float = 0.0
    seconds: float | None = None


# --- what a stage trains ----------------------------------------------------------------------------------------------


@dataclass
class _Origin:
    """Where a stage's model comes from: a name, or the sizes of one made from scratch."""

    name: str
    config: Any


def _stage_named(value: Any, chain: Chain) -> str | None:
    text = value if isinstance(value, str) else ""
    if text.startswith("${"):
        return text[2:].partition("}")[0]
    return None


def _vocabulary(settings: Any, chain: Chain, configs: dict[str, Any]) -> int:
    from pipelines.estimate_models import model_config

    named = _stage_named(settings.tokenizer, chain)
    if named is not None:
        trained = configs[named]
        given = getattr(trained, "model", None)
        return model_config(given).vocab_size if given else trained.vocab_size
    from pipelines.seq2seq.models import load_tokenizer

    return len(load_tokenizer(settings.tokenizer))


def _origin(stage: str, chain: Chain, configs: dict[str, Any]) -> _Origin:
    """The model that a stage begins with, back to a name or a size."""
    from pipelines.estimate_models import model_config
    from pipelines.seq2seq.scratch import t5_config

    settings = configs[stage]
    given = settings.model
    if given is None:
        return _Origin("from scratch", t5_config(settings, _vocabulary(settings, chain, configs)))
    before = _stage_named(given, chain)
    if before is not None:
        return _origin(before, chain, configs)
    return _Origin(given, model_config(given, f"{stage}.model"))


def _examples(settings: Any, chain: Chain, configs: dict[str, Any], documents: int | None) -> int | None:
    """Training examples of a stage's set, as far as they can be known without reading it."""
    source = getattr(settings, "preferences", None) or getattr(settings, "dataset", None)
    own = getattr(settings, "max_train", None)
    named = _stage_named(source, chain)
    if named is not None:
        before = _examples(configs[named], chain, configs, documents)
    else:
        before = documents or EXAMPLES.get(str(source).lower())
        if before is None and isinstance(source, str) and Path(source).expanduser().is_file():
            before = _lines(Path(source).expanduser())
    if before is None or own is None:
        return before if own is None else own
    return min(before, own)


def _lines(path: Path) -> int | None:
    if path.suffix != ".jsonl":
        return None
    with path.open("rb") as file:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(2**20), b""))


# --- memory -----------------------------------------------------------------------------------------------------------


def _optimizer_bytes(settings: Any, trained: int, factored: int) -> float:
    return _FP32 * (factored if settings.optimizer == "adafactor" else 2 * trained)


def _precision(settings: Any, device: Device) -> str:
    if settings.precision != "auto":
        return settings.precision
    return "bf16" if device.runs == "cuda" else "fp32"


def _laid_out(found: StageEstimate, cost: Any, launch: Launch, precision: str, held: float) -> None:
    """Bytes of one device under a launcher, in place; ``held`` is what the allocator holds for a byte of a step."""
    n, size = launch.processes, _FP32
    weights, gradients = float(size * cost.parameters), float(size * cost.trained)
    optimizer, extra = found.optimizer, 0.0
    if n > 1 and launch.kind == "ddp":
        extra = gradients  # the reducer's buckets hold them a second time
    elif n > 1 and launch.kind == "fsdp":
        # What lies outside the layers is whole for the whole step, of the layers two: one at work, the next on its way.
        extra = size * (cost.outside_blocks + 2 * cost.largest_block)
        weights, gradients, optimizer = weights / n, gradients / n, optimizer / n
        kind, gathered = found.recipe.rpartition("/")[2], size * cost.parameters
        if kind != "ppo" and "reference" in found.others:
            found.others["reference"] /= n
        if found.sampling:
            found.sampling += gathered
        elif kind != "sft":
            found.after += gathered  # to be measured
    elif n > 1 and launch.kind.startswith("zero"):
        if precision != "fp32":
            # DeepSpeed trains half-precision weights beside fp32 ones that the optimizer keeps.
            optimizer += _FP32 * cost.trained
            weights, gradients = weights / 2, gradients / 2
        optimizer, gradients = optimizer / n, gradients / n
        extra = min(2 * size * cost.trained, 2e9)  # its buckets of 5e8 numbers
        if launch.kind == "zero3":
            extra += size * (cost.outside_blocks + 2 * cost.largest_block)
            weights /= n
    whole = float(_FP32 * cost.trained)
    peak = max(cost.forward_bytes, cost.peak_bytes - (whole - gradients if launch.kind != "single" else 0.0))
    found.peak = held * peak
    found.weights, found.gradients, found.optimizer = weights, gradients, optimizer
    models = weights + optimizer + extra + sum(found.others.values())
    found.total = models + max(found.peak, found.sampling, found.after)


# --- stages -----------------------------------------------------------------------------------------------------------


def estimate_stage(
    stage: str,
    chain: Chain,
    configs: dict[str, Any],
    device: Device,
    launch: Launch,
    *,
    utilization: float = 0.4,
    documents: int | None = None,
) -> StageEstimate:
    """What one training stage takes.

    Args:
        stage: its name.
        chain: it belongs to.
        configs: stage -> validated configuration, ``${stage}`` not resolved.
        device: what it runs on.
        launch: how it is started.
        utilization: share of the device's peak that training reaches.
        documents: training examples of the chain's set, where they are not known.

    Raises:
        UserError: the model's sizes cannot be known; sizes that the processes cannot share.
    """
    from pipelines.estimate_step import Shape, cache_bytes, forward_peak, measure

    settings, kind = configs[stage], chain.recipe_names[stage].rpartition("/")[2]
    origin = _origin(stage, chain, configs)
    precision = _precision(settings, device)
    sampled = kind in ("ppo", "grpo", "rloo")
    samples = settings.samples_per_source if sampled else {"reward": 2, "dpo": 2, "listwise": 4}.get(kind, 1)
    if sampled:
        share = launch.processes * settings.gradient_accumulation
        if settings.mini_batch_size % (share * samples):
            problem, mend = "cannot be shared out", f"give a multiple of {share * samples}"
            raise UserError(f"{stage}.mini_batch_size", settings.mini_batch_size, problem, mend)
        rows = settings.mini_batch_size // share
    else:
        rows = settings.batch_size * samples
    online = kind in ("dpo", "listwise") and not settings.precomputes
    shape = Shape(
        kind=kind,
        sources=rows // samples,
        rows=rows,
        source_length=settings.max_source_length,
        target_length=settings.max_target_length,
        precision=precision,
        accumulation=settings.gradient_accumulation,
        checkpointing=settings.gradient_checkpointing,
        lora_r=getattr(settings, "lora_r", 0),
        online_reference=online,
        train_encoder=getattr(settings, "train_encoder", True),
        separate_critic=getattr(settings, "separate_critic", False),
        device=device.runs,
    )
    cost = measure(origin.config, shape)
    found = StageEstimate(
        stage,
        chain.recipe_names[stage],
        origin.name,
        cost.parameters,
        cost.trained,
        0.0,
        _optimizer_bytes(settings, cost.trained, cost.factored),
        0.0,
        cost.forward_bytes,
        cost.peak_bytes,
    )
    if (online or sampled) and not shape.lora_r:
        found.others["reference"] = float(cost.frozen_bytes)
    if kind in ("dpo", "listwise"):
        # On a CPU the pages of its file are counted too while it is read.
        found.after = float(cost.frozen_bytes * (2 if device.runs == "cpu" else 1))
    flops, memory_seconds = float(cost.flops), 0.0
    if sampled:
        for name in settings.reward_specs:
            if _stage_named(name, chain) is not None or Path(name).expanduser().is_dir():
                found.others["reward model"] = float(_FP32 * _backbone(origin.config))
        at_once = min(settings.batch_size, settings.rows_per_rollout // launch.processes)
        at_once = max(samples, at_once // samples * samples)
        sizes = (at_once // samples, at_once, settings.max_source_length, settings.max_target_length)
        width = _FP32 if precision == "fp32" else _HALF
        found.cache = float(cache_bytes(origin.config, *sizes, width))
        rollout = dataclasses.replace(shape, sources=at_once // samples, rows=at_once, accumulation=1)
        scored, scored_flops = forward_peak(origin.config, rollout)
        found.sampling = scored + found.cache
        passes = settings.rows_per_rollout / launch.processes / at_once
        steps_a_rollout = (
            getattr(settings, "ppo_epochs", getattr(settings, "group_epochs", 1))
            * settings.rows_per_rollout
            / settings.mini_batch_size
        )
        # Generation, the policy's, the reference's and the reward model's scores; the weights are read at each token.
        flops += passes * 4 * scored_flops / steps_a_rollout
        if device.bandwidth:
            reads = passes * settings.max_target_length * _FP32 * cost.parameters / 2
            memory_seconds = reads / device.bandwidth / steps_a_rollout
    _laid_out(found, cost, launch, precision, _HEAP if device.runs == "cpu" else 1.0)
    found.steps = _steps(settings, kind, chain, configs, launch, documents)
    found.flops = flops * launch.processes
    peak = device.half if precision != "fp32" else device.single
    if found.steps is not None:
        found.seconds = found.steps * (flops / (peak * utilization) + memory_seconds)
    return found


def _backbone(config: Any) -> int:
    """Parameters of a reward model's encoder and decoder."""
    from pipelines.estimate_models import empty_model

    return sum(p.numel() for p in empty_model(config).base_model.parameters())


def _steps(
    settings: Any, kind: str, chain: Chain, configs: dict[str, Any], launch: Launch, documents: int | None
) -> int | None:
    if kind in ("ppo", "grpo", "rloo"):
        epochs = getattr(settings, "ppo_epochs", getattr(settings, "group_epochs", 1))
        return settings.rollouts * epochs * settings.rows_per_rollout // settings.mini_batch_size
    copies = settings.copy_steps if kind == "sft" else 0  # on top of the others
    if settings.max_steps > 0:
        return settings.max_steps + copies
    examples = _examples(settings, chain, configs, documents)
    if examples is None:
        return None
    batch = settings.batch_size * settings.gradient_accumulation * launch.processes
    return max(1, math.ceil(settings.epochs * (examples // batch))) + copies


def estimate_chain(
    chain: Chain,
    overrides: list[str],
    device: Device,
    launch: Launch,
    *,
    utilization: float = 0.4,
    documents: int | None = None,
) -> list[StageEstimate]:
    """What each training stage of a chain takes, in order.

    Raises:
        UserError: as ``Chain.configured`` and ``estimate_stage``.
    """
    configs = chain.unresolved(Path("runs") / chain.name, overrides)
    trained = [stage for stage in configs if chain.recipe_names[stage].rpartition("/")[2] in _TRAINS]
    if not trained:
        raise UserError("CONFIG", chain.name, "trains nothing that can be estimated", f"it needs {', '.join(_TRAINS)}")
    return [
        estimate_stage(stage, chain, configs, device, launch, utilization=utilization, documents=documents)
        for stage in trained
    ]


# --- what is shown ----------------------------------------------------------------------------------------------------


def _size(value: float) -> str:
    return f"{value / GIB:.1f}" if value >= 0.05 * GIB else f"{value / GIB:.3f}" if value else "-"


def _count(value: int) -> str:
    return f"{value / 1e9:.2f}B" if value >= 1e9 else f"{value / 1e6:.1f}M"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"


def table(found: list[StageEstimate]) -> list[str]:
    """Lines of plain text: a line a stage, GiB of one device."""
    heads = ("stage", "model", "params", "trained", "weights", "optimizer", "gradients", "activ.", "others", "KV cache")
    rows = [(*heads, "TOTAL", "steps", "time")]
    for each in found:
        numbers = (
            each.weights,
            each.optimizer,
            each.gradients,
            each.activations,
            sum(each.others.values()),
            each.cache,
        )
        steps = "?" if each.steps is None else str(each.steps)
        name = each.model.rpartition("/")[2]
        counts = _count(each.parameters), _count(each.trained)
        rows.append((each.stage, name, *counts, *map(_size, numbers), _size(each.total), steps, _time(each.seconds)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def report(chain: Chain, found: list[StageEstimate], device_name: str, launch: Launch, utilization: float) -> str:
    """The estimate as text."""
    device = DEVICES[device_name]
    most = max(each.total for each in found)
    whole = sum(each.seconds for each in found) if all(each.seconds is not None for each in found) else None
    devices = f"{launch.processes} x {device_name}" + (f" ({launch.kind})" if launch.processes > 1 else "")
    lines = [
        f"{chain.name} on {devices}: GiB of a device; time at {100 * utilization:.0f} % of its peak",
        *table(found),
    ]
    last = f"most at once: {most / GIB:.1f} GiB" + (f" of {device.memory / GIB:.0f}" if device.memory else "")
    return "\n".join([*lines, f"{last}; training takes {_time(whole)}"])


def load(source: str, recipe: str | None) -> Chain:
    """The chain that is estimated; a recipe alone, or its own YAML, is a chain of one stage.

    Raises:
        UserError: there is none of that name; a YAML without stages and nothing that says whose it is.
    """
    from pipelines.config import read_yaml
    from pipelines.runner import Chain

    values: dict[str, Any] = {}
    if Path(source).suffix in (".yaml", ".yml"):
        values = read_yaml(source, "CONFIG")
        if "stages" in values or "base" in values:
            return Chain.load(source)
        if recipe is None:
            mend = "add --recipe summarization/sft, or whose it is"
            raise UserError("CONFIG", source, "has no stages, so it belongs to one recipe", mend)
    elif "/" in source and recipe is None:
        recipe = source
    if recipe is None:
        return Chain.load(source)
    name = recipe.rpartition("/")[2]
    return Chain._build(name, "", {name: {"recipe": recipe, **values}}, {})


def command(arguments: Any) -> str:
    """``genalign estimate`` with parsed arguments; returns what is printed.

    Raises:
        UserError: an unknown device or launcher, numbers out of range; and as ``estimate_chain``.
    """
    import json

    from pipelines.config import nearest
    from pipelines.runner import chain_file

    if arguments.device not in DEVICES:
        raise UserError("--device", arguments.device, "is not known", nearest(arguments.device, list(DEVICES)))
    if not 0 < arguments.utilization <= 1:
        raise UserError("--utilization", arguments.utilization, "is no share of the peak", "give a number up to 1")
    if arguments.processes is not None and arguments.processes < 1:
        raise UserError("--processes", arguments.processes, "is no number of devices", "give 1 or more")
    launch = Launch.of(arguments.launcher, arguments.processes)
    chain = load(arguments.config, arguments.recipe)
    options = {"utilization": arguments.utilization, "documents": arguments.documents}
    found = estimate_chain(chain, arguments.overrides, DEVICES[arguments.device], launch, **options)
    if arguments.json:
        return json.dumps([dataclasses.asdict(each) for each in found], indent=1)
    text = report(chain, found, arguments.device, launch, arguments.utilization)
    if arguments.write:
        write_header(chain_file(arguments.config), text)
    return text


MARK = "# $ genalign estimate "
"""How a chain's file begins the line that gives its estimate's command; what the command prints stands below it."""


def write_header(path: Path, text: str) -> None:
    """Put an estimate below the line in the head of a chain's file that gives its command.

    Args:
        path: of the chain's file.
        text: what the command printed.

    Raises:
        UserError: there is no such line.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    place = next((number for number, line in enumerate(lines) if line.startswith(MARK)), None)
    if place is None:
        raise UserError("--write", path, f"has no line that begins with {MARK!r}", "add it to the comment at the top")
    end = place + 1
    while end < len(lines) and lines[end].startswith("#   "):
        end += 1
    lines[place + 1 : end] = [f"#   {line}" for line in text.splitlines()]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def header(path: Path) -> tuple[list[str], str] | None:
    """The words of the command and what it printed, as a chain's file has them; None where it has none.

    Args:
        path: of the chain's file.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    place = next((number for number, line in enumerate(lines) if line.startswith(MARK)), None)
    if place is None:
        return None
    printed = []
    for line in lines[place + 1 :]:
        if not line.startswith("#   "):
            break
        printed.append(line[4:])
    return lines[place][len(MARK) :].split(), "\n".join(printed)
