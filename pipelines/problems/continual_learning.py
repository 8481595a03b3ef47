"""Continual learning: permuted digits one task after another, learned plainly, with EWC and with rehearsal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from pipelines.config import INERT, config
from pipelines.errors import Problem, UserError
from pipelines.problems.exercise import Answer
from pipelines.problems.image_data import ImageExerciseConfig

if TYPE_CHECKING:
    from pipelines.problems.continual_training import Run
    from pipelines.problems.image_data import Labelled, LabelledSet


@config
class ContinualLearningConfig(ImageExerciseConfig):
    """Learn permuted images task after task by SGD, naively, with EWC and with rehearsal, over several seeds."""

    output_dir: str = Field(
        "runs/continual_learning", description="folder the stage writes into", json_schema_extra=INERT
    )
    tasks: int = Field(3, ge=2, le=50, description="permutations learned one after another; the first is none")
    long_tasks: int = Field(10, ge=2, le=50, description="tasks of a longer sequence, which the first network learns")
    networks: list[Literal["mlp", "cnn"]] = Field(["mlp", "cnn"], min_length=1, description="which networks learn")
    hidden: int = Field(100, ge=2, le=4096, description="units of each of the perceptron's two hidden layers")
    channels: int = Field(8, ge=1, le=256, description="channels of the first of the network's two convolutions")
    epochs: int | None = Field(None, ge=1, description="passes over a task; null: 8 on the digits, 3 on other data")
    batch_size: int | None = Field(
        None, ge=1, description="images of a step; null: 32 on the digits, which are few, 256 on other data"
    )
    learning_rate: float = Field(0.01, gt=0, description="of SGD")
    momentum: float = Field(0.9, ge=0, lt=1, description="of SGD, begun afresh with each task")
    lambdas: list[float] = Field(
        [3.0, 10.0, 30.0, 100.0], min_length=1, max_length=20, description="λ of EWC's penalty λ Σ F (θ − θ*)²"
    )
    memories: list[int] = Field(
        [10, 40, 160], min_length=1, max_length=20, description="images kept of each task for rehearsal"
    )
    fisher_examples: int = Field(200, ge=1, description="training images of a task by which its Fisher is estimated")
    fisher_labels: Literal["expected", "sampled", "data"] = Field(
        "expected",
        description="labels of the Fisher's gradients: all, by their probability; drawn from the model, faster "
        "and noisy; the data's own (the empirical Fisher)",
    )
    validation_fraction: float = Field(0.1, gt=0, lt=1, description="share of the training images by which λ is chosen")
    seeds: int = Field(3, ge=1, le=50, description="sequences of each method, each with its own tasks and weights")

    @property
    def epoch_count(self) -> int:
        """Passes over each task."""
        return self.epochs or (8 if self.embedded else 3)

    @property
    def batch(self) -> int:
        """Images of a step."""
        return self.batch_size or (32 if self.embedded else 256)

    def problems(self) -> list[Problem]:
        found = super().problems()
        for name in ("lambdas", "memories"):
            values = getattr(self, name)
            if values != sorted(set(values)) or values[0] <= 0:
                mend = "give rising numbers, each once"
                found.append(Problem(name, values, "do not rise from above 0", mend))
        if len(set(self.networks)) != len(self.networks):
            found.append(Problem("networks", self.networks, "names one twice", "name each once"))
        return found


def continual_learning(config: ContinualLearningConfig) -> dict[str, float]:
    """Learn every sequence, choose λ on images held out of the training, compare on test images; study the Fisher.

    Returns:
        For each network and each of naive, ewc (at the λ chosen), rehearsal (at the largest memory):
        ``continual_learning/NETWORK_METHOD_accuracy`` (average accuracy) and ``…_forgetting``, with Student's interval
        over seeds; of the longer sequence ``continual_learning/long_METHOD_accuracy``;
        ``continual_learning/NETWORK_lambda``; ``…/checks`` and ``…/checks_failed``.

    Raises:
        UserError: images that cannot be read, have no labels or are too few; several processes.
    """
    from pipelines.problems.continual_report import report
    from pipelines.problems.continual_study import study_fisher
    from pipelines.problems.image_data import load_labelled
    from pipelines.problems.machine import own_device

    images = load_labelled(config, own_device())
    images, validation = _split(images, config)
    answer = Answer(config, "continual_learning", "Continual learning: permuted digits")
    results = _learned(_short_runs(config), images, validation, config)
    chosen = {name: best_lambda(results, name, config.tasks) for name in config.networks}
    longer = _learned(_long_runs(config), images, validation, config, "long")
    long_lambda = best_lambda(longer, config.networks[0], config.long_tasks)
    longer |= _learned(_long_repeats(config, long_lambda), images, validation, config, "long_repeats")
    study_fisher(answer, images, config)
    metrics = report(answer, results | longer, chosen, long_lambda, images, config)
    return answer.write() | metrics


def _split(images: LabelledSet, config: ContinualLearningConfig) -> tuple[LabelledSet, Labelled]:
    import torch

    from pipelines.problems.image_data import LabelledSet

    count = round(len(images.train) * config.validation_fraction)
    if count < 1 or len(images.train) - count < config.batch:
        problem = f"one step takes {config.batch} images once some are held out"
        mend = "give more images, or a smaller batch_size"
        raise UserError("dataset", f"{len(images.train)} training images", problem, mend)
    order = torch.randperm(len(images.train), generator=torch.Generator().manual_seed(config.split_seed))
    order = order.to(images.train.labels.device)
    return LabelledSet(images.train[order[count:]], images.test, images.classes), images.train[order[:count]]


def _short_runs(config: ContinualLearningConfig) -> list[Run]:
    from pipelines.problems.continual_training import Run

    found = []
    for network in config.networks:
        methods = [("naive", 0.0)]
        methods += [("ewc", value) for value in config.lambdas]
        methods += [("rehearsal", float(value)) for value in config.memories]
        if network == config.networks[0]:
            methods += [("shortcut", value) for value in config.lambdas]
        for method, value in methods:
            found += [Run(network, method, value, config.tasks, config.seed + i) for i in range(config.seeds)]
    return found


def _long_runs(config: ContinualLearningConfig) -> list[Run]:
    """Of the longer sequence: everything but EWC on all seeds, and EWC with every λ on the first seed."""
    from pipelines.problems.continual_training import Run

    first, tasks = config.networks[0], config.long_tasks
    others = (("naive", 0.0), ("rehearsal", float(config.memories[-1])))
    found = [Run(first, *method, tasks, config.seed + i) for method in others for i in range(config.seeds)]
    return found + [Run(first, "ewc", value, tasks, config.seed) for value in config.lambdas]


def _long_repeats(config: ContinualLearningConfig, strength: float) -> list[Run]:
    """EWC of the longer sequence with the λ that was chosen, on the other seeds."""
    from pipelines.problems.continual_training import Run

    return [
        Run(config.networks[0], "ewc", strength, config.long_tasks, config.seed + i) for i in range(1, config.seeds)
    ]


def _learned(
    runs: list[Run], images: LabelledSet, validation: Labelled, config: ContinualLearningConfig, name: str = "short"
) -> dict[Run, Any]:
    """What each run gave; a stage that was killed does not learn again what it had learned."""
    from pipelines.problems.continual_training import learn_sequence
    from pipelines.seq2seq.shards import run_shards

    def work(rows: Sequence[Run], what: str) -> list[Any]:
        return [learn_sequence(run, images, validation, config) for run in rows]

    return dict(zip(runs, run_shards(config.output_dir, name, runs, work, size=1), strict=True))


def best_lambda(results: dict[Run, Any], network: str, tasks: int) -> float:
    """EWC's λ of the highest average accuracy on the validation images, mean over seeds; the smallest of equal ones.

    Args:
        results: run -> what ``learn_sequence`` returned.
        network: which network's.
        tasks: how many the sequence has.
    """
    ends: dict[float, list[float]] = {}
    for run, found in results.items():
        if (run.network, run.method, run.tasks) == (network, "ewc", tasks):
            last = found["validation"][-1]
            ends.setdefault(run.value, []).append(sum(last) / len(last))
    return max(sorted(ends), key=lambda value: sum(ends[value]) / len(ends[value]))
