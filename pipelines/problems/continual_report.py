"""Tables, figures and metrics of the continual learning exercise."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from pipelines.problems.continual_math import average_accuracy, forgetting, plasticity, stability
from pipelines.problems.continual_training import Run, make_network
from pipelines.problems.exercise import Answer, Figure
from pipelines.problems.fits import Interval, seed_interval
from pipelines.problems.small_networks import parameter_count
from pipelines.reporting import plots
from pipelines.reporting.plots import Panel, Series

if TYPE_CHECKING:
    from pipelines.problems.continual_learning import ContinualLearningConfig
    from pipelines.problems.image_data import LabelledSet

_LABELS = {"naive": "naive", "ewc": "EWC", "rehearsal": "rehearsal", "shortcut": "EWC by the shortcut"}
_MEASURES = {
    "accuracy": average_accuracy,
    "forgetting": forgetting,
    "stability": stability,
    "plasticity": plasticity,
}


class Results:
    """What all runs gave, asked for by network, method and value.

    Args:
        results: run -> what ``learn_sequence`` returned.
    """

    def __init__(self, results: dict[Run, Any]):
        self._results = results

    def matrices(self, network: str, method: str, value: float, tasks: int) -> torch.Tensor:
        """(seeds, T, T) test accuracies."""
        wanted = (network, method, value, tasks)
        return torch.tensor([found["test"] for run, found in self._results.items() if run[:4] == wanted])

    def interval(self, measure: str, network: str, method: str, value: float, tasks: int) -> Interval:
        """Mean over seeds of a measure of the accuracy matrix, with Student's interval."""
        return seed_interval([_MEASURES[measure](m) for m in self.matrices(network, method, value, tasks)])

    def difference(self, one: tuple[str, str, float, int], other: tuple[str, str, float, int]) -> Interval:
        """Average accuracy of ``one`` less that of ``other``, paired by seed: both met the same tasks."""
        pairs = zip(self.matrices(*one), self.matrices(*other), strict=True)
        return seed_interval([average_accuracy(a) - average_accuracy(b) for a, b in pairs])


def report(
    answer: Answer,
    results: dict[Run, Any],
    chosen: dict[str, float],
    long_lambda: float,
    images: LabelledSet,
    config: ContinualLearningConfig,
) -> dict[str, float]:
    """Fill the answer; returns the metrics.

    Args:
        answer: to be filled.
        results: of all runs.
        chosen: network -> its λ.
        long_lambda: λ of the longer sequence.
        images: that were learned.
        config: of the stage.
    """
    found = Results(results)
    first = config.networks[0]
    answer.value(
        train_images=len(images.train),
        test_images=len(images.test),
        tasks=config.tasks,
        epochs=config.epoch_count,
        batch=config.batch,
        seeds=config.seeds,
        first_lambda=chosen[first],
        memory=config.memories[-1],
    )
    metrics = _compare(answer, found, chosen, images, config)
    _matrices(answer, found, chosen, config)
    _sweeps(answer, found, config)
    _trade_off(answer, found, config)
    return metrics | _long(answer, found, long_lambda, config)


def _methods(network: str, chosen: dict[str, float], config: ContinualLearningConfig) -> list[tuple[str, float]]:
    """Method and value of the three that are compared."""
    return [("naive", 0.0), ("ewc", chosen[network]), ("rehearsal", float(config.memories[-1]))]


def _named(method: str, value: float) -> str:
    return {"naive": "naive", "rehearsal": f"rehearsal, {value:g} a task"}.get(
        method, f"{_LABELS[method]}, λ = {value:g}"
    )


