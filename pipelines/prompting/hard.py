"""Hard prompts: strategies asked of models and endpoints, their answers judged, paired and compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from pipelines.config import INERT, StageConfig, config
from pipelines.errors import Problem, UserError, problems_of
from pipelines.prompting.backends import Sampling
from pipelines.prompting.backends_fields import name_problems
from pipelines.prompting.hard_asking import AskFields, Job, ask_all, check_fit
from pipelines.prompting.strategies import Prompt, Strategy, draw_shots, load_strategies, render, shipped
from pipelines.prompting.tasks import Example, Task, TaskFields, load_task

Scoring = Literal["generate", "likelihood"]

LIKELIHOOD = "_likelihood"
"""What a strategy's name ends in where its choices were scored instead of generated."""


@config
class StrategyFields(TaskFields):
    """Which strategies are tried, and on what."""

    strategies: list[str] | dict[str, dict[str, Any] | None] = Field(
        default_factory=list,
        description="names of shipped strategies, or name -> fields of a strategy (like: NAME takes a shipped one's); "
        "empty: all that are shipped for the task",
    )
    shots: list[Annotated[int, Field(ge=0)]] | None = Field(
        None, description="numbers of solved examples that each strategy with shots is tried with; null: its own"
    )
    shots_drawn: Literal["each", "once"] = Field(
        "each", description="solved examples are drawn anew for each question, or once for all"
    )
    split: Literal["validation", "test"] = Field("test", description="split that is asked")
    max_examples: int | None = Field(200, ge=1, description="ask a random sample of at most so many examples")
    max_new_tokens: int = Field(16, ge=1, description="tokens of an answer at most, where the strategy says nothing")

    def problems(self) -> list[Problem]:
        found = super().problems()
        if self.shots is not None and (not self.shots or len(set(self.shots)) < len(self.shots)):
            found.append(Problem("shots", self.shots, "is empty or names a number twice", "give different numbers"))
        return found + name_problems("strategies", list(self.strategies)) + problems_of(self.loaded_strategies)

    def loaded_strategies(self) -> dict[str, Strategy]:
        """The strategies by name; with ``shots=`` each that has solved examples once for every number: ``NAME_K``.

        Raises:
            UserError: one line for each mistake in them.
        """
        tables = self.strategies
        if not isinstance(tables, dict):
            tables = dict.fromkeys(tables or shipped(self.task))
        found: dict[str, Strategy] = {}
        for name, strategy in load_strategies(tables, self.task).items():
            mine = {name: strategy}
            if self.shots is not None and strategy.shots:
                # Without any there is nothing to label wrongly.
                numbers = [k for k in self.shots if k or not strategy.wrong_labels]
                mine = {f"{name}_{k}": replace(strategy, shots=k) for k in numbers}
            twice = next((new for new in mine if new in found), None)
            if twice is not None:
                raise UserError(f"strategies.{name}", twice, "is the name of another one with shots=", "rename it")
            found |= mine
        return found


@config
class HardConfig(AskFields, StrategyFields, StageConfig):
    """Measure prompting: strategies × models on questions, words or documents."""

    output_dir: str = Field("runs/hard", description="folder the stage writes into", json_schema_extra=INERT)
    scoring: list[Scoring] | None = Field(
        None,
        description="generate: write an answer and read it; likelihood: take the likeliest of the choices. null: both "
        "for multiple choice (generate alone where an endpoint is asked by chat), generate for all else",
    )
    normalization: Literal["sum", "token", "character"] = Field(
        "sum", description="likelihood: log-probability of a choice, or that by its tokens or characters"
    )
    calibration_bins: int = Field(10, ge=2, le=100, description="bins of the calibration curve")
    resamples: int = Field(2000, ge=100, description="bootstrap resamples behind each interval of a mean")

    def problems(self) -> list[Problem]:
        found = super().problems()
        if self.scoring is not None and (not self.scoring or len(set(self.scoring)) < len(self.scoring)):
            mend = "give [generate], [likelihood] or both"
            found.append(Problem("scoring", self.scoring, "is empty or names one twice", mend))
        if "likelihood" in self.scorings and self.task != "multiple_choice":
            mend = "give scoring=[generate]"
            found.append(Problem("scoring", "likelihood", f"{self.task} has no choices to compare", mend))
        if self.scoring is not None and "likelihood" in self.scoring:
            for name, table in self.endpoints.items():
                if table.get("api") == "chat":
                    mend = "give api: completions, or scoring=[generate]"
                    found.append(Problem(f"endpoints.{name}.api", "chat", "cannot score a text given to it", mend))
        for name in self.strategies:
            if name.endswith(LIKELIHOOD) or name in self.names:
                why = f"ends in {LIKELIHOOD}, which says how choices were scored"
                why = "is the name of a model too" if name in self.names else why
                found.append(Problem(f"strategies.{name}", name, why, "give it another name"))
        return found

    @property
    def scorings(self) -> list[Scoring]:
        """How answers are scored."""
        if self.scoring is not None:
            return list(self.scoring)
        chats = any(table.get("api") == "chat" for table in self.endpoints.values())
        return ["generate", "likelihood"] if self.task == "multiple_choice" and not chats else ["generate"]


