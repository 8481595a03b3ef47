"""Learning instead of writing the prompt: soft prompts, and beside them LoRA and full fine-tuning, by one trainer.

A stage trains one method several times: from ``repeats`` seeds, on all training examples and on fewer. Each training is
measured on the same held-out examples, in the same way as a written prompt is.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from pipelines.config import INERT, Source, config, looks_local
from pipelines.errors import Problem, UserError, problems_of
from pipelines.prompting.backends_fields import check_local
from pipelines.prompting.soft_methods import MethodFields
from pipelines.prompting.strategies import Strategy, load_strategies
from pipelines.prompting.tasks import Example, Task, TaskFields, TaskKind
from pipelines.seq2seq.training import TrainingConfig
from pipelines.stage import CHECKPOINTS, write_json

if TYPE_CHECKING:
    import numpy as np

RESULTS_FILE = "results.json"
_RUN_FILE = "training.json"
_BARE: dict[TaskKind, dict[str, Any]] = {
    "words": {"like": "few_shot", "shots": 0},
    "multiple_choice": {"like": "few_shot", "shots": 0},
    "summarization": {"like": "tldr"},
}
"""What the model reads of an example where nothing is said: no instruction, which the soft prompt is to replace."""


@config
class SoftConfig(TaskFields, MethodFields, TrainingConfig):
    """Train a soft prompt, adapters or all parameters on a task, and measure what was trained."""

    output_dir: str = Field("runs/soft", description="folder the stage writes into", json_schema_extra=INERT)
    model: Source = Field(description="folder or hub id of a causal or encoder-decoder model")
    strategy: dict[str, Any] | None = Field(
        None,
        description="how an example is written: fields of a strategy, or {like: NAME, …}, without shots; null: bare",
    )
    repeats: int = Field(1, ge=1, description="trainings from different seeds: seed, seed + 1, …")
    train_sizes: list[int] = Field(
        default_factory=list, description="train on so many examples as well, drawn anew for each seed"
    )
    split: Literal["validation", "test"] = Field("test", description="split that is measured")
    max_new_tokens: int = Field(16, ge=1, description="tokens of an answer at most, where the strategy does not say")
    generation_batch_size: int = Field(64, ge=1, description="answers made at a time", json_schema_extra=INERT)
    resamples: int = Field(2000, ge=100, description="bootstrap resamples behind each interval")

    def problems(self) -> list[Problem]:
        found = super().problems()
        found += problems_of(partial(check_local, self.model, "model"), self.written)
        smallest = self.batch_size * self.gradient_accumulation
        for number, size in enumerate(self.train_sizes):
            if size < smallest:
                mend = f"give {smallest} or more, or a smaller batch_size"
                found.append(Problem(f"train_sizes.{number}", size, f"one step takes {smallest} examples", mend))
        if len(set(self.train_sizes)) < len(self.train_sizes):
            found.append(Problem("train_sizes", self.train_sizes, "names a size twice", "give each once"))
        if self.push_to_hub and looks_local(self.model) and self.method != "full":
            mend = "give model= as a hub id, or leave push_to_hub out"
            found.append(Problem("push_to_hub", True, "the adapter would name a folder of this machine", mend))
        return found

    def written(self) -> Strategy:
        """The strategy.

        Raises:
            UserError: it has shots, or an unknown field or placeholder.
        """
        table = _BARE[self.task] if self.strategy is None else self.strategy
        try:
            found = load_strategies({"strategy": table}, self.task)["strategy"]
        except UserError as error:
            mine = [dataclasses.replace(p, what=p.what.removeprefix("strategies.")) for p in error.problems]
            raise UserError.of(mine) from None
        if found.shots:
            mend = "give shots: 0: the examples are what it is trained on"
            raise UserError("strategy.shots", found.shots, "a soft prompt is trained without solved examples", mend)
        return found

    def trainings(self, available: int) -> list[tuple[int, int]]:
        """(examples, seed) of every training, those on most examples first.

        Raises:
            UserError: more examples are asked for than there are.
        """
        for size in self.train_sizes:
            if size < self.init_shots:
                mend = f"give {self.init_shots} or more, or fewer init_shots"
                raise UserError("train_sizes", size, f"init_shots={self.init_shots} are drawn from it", mend)
            if size > available:
                mend = f"give {available} or less"
                raise UserError("train_sizes", size, f"there are {available} training examples", mend)
        sizes = sorted({available, *self.train_sizes}, reverse=True)
        return [(size, self.seed + repeat) for size in sizes for repeat in range(self.repeats)]


def run_name(examples: int, seed: int) -> str:
    """The folder of one training."""
    return f"{examples}-examples-seed{seed}"


def soft(config: SoftConfig) -> dict[str, float]:
    """Train a method from every seed on every number of examples, and measure each training.

    Writes, of each training, the adapter as PEFT saves it (of full fine-tuning the model), its tokenizer,
    ``predictions.jsonl`` and ``log_history.json`` into ``output_dir/<n>-examples-seed<s>``; and ``results.json``, what
    the comparison reads: the measured value of each example in each training. The log of the first training is that of
    the stage.

    Returns:
        ``soft/accuracy`` (of summaries ``soft/rouge1``), the mean over the seeds on all training examples, also for the
        groups of examples there are (``soft/accuracy_regular``, ``soft/accuracy_irregular``) and for the smaller
        training sets (``soft/accuracy_16``), with intervals that resample both seeds and examples;
        ``soft/valid_rate``; ``soft/train_loss`` (nats an answer's token, last logged mean, over seeds);
        ``soft/trainable_parameters``, ``soft/parameters``, ``soft/train_examples``, ``soft/steps``, ``soft/seeds``,
        ``soft/examples``.

    Raises:
        UserError: unusable data, model, strategy or sizes; fewer examples than a step takes.
    """
    from accelerate import PartialState

    from pipelines.prompting.tasks import load_task

    state = PartialState()
    task = load_task(config, ("train", config.split))
    measured = getattr(task, config.split)
    for split, examples in (("train", task.train), (config.split, measured)):
        if not examples:
            raise UserError("dataset", config.dataset, f"has no examples for {split}", "give some")
    done = []
    for size, seed in config.trainings(len(task.train)):
        folder = Path(config.output_dir) / run_name(size, seed)
        if not (folder / _RUN_FILE).exists():
            _train(config, task, measured, size, seed, folder)
        state.wait_for_everyone()
        done.append(json.loads((folder / _RUN_FILE).read_text(encoding="utf-8")))
    results = {
        "task": config.task,
        "metric": task.metric,
        "method": config.method,
        "model": config.model,
        "ids": [example.id for example in measured],
        "inputs": [example.input for example in measured],
        "groups": [example.group for example in measured],
        "references": [list(example.references) or [example.answer] for example in measured],
        "runs": done,
    }
    if state.is_main_process:
        write_json(Path(config.output_dir) / RESULTS_FILE, results)
        first = Path(config.output_dir) / run_name(*config.trainings(len(task.train))[0])
        shutil.copy(first / "log_history.json", Path(config.output_dir) / "log_history.json")
    state.wait_for_everyone()
    return _metrics(config, results)


@dataclass
class Fitted:
    """A training that has ended.

    Attributes:
        model: as it was trained, PEFT's around it where there is one.
        tokenizer: its tokenizer.
        trainer: that trained it.
        steps: optimizer steps.
        parameters: of the model without what was added.
    """

    model: Any
    tokenizer: Any
    trainer: Any
    steps: int
    parameters: int


def fit(config: SoftConfig, train: list[Example], size: int, seed: int) -> Fitted:
    """Train the method on ``size`` of the examples, from a seed; goes on where a killed run's last checkpoint is.

    Raises:
        UserError: an unusable model, or examples that do not fit into it or do not fill a step.
    """
    from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainingArguments

    from pipelines.prompting.backends_local import load_local
    from pipelines.prompting.backends_text import Reader
    from pipelines.prompting.soft_data import CausalCollator, answer_rows
    from pipelines.prompting.soft_methods import virtual_tokens, with_method
    from pipelines.prompting.soft_trainer import PromptTrainer
    from pipelines.prompting.strategies import draw_shots, render
    from pipelines.seq2seq.sft_trainer import ExampleSchedule
    from pipelines.seq2seq.training import checkpoint_marker, optimizer_choice, training_arguments
    from pipelines.training import global_batch, last_checkpoint

    strategy, settings = config.written(), dataclasses.replace(config, seed=seed)
    model, tokenizer = load_local(config.model, "model")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    parameters = sum(p.numel() for p in model.parameters())
    examples = draw_shots(train, size, seed)
    text = solved(strategy, examples[: config.init_shots]) if config.init_shots else config.init_text
    model = with_method(model, settings, tokenizer, seed=seed, text=text)
    reader = Reader(
        tokenizer,
        model.config,
        name=config.model,
        virtual_tokens=virtual_tokens(config, tokenizer, text),
        ends=model.generation_config.eos_token_id,
    )
    prompts = [render(strategy, example, []) for example in examples]
    rows = answer_rows(reader, prompts, end=strategy.stop, open_end=config.task != "multiple_choice")
    batch = global_batch(settings, size, noun="examples")
    steps = config.max_steps if config.max_steps > 0 else max(1, math.ceil(config.epochs * (size // batch)))
    checkpoints = f"{CHECKPOINTS}/{run_name(size, seed)}"
    schedule = ExampleSchedule(rows, steps=steps, global_batch=batch, seed=seed)
    collator = CausalCollator(tokenizer.pad_token_id)
    if reader.encodes:
        collator = DataCollatorForSeq2Seq(tokenizer, model=model)
    trainer = PromptTrainer(
        model=model,
        args=training_arguments(
            settings,
            Seq2SeqTrainingArguments,
            output_dir=str(Path(config.output_dir) / checkpoints),
            max_steps=steps,
            num_train_epochs=1,
            train_sampling_strategy="sequential",
            eval_strategy="no",
            remove_unused_columns=False,
            label_names=["labels"],
        ),
        train_dataset=schedule,
        data_collator=collator,
        processing_class=tokenizer,
        callbacks=[checkpoint_marker()],
    )
    trainer.optimizer_cls_and_kwargs = optimizer_choice(settings)
    trainer.schedule = schedule
    trainer.train(resume_from_checkpoint=last_checkpoint(config, checkpoints))
    return Fitted(trainer.accelerator.unwrap_model(trainer.model).eval(), tokenizer, trainer, steps, parameters)


def _train(config: SoftConfig, task: Task, measured: list[Example], size: int, seed: int, folder: Path) -> None:
    """One training, saved and measured: its folder is written whole or not at all."""
    from accelerate import PartialState

    from pipelines.prompting.soft_methods import trainable_parameters
    from pipelines.seq2seq.training import save_history

    fitted, state = fit(config, task.train, size, seed), PartialState()
    work = folder.with_name(f".{folder.name}.partial")
    if state.is_main_process:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        fitted.model.save_pretrained(work)
        fitted.tokenizer.save_pretrained(work)
        (work / "README.md").unlink(missing_ok=True)
    state.wait_for_everyone()
    history = save_history(fitted.trainer, dataclasses.replace(config, output_dir=str(work)))
    if not state.is_main_process:
        return
    losses = [entry["loss"] for entry in history if "loss" in entry]
    trained = trainable_parameters(fitted.model)
    found = measure(config, fitted.model, fitted.tokenizer, config.written(), measured)
    lines = [
        {"id": e.id, "input": e.input, "answer": e.answer, "output": output, "kind": kind}
        for e, output, kind in zip(measured, found["outputs"], found["kinds"], strict=True)
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (work / "predictions.jsonl").write_text(text, encoding="utf-8")
    table = {
        "examples": size,
        "seed": seed,
        "steps": fitted.steps,
        "train_loss": losses[-1] if losses else 0.0,
        "trainable_parameters": trained,
        "parameters": fitted.parameters,
        "values": found["values"],
        "valid": [kind in ("right", "plausible") for kind in found["kinds"]],
    }
    write_json(work / _RUN_FILE, table)
    work.rename(folder)


def solved(strategy: Strategy, examples: list[Example]) -> str:
    """Solved examples as they stand at the beginning of a prompt, behind its instruction."""
    from pipelines.prompting.strategies import render

    whole, bare = (render(strategy, examples[0], shots).text for shots in (examples, []))
    return whole[: len(whole) - len(bare) + len(strategy.instruction.format())]


def measure(
    config: SoftConfig, model: Any, tokenizer: Any, strategy: Strategy, examples: list[Example]
) -> dict[str, list[Any]]:
    """What a trained model answers: for each example its output, the kind of answer and the measured value.

    The model is used up: a soft prompt made of vectors is put into batches with padding (``soft_batch``).
    """
    from pipelines.prompting.backends import Sampling
    from pipelines.prompting.backends_local import LocalBackend
    from pipelines.prompting.scoring import judge_generation, judge_scores
    from pipelines.prompting.soft_batch import MixedBackend, prompt_vectors
    from pipelines.prompting.strategies import render

    settings = {"name": config.method, "batch_size": config.generation_batch_size}
    prompts = [render(strategy, example, []) for example in examples]
    texts = [prompt.text for prompt in prompts]
    if config.method in ("prompt_tuning", "p_tuning"):
        vectors = {config.method: prompt_vectors(model)}
        backend: LocalBackend = MixedBackend(model.get_base_model(), tokenizer, vectors, **settings)
        texts = [backend.marked(config.method, text) for text in texts]
    else:
        backend = LocalBackend(model, tokenizer, **settings)
    if config.task == "multiple_choice":
        scores = backend.choice_log_probs(texts, [prompt.choices for prompt in prompts])
        verdicts = [judge_scores(*given) for given in zip(scores, examples, [p.choices for p in prompts], strict=True)]
        outputs = [verdict.answer or "" for verdict in verdicts]
    else:
        sampling = Sampling(max_new_tokens=strategy.max_new_tokens or config.max_new_tokens, stop=strategy.stop)
        made = [several[0] for several in backend.generate(texts, sampling)]
        outputs = [generation.text.strip() for generation in made]
        verdicts = [judge_generation(g, example, config.task) for g, example in zip(made, examples, strict=True)]
    if config.task == "summarization":
        from pipelines.seq2seq.metrics import rouge

        references = [example.references or (example.answer,) for example in examples]
        values = [float(value) for value in rouge(outputs, references, ("rouge1",))["rouge1"]]
    else:
        values = [float(verdict.right) for verdict in verdicts]
    return {"outputs": outputs, "kinds": [verdict.kind for verdict in verdicts], "values": values}


def values_of(results: dict[str, Any], examples: int | None = None) -> np.ndarray:
    """(S, N) measured values of the trainings on so many examples (on most, where None), one row a seed."""
    import numpy as np

    size = max(run["examples"] for run in results["runs"]) if examples is None else examples
    return np.array([run["values"] for run in results["runs"] if run["examples"] == size], dtype=float)


def _metrics(config: SoftConfig, results: dict[str, Any]) -> dict[str, float]:
    import numpy as np

    from pipelines.prompting.compare_math import crossed_metric

    interval = {"resamples": config.resamples, "seed": config.seed}
    key = f"soft/{results['metric']}"
    values = values_of(results)
    found = crossed_metric(key, values, **interval)
    groups = np.array(results["groups"])
    for group in sorted(set(results["groups"]) - {""}):
        found |= crossed_metric(f"{key}_{group}", values[:, groups == group], **interval)
    sizes = sorted({run["examples"] for run in results["runs"]})
    for size in sizes[:-1]:
        found |= crossed_metric(f"{key}_{size}", values_of(results, size), **interval)
    whole = [run for run in results["runs"] if run["examples"] == sizes[-1]]
    found |= crossed_metric("soft/valid_rate", np.array([run["valid"] for run in whole], dtype=float), **interval)
    return found | {
        "soft/train_loss": float(np.mean([run["train_loss"] for run in whole])),
        "soft/trainable_parameters": float(whole[0]["trainable_parameters"]),
        "soft/parameters": float(whole[0]["parameters"]),
        "soft/train_examples": float(sizes[-1]),
        "soft/steps": float(whole[0]["steps"]),
        "soft/seeds": float(len(whole)),
        "soft/examples": float(len(results["ids"])),
    }