def _compare(
    answer: Answer, found: Results, chosen: dict[str, float], images: LabelledSet, config: ContinualLearningConfig
) -> dict[str, float]:
    """The table of the three methods on every network, and their differences."""
    rows, differences, metrics = [], [], {}
    shape = tuple(images.train.images.shape[1:])
    for network in config.networks:
        size = parameter_count(make_network(network, shape, images.classes, config))
        at = {}
        for method, value in _methods(network, chosen, config):
            at[method] = (network, method, value, config.tasks)
            means = {name: found.interval(name, *at[method]) for name in _MEASURES}
            rows.append([network, f"{size:,}", _named(method, value), *(means[name].shown() for name in _MEASURES)])
            for name in ("accuracy", "forgetting"):
                key, interval = f"continual_learning/{network}_{method}_{name}", means[name]
                metrics |= {key: interval.value, f"{key}_ci_low": interval.low, f"{key}_ci_high": interval.high}
        metrics[f"continual_learning/{network}_lambda"] = chosen[network]
        for one, other in (("ewc", "naive"), ("rehearsal", "ewc")):
            differences.append(
                [network, f"{_LABELS[one]} − {_LABELS[other]}", found.difference(at[one], at[other]).shown()]
            )
    answer.table(
        "methods",
        ["network", "weights", "method", "average accuracy", "forgetting", "old tasks at the end", "when just learned"],
        rows,
        f"After {config.tasks} tasks: means over {config.seeds} seeds with 95 % intervals.",
    )
    answer.table(
        "differences",
        ["network", "average accuracy", "difference (95 %)"],
        differences,
        "Paired by seed: both methods met the same tasks from the same weights.",
    )
    first = config.networks[0]
    answer.value(
        **{name: metrics[f"continual_learning/{first}_{name}_accuracy"] for name in ("naive", "ewc", "rehearsal")}
    )
    answer.value(
        **{f"{name}_forgetting": metrics[f"continual_learning/{first}_{name}_forgetting"] for name in ("naive", "ewc")}
    )
    return metrics


def _matrices(answer: Answer, found: Results, chosen: dict[str, float], config: ContinualLearningConfig) -> None:
    rows, first = [], config.networks[0]
    for method, value in _methods(first, chosen, config):
        mean = found.matrices(first, method, value, config.tasks).mean(0)
        for after, row in enumerate(mean.tolist()):
            rows.append([_named(method, value), after + 1, *(f"{cell:.3f}" for cell in row)])
    columns = ["method", "after task", *(f"on task {i + 1}" for i in range(config.tasks))]
    answer.table("matrices", columns, rows, f"Test accuracy of the {first} on every task, mean over seeds.")


def _curve(
    found: Results, network: str, method: str, values: list[float], config: ContinualLearningConfig
) -> list[Any]:
    return [found.interval("accuracy", network, method, float(value), config.tasks) for value in values]


def _drawn(label: str, x: list[float], intervals: list[Interval], colour: int, dense: bool = True) -> Series:
    bars = [(100 * i.low, 100 * i.high) for i in intervals] if dense else []
    return Series(label, x, [100 * i.value for i in intervals], colour=colour, bars=bars)


def _sweeps(answer: Answer, found: Results, config: ContinualLearningConfig) -> None:
    """Average accuracy over λ, the right Fisher and the shortcut; and over the size of the memory."""
    x = list(config.lambdas)
    panels = []
    for number, network in enumerate(config.networks):
        naive = found.interval("accuracy", network, "naive", 0.0, config.tasks)
        series = [
            _drawn("EWC", x, _curve(found, network, "ewc", config.lambdas, config), 0),
            _drawn("naive", [x[0], x[-1]], [naive, naive], 2, dense=False),
        ]
        if number == 0:
            series.insert(
                1, _drawn("by the shortcut", x, _curve(found, network, "shortcut", config.lambdas, config), 1)
            )
        panels.append(Panel(series, f"{network}: accuracy, %"))
    best = max(_curve(found, config.networks[0], "ewc", config.lambdas, config), key=lambda i: i.value)
    alt = f"Average accuracy of the {config.networks[0]} reaches {100 * best.value:.1f} % at the best λ"
    answer.figure(
        Figure(
            "lambdas",
            svg=plots.lines("continual_learning-lambdas", panels, "λ", alt, logx=True),
            caption="Too small a λ forgets, too large a one learns little new, then diverges; bars: 95 % over seeds.",
            title="Average accuracy over λ",
        )
    )
    first = config.networks[0]
    right = _curve(found, first, "ewc", config.lambdas, config)
    short = _curve(found, first, "shortcut", config.lambdas, config)
    rows = [[f"{value:g}", a.shown(), b.shown()] for value, a, b in zip(config.lambdas, right, short, strict=True)]
    columns = ["λ", "mean of squared gradients", "squared mean of a batch"]
    answer.table("shortcut", columns, rows, f"Average accuracy of the {first} by EWC with either diagonal.")
    x = [float(value) for value in config.memories]
    panels, least = [], []
    for network in config.networks:
        curve = _curve(found, network, "rehearsal", [float(m) for m in config.memories], config)
        values = _curve(found, network, "ewc", config.lambdas, config)
        top = max(values, key=lambda i: i.value)
        series = [
            _drawn("rehearsal", x, curve, 0),
            _drawn("best EWC", [x[0], x[-1]], [top, top], 1, dense=False),
        ]
        panels.append(Panel(series, f"{network}: accuracy, %"))
        enough = [m for m, i in zip(config.memories, curve, strict=True) if i.value > top.value]
        least.append([network, f"{min(enough):,} images a task" if enough else "none of those tried"])
    alt = "Average accuracy rises with the size of the memory"
    answer.figure(
        Figure(
            "memories",
            svg=plots.lines("continual_learning-memories", panels, "images kept of each task", alt, logx=True),
            caption="A few images kept of each task already hold most of it; more images, less forgetting.",
            title="Average accuracy over the size of the memory",
        )
    )
    columns = ["network", "least memory that beats EWC at its best λ"]
    answer.table("least_memory", columns, least, "By average accuracy on the test images, of the sizes tried.")