@dataclass(frozen=True)
class Trial:
    """One strategy with one scoring, and its prompt for each example.

    Attributes:
        name: of the strategy, with ``LIKELIHOOD`` behind it where its choices are scored.
        strategy: it.
        scoring: how.
        prompts: of each example, in their order.
    """

    name: str
    strategy: Strategy
    scoring: Scoring
    prompts: list[Prompt]

    def job(self, max_new_tokens: int) -> Job:
        """It as prompts to be asked: greedily up to the strategy's stop text, or its choices to be scored."""
        tokens = self.strategy.max_new_tokens or max_new_tokens
        choices = [prompt.choices for prompt in self.prompts] if self.scoring == "likelihood" else None
        sampling = Sampling(max_new_tokens=tokens, stop=self.strategy.stop)
        return Job(self.name, [prompt.text for prompt in self.prompts], sampling, choices)


def questions(fields: StrategyFields, task: Task, seed: int) -> list[Example]:
    """The examples that are asked: a random sample of the split, in its order."""
    from pipelines.corpus.local import sample

    asked = {"validation": task.validation, "test": task.test}[fields.split]
    if not asked:
        raise UserError("split", fields.split, "holds no examples", "give the other split, or data for this one")
    return [asked[i] for i in sample(len(asked), fields.max_examples, seed, fields.split)]


def prompts_of(
    strategy: Strategy, examples: Sequence[Example], train: Sequence[Example], fields: StrategyFields, seed: int
) -> list[Prompt]:
    """The prompt of every example. The same seed draws the same solved examples for every strategy and model.

    Raises:
        UserError: more shots than training examples.
    """
    found = []
    for example in examples:
        drawn = f"{seed} {example.id}" if fields.shots_drawn == "each" else str(seed)
        without = example if fields.shots_drawn == "each" else None
        shots = draw_shots(train, strategy.shots, drawn, without=without) if strategy.shots else []
        found.append(render(strategy, example, shots, seed=drawn, others=train))
    return found


def hard(config: HardConfig) -> dict[str, float]:
    """Ask, judge and compare.

    Writes ``answers.jsonl`` (one line for each model, strategy and example) and ``trials.json`` (for the report: each
    trial with a prompt as it was, its calibration curve and its failures' examples).

    Returns:
        See ``hard_measures.measure``.

    Raises:
        UserError: unusable data, strategies or models; a prompt that does not fit; an endpoint that is not there, or
            whose answers failed beyond ``max_failed`` (the same command then asks only for those).
    """
    from accelerate import PartialState

    from pipelines.prompting.hard_measures import judge_all, measure, write_answers

    task = load_task(config, ("train", config.split))
    examples = questions(config, task, config.split_seed)
    trials = _trials(config, examples, task.train)
    jobs = [trial.job(config.max_new_tokens) for trial in trials]
    check_fit(config, jobs)
    answers = ask_all(config, config.output_dir, jobs)
    judged = judge_all(config, trials, examples, answers)
    metrics, shown = measure(config, task, trials, examples, judged)
    if PartialState().is_main_process:
        write_answers(Path(config.output_dir), trials, examples, answers, judged, shown)
    PartialState().wait_for_everyone()
    return metrics


def _trials(config: HardConfig, examples: Sequence[Example], train: Sequence[Example]) -> list[Trial]:
    found, problems = [], []
    for name, strategy in config.loaded_strategies().items():
        try:
            prompts = prompts_of(strategy, examples, train, config, config.seed)
        except UserError as error:
            problems += [replace(problem, what=f"strategies.{name}.{problem.what}") for problem in error.problems]
            continue
        for scoring in config.scorings:
            suffix = LIKELIHOOD if scoring == "likelihood" else ""
            found.append(Trial(name + suffix, strategy, scoring, prompts))
    if problems:
        raise UserError.of(problems)
    return found
