"""Early exit, network: a residual network with a way out after each stage; an image leaves where it is sure enough."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from pipelines.config import INERT, config
from pipelines.errors import Problem, UserError
from pipelines.problems.exercise import Answer, Figure
from pipelines.problems.image_data import ImageExerciseConfig

if TYPE_CHECKING:
    from pipelines.problems.early_exit_layers import ExitPoint


@config
class EarlyExitNetworkConfig(ImageExerciseConfig):
    """Train a residual network with exits, and measure what leaving early costs in accuracy and saves in work."""

    output_dir: str = Field(
        "runs/early_exit_network", description="folder the stage writes into", json_schema_extra=INERT
    )
    width: int = Field(16, ge=1, le=256, description="channels of the first stage (64 in ResNet-18)")
    stages: int = Field(4, ge=2, le=5, description="stages, each of twice the channels; an exit after each")
    blocks: int = Field(2, ge=1, le=8, description="residual blocks of a stage")
    small_width: int = Field(16, ge=1, le=256, description="channels of the smaller plain network")
    small_blocks: int = Field(1, ge=1, le=8, description="residual blocks of a stage of the smaller plain network")
    early_weight: float = Field(0.3, ge=0, description="weight of each early exit's loss; the last exit's is 1")
    thresholds: list[float] = Field(
        [0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.9, 2.4],
        min_length=3,
        max_length=50,
        description="entropies in nats, rising from 0: an image leaves at the first exit whose entropy is under it",
    )
    epochs: int | None = Field(None, ge=1, description="passes over the images; null: 12 on the digits, 2 on others")
    batch_size: int = Field(64, ge=2, description="images of a step")
    learning_rate: float = Field(3e-3, gt=0, description="peak rate of AdamW")
    weight_decay: float = Field(1e-2, ge=0, description="decoupled weight decay")
    validation_fraction: float = Field(
        0.15, gt=0, lt=1, description="share of the training images by which the threshold is chosen"
    )
    seeds: int = Field(3, ge=1, le=20, description="trainings of each network")
    timed_images: int = Field(40, ge=1, description="images that are timed one at a time")
    timed_batch: int = Field(256, ge=1, description="images that are timed together")
    timed_repeats: int = Field(4, ge=1, description="times that each is timed; the least counts")

    @property
    def epoch_count(self) -> int:
        """Passes over the training images."""
        return self.epochs or (12 if self.embedded else 2)

    def problems(self) -> list[Problem]:
        found = super().problems()
        if self.thresholds != sorted(set(self.thresholds)) or self.thresholds[0] != 0:
            mend = "give rising entropies in nats from 0 on, such as [0, 0.1, 0.5, 1]"
            found.append(Problem("thresholds", self.thresholds, "do not rise from 0", mend))
        return found


def early_exit_network(config: EarlyExitNetworkConfig) -> dict[str, float]:
    """Train the network with exits and its plain rivals over several seeds, and measure accuracy, work and time.

    The threshold that the answer quotes is where the curve of accuracy over work bends on images held out of the
    training; accuracies are those of the test images.

    Returns:
        Means over seeds with Student's interval: ``early_exit_network/baseline_accuracy``, ``…/small_accuracy``,
        ``…/accuracy`` and ``…/macs_share`` (at that threshold, of the baseline's work), ``…/loss_of_accuracy``;
        ``…/threshold``; ``…/single_speedup`` and ``…/batch_speedup`` (wall-clock at
        that threshold, first seed), ``…/single_processor_speedup`` and ``…/batch_processor_speedup`` (processor time);
        ``…/checks`` and ``…/checks_failed``.

    Raises:
        UserError: images that cannot be read, have no labels or do not fill a batch; several processes.
    """
    from pipelines.problems.early_exit_training import measured
    from pipelines.problems.image_data import load_labelled
    from pipelines.problems.machine import own_device
    from pipelines.seq2seq.shards import run_shards

    images = load_labelled(config, own_device())
    if len(images.train) * (1 - config.validation_fraction) < config.batch_size + 1:
        problem = f"{len(images.train)} training images do not fill it once some are held out"
        raise UserError("batch_size", config.batch_size, problem, "give more images or a smaller batch")
    seeds = [config.seed + number for number in range(config.seeds)]

    def work(rows: Sequence[int], what: str) -> list[Any]:
        return [measured(seed, images, config, timed=seed == config.seed) for seed in rows]

    runs = run_shards(config.output_dir, "seeds", seeds, work, size=1)
    answer = Answer(config, "early_exit_network", "Early exit, network: leave where you are sure")
    answer.value(
        train_images=len(images.train),
        test_images=len(images.test),
        seeds=config.seeds,
        width=config.width,
        stages=config.stages,
        blocks=config.blocks,
        early_weight=config.early_weight,
    )
    _check_work(answer, runs[0], tuple(images.test.images.shape[1:]), images.classes, config)
    metrics = _report(answer, runs, config)
    return answer.write() | metrics


def _check_work(
    answer: Answer, run: dict[str, Any], shape: tuple[int, ...], classes: int, config: EarlyExitNetworkConfig
) -> None:
    """The counted work against a convolution by hand and torch's own counter; skipping against doing everything."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from pipelines.problems.early_exit_layers import StagedNetwork, counted_macs

    channels, height, side = shape
    network = StagedNetwork(channels, classes, config.width, config.stages, config.blocks, exits=False).eval()
    layer, some = network.stages[0][0].body[3], torch.zeros(1, config.width, height, side)
    with counted_macs(layer) as total, torch.no_grad():
        layer(some)
    by_hand = height * side * config.width * config.width * 3 * 3
    statement = f"MACs of a 3×3 convolution of {config.width} channels on {height}×{side} pixels = H·W·C·C·9"
    answer.check(statement, total[0], by_hand, 0, "the hook's count; expected worked out by hand")
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        network(torch.zeros(1, *shape))
    route = "torch.utils.flop_counter, 2 operations for each"
    answer.check("MACs of the plain network", run["baseline"]["macs"], counter.get_total_flops() / 2, 0, route)
    skipping = run["skipping"]
    at = config.thresholds.index(skipping["threshold"])
    _, accuracy, macs, _ = run["test"][at]
    route = "hooks, while images that left were really taken out of the batch"
    statement = f"mean MACs at a threshold of {skipping['threshold']:g} nats = Σ share of exit · MACs to it"
    answer.check(statement, skipping["macs"], macs, 1e-6 * macs, route)
    statement = "accuracy with skipping = accuracy read off all exits"
    answer.check(statement, skipping["accuracy"], accuracy, 1e-9, "the test images really leaving early")
    route = "64 test images in a batch and one by one, float64"
    answer.check("logits in a batch − logits alone", skipping["alone_difference"], 0, 1e-9, route)
    answer.check("images that leave by another exit when alone", skipping["alone_other_exit"], 0, 0, route)


def _points(runs: list[dict[str, Any]], part: str) -> list[ExitPoint]:
    """Means over the seeds at each threshold."""
    import numpy as np

    from pipelines.problems.early_exit_layers import ExitPoint

    found = []
    for same in zip(*(run[part] for run in runs), strict=True):
        shares = np.mean([point[3] for point in same], axis=0)
        means = [float(np.mean([point[i] for point in same])) for i in range(3)]
        found.append(ExitPoint(*means, tuple(map(float, shares))))
    return found


def _report(answer: Answer, runs: list[dict[str, Any]], config: EarlyExitNetworkConfig) -> dict[str, float]:
    from pipelines.problems.early_exit_layers import least_winning
    from pipelines.problems.fits import bend, seed_interval

    baseline, small = (seed_interval([run[name]["accuracy"] for run in runs]) for name in ("baseline", "small"))
    full, lesser = runs[0]["baseline"]["macs"], runs[0]["small"]["macs"]
    validation, test = _points(runs, "validation"), _points(runs, "test")
    at = bend([p.macs for p in validation], [p.accuracy for p in validation])
    chosen = test[at]
    reached = seed_interval([run["test"][at][1] for run in runs])
    share = seed_interval([run["test"][at][2] / full for run in runs])
    loss = seed_interval([run["baseline"]["accuracy"] - run["test"][at][1] for run in runs])
    answer.value(
        threshold=chosen.threshold,
        accuracy=chosen.accuracy,
        macs_share=chosen.macs / full,
        baseline_accuracy=baseline.value,
        baseline_macs=full,
        early_last_accuracy=test[0].accuracy,
        small_accuracy=small.value,
        small_macs_share=lesser / full,
        points_lost=100 * loss.value,
    )
    answer.table(
        "networks",
        ["network", "parameters", "MACs an image", "of the baseline's", "test accuracy (95 %)"],
        [
            ["baseline, no exits", f"{runs[0]['baseline']['parameters']:,}", f"{full:,}", "1.000", baseline.shown()],
            [
                f"with exits, threshold {chosen.threshold:g}",
                f"{runs[0]['early']['parameters']:,}",
                f"{chosen.macs:,.0f}",
                share.shown(),
                reached.shown(),
            ],
            [
                f"smaller, no exits ({config.small_width} channels, {config.small_blocks} a stage)",
                f"{runs[0]['small']['parameters']:,}",
                f"{lesser:,}",
                f"{lesser / full:.3f}",
                small.shown(),
            ],
        ],
        "Means over seeds. The threshold is where the curve bends on images held out of the training.",
    )
    winner = least_winning(test, small.value, lesser)
    answer.table(
        "against_small",
        ["least threshold that beats the smaller network", "accuracy", "MACs of the baseline's"],
        [
            [f"{winner.threshold:g} nats", f"{winner.accuracy:.4f}", f"{winner.macs / full:.3f}"]
            if winner
            else ["none of those tried", "–", "–"],
            ["the smaller network itself", f"{small.value:.4f}", f"{lesser / full:.3f}"],
        ],
        "To beat it: at least as accurate, at no more multiply-accumulates.",
    )
    _exits_table(answer, runs, at, config)
    _draw(answer, test, full, baseline.value, (lesser / full, small.value), chosen)
    speeds = _times(answer, runs[0], chosen.threshold, config)
    metrics = {"early_exit_network/threshold": chosen.threshold, **speeds}
    for name, interval in (
        ("baseline_accuracy", baseline),
        ("small_accuracy", small),
        ("accuracy", reached),
        ("macs_share", share),
        ("loss_of_accuracy", loss),
    ):
        key = f"early_exit_network/{name}"
        metrics |= {key: interval.value, f"{key}_ci_low": interval.low, f"{key}_ci_high": interval.high}
    return metrics


def _exits_table(answer: Answer, runs: list[dict[str, Any]], at: int, config: EarlyExitNetworkConfig) -> None:
    import numpy as np

    full = runs[0]["baseline"]["macs"]
    rows = []
    for number, macs in enumerate(runs[0]["exit_macs"]):
        share = np.mean([run["test"][at][3][number] for run in runs])
        seen = [run["by_exit"][at][number] for run in runs if run["by_exit"][at][number]]
        right, sure = (f"{np.mean([pair[i] for pair in seen]):.3f}" if seen else "–" for i in (0, 1))
        rows.append([number + 1, f"{macs:,}", f"{macs / full:.3f}", f"{share:.3f}", right, sure])
    answer.table(
        "exits",
        ["exit", "MACs to it", "of the baseline's", "share leaving", "their accuracy", "their confidence"],
        rows,
        f"At a threshold of {config.thresholds[at]:g} nats. Confidence is the mean of the largest probability.",
    )


def _draw(
    answer: Answer,
    test: list[ExitPoint],
    full: int,
    baseline: float,
    small: tuple[float, float],
    chosen: ExitPoint,
) -> None:
    from pipelines.reporting import plots
    from pipelines.reporting.plots import Panel, Series

    work = [p.macs / full for p in test]
    series = [
        Series("with exits", work, [100 * p.accuracy for p in test]),
        Series("bend", [chosen.macs / full], [100 * chosen.accuracy], colour=1),
        Series("baseline", [1.0], [100 * baseline], colour=2),
        Series("smaller", [small[0]], [100 * small[1]], colour=3),
    ]
    alt = (
        f"Accuracy from {100 * test[-1].accuracy:.1f} % at {work[-1]:.2f} of the work to {100 * test[0].accuracy:.1f} %"
    )
    answer.figure(
        Figure(
            "curve",
            svg=plots.lines(
                "early_exit_network-curve", [Panel(series, "test accuracy, %")], "MACs, share of the baseline's", alt
            ),
            caption="A dot is a threshold: down to the bend work is saved at little loss; below it accuracy falls.",
            title="Accuracy against work",
        )
    )
    x = [p.threshold for p in test]
    shares = [
        Series(f"exit {i + 1}", x, [100 * p.shares[i] for p in test], colour=i) for i in range(len(test[0].shares))
    ]
    alt = "; ".join(f"{s.label}: from {s.y[0]:.0f} % to {s.y[-1]:.0f} %" for s in shares)
    panels = [Panel(shares, "images leaving, %"), Panel([Series("", x, work)], "MACs, of baseline", zero=True)]
    answer.figure(
        Figure(
            "shares",
            svg=plots.lines("early_exit_network-shares", panels, "entropy threshold, nats", alt),
            caption="The higher the threshold, the more images leave by the first exit and the less is computed.",
            title="Who leaves where",
        )
    )


def _times(answer: Answer, run: dict[str, Any], chosen: float, config: EarlyExitNetworkConfig) -> dict[str, float]:
    """Table and figure of the times; the speed-ups at the chosen threshold."""
    from pipelines.reporting import plots
    from pipelines.reporting.plots import Panel, Series

    rows, speeds, panels = [], {}, []
    labels = {"baseline": "baseline", "small": "smaller", f"{chosen:g}": f"with exits, {chosen:g} nats"}
    for kind, label in (("single", "one at a time"), ("batch", f"{config.timed_batch} together")):
        seconds = run["seconds"][kind]
        base_wall, base_processor = seconds["baseline"]
        for name, shown in labels.items():
            wall, processor = seconds[name]
            faster = [f"{base_wall / wall:.2f}", f"{base_processor / processor:.2f}"]
            rows.append([shown, label, f"{1e6 * wall:,.0f}", f"{1e6 * processor:,.0f}", *faster])
        wall, processor = seconds[f"{chosen:g}"]
        speeds[f"{kind}_speedup"], speeds[f"{kind}_processor_speedup"] = base_wall / wall, base_processor / processor
        x = config.thresholds
        curves = [
            Series("with exits", x, [1e6 * seconds[f"{t:g}"][1] for t in x], colour=0),
            Series("baseline", [x[0], x[-1]], [1e6 * base_processor] * 2, colour=2),
        ]
        panels.append(Panel(curves, f"µs, {label}", zero=True))
    columns = ["network", "images", "µs an image", "of the processor", "times as fast", "by the processor's clock"]
    caption = f"One thread, the least of {config.timed_repeats} turns: by the clock on the wall, and of the processor."
    answer.table("times", columns, rows, caption)
    answer.value(**speeds)
    single, batch = speeds["single_speedup"], speeds["batch_speedup"]
    alt = f"At {chosen:g} nats {single:.2f} times as fast one by one, {batch:.2f} times in a batch"
    answer.figure(
        Figure(
            "times",
            svg=plots.lines("early_exit_network-times", panels, "entropy threshold, nats", alt),
            caption="The processor's clock follows the work: the more leave early, the less time an image takes.",
            title="Time an image",
        )
    )
    return {f"early_exit_network/{name}": value for name, value in speeds.items()}