def _trade_off(answer: Answer, found: Results, config: ContinualLearningConfig) -> None:
    """Stability against plasticity: a point for every λ and every memory."""
    panels = []
    for network in config.networks:
        series = []
        for colour, (method, values) in enumerate(
            (("ewc", config.lambdas), ("rehearsal", config.memories), ("naive", [0]))
        ):
            at = [(network, method, float(value), config.tasks) for value in values]
            x = [100 * found.interval("stability", *place).value for place in at]
            y = [100 * found.interval("plasticity", *place).value for place in at]
            series.append(Series(_LABELS[method], x, y, colour=colour))
        panels.append(Panel(series, f"{network}: new tasks, %"))
    answer.figure(
        Figure(
            "trade_off",
            svg=plots.lines(
                "continual_learning-trade_off",
                panels,
                "accuracy on old tasks at the end, %",
                "EWC trades accuracy on new tasks for accuracy on old ones as λ grows; rehearsal hardly does",
            ),
            caption="A dot is a λ or a memory: to the right less is forgotten, upwards new tasks are learned better.",
            title="Stability against plasticity",
        )
    )


def _long(answer: Answer, found: Results, strength: float, config: ContinualLearningConfig) -> dict[str, float]:
    """The longer sequence: the first task as others follow, and the mean over the tasks met so far."""
    first, count = config.networks[0], config.long_tasks
    methods = (("naive", 0.0), ("ewc", strength), ("rehearsal", float(config.memories[-1])))
    kept, so_far, rows, metrics = [], [], [], {}
    x = list(range(1, count + 1))
    for colour, (method, value) in enumerate(methods):
        matrices = found.matrices(first, method, value, count)
        kept.append(Series(_LABELS[method], x, (100 * matrices[:, :, 0].mean(0)).tolist(), colour=colour))
        means = [float(100 * matrices[:, t, : t + 1].mean()) for t in range(count)]
        so_far.append(Series(_LABELS[method], x, means, colour=colour))
        at = (first, method, value, count)
        end, lost = found.interval("accuracy", *at), found.interval("forgetting", *at)
        rows.append([_named(method, value), end.shown(), lost.shown()])
        key = f"continual_learning/long_{method}_accuracy"
        metrics |= {key: end.value, f"{key}_ci_low": end.low, f"{key}_ci_high": end.high}
        answer.value(**{f"long_{method}": end.value})
    columns = ["method", "average accuracy", "forgetting"]
    answer.table("long", columns, rows, f"The {first} after {count} tasks; λ by the first seed's held-out images.")
    answer.value(long_tasks=count)
    answer.figure(
        Figure(
            "long",
            svg=plots.lines(
                "continual_learning-long",
                [Panel(kept, "on task 1, %"), Panel(so_far, "tasks so far, %")],
                "tasks learned",
                f"After {count} tasks " + ", ".join(f"{s.label} {s.y[-1]:.0f} %" for s in so_far),
            ),
            caption="Accuracy on the first task, and mean accuracy on the tasks met so far, as more of them follow.",
            title="A longer sequence",
        )
    )
    return metrics
