"""Asking every model every prompt: what came is kept, what did not come is told, and asked for again the next time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from pydantic import Field

from pipelines.config import as_plain, config
from pipelines.errors import Problem, UserError, problems_of
from pipelines.prompting.backends import Backend, ChoiceScore, Generation, Sampling
from pipelines.prompting.backends_fields import BackendFields, open_backend


@config
class AskFields(BackendFields):
    """Which models are asked, and how many answers may be missing."""

    max_failed: float = Field(
        0.0, ge=0, lt=1, description="share of an endpoint's answers that may fail; they are left out and counted"
    )
    shard_size: int = Field(64, ge=1, description="prompts between two savings of a local model's answers")


@dataclass(frozen=True)
class Job:
    """Prompts that are asked in one way.

    Attributes:
        name: unique among the jobs of a stage.
        texts: the prompts.
        sampling: how answers are generated.
        choices: continuations of each prompt that are scored instead; None where answers are generated.
        samples: answers to each prompt.
    """

    name: str
    texts: list[str]
    sampling: Sampling
    choices: list[tuple[str, ...]] | None = None
    samples: int = 1


Answers = list[Generation] | list[ChoiceScore]
"""What one prompt got: its samples, or a score for each of its choices."""


def check_fit(fields: BackendFields, jobs: Sequence[Job]) -> None:
    """Refuse prompts that a local model has no room for, before any weights are loaded.

    Raises:
        UserError: one line for each model and job.
    """
    from pipelines.prompting.backends_text import load_reader

    problems = []
    for name, path in fields.models.items():
        reader = load_reader(path, f"models.{name}", name=name, chat=name in fields.chat_models)

        def fits(job: Job, reader: Any = reader) -> None:
            if job.choices is None or reader.encodes:
                reader.prompts(job.texts, job.sampling.max_new_tokens if job.choices is None else 0)
            else:
                for text, choices in zip(job.texts, job.choices, strict=True):
                    reader.with_choices(text, choices)

        for job in jobs:
            found = problems_of(partial(fits, job))
            problems += [replace(problem, what=f"{job.name}: {problem.what}") for problem in found]
    if problems:
        raise UserError.of(problems)


def ask_all(
    fields: AskFields, output_dir: str, jobs: Sequence[Job], *, names: Sequence[str] | None = None
) -> dict[tuple[str, str], list[Answers]]:
    """(model, job) -> what each prompt got. Everything is asked before anything is complained about.

    A local model's answers are saved shard by shard under ``output_dir``; an endpoint's lie in the response cache.

    Args:
        fields: the models and endpoints.
        output_dir: of the stage.
        jobs: what they are asked.
        names: which of them; all where None.

    Raises:
        UserError: a model that cannot be loaded, an endpoint that is not there or refuses what it is asked, or one
            whose answers failed beyond ``max_failed``: the same command then asks only for those.
    """
    found: dict[tuple[str, str], list[Answers]] = {}
    problems = []
    for name in fields.names if names is None else names:
        ask = _ask_endpoint if name in fields.endpoints else _ask_local
        mine = ask(fields, output_dir, name, jobs)
        found |= {(name, job.name): answers for job, answers in zip(jobs, mine, strict=True)}
        problems += _failures(fields, name, mine)
    if problems:
        raise UserError.of(problems)
    return found


def _failures(fields: AskFields, name: str, answers: Sequence[Sequence[Answers]]) -> list[Problem]:
    each = [a.failure for job in answers for some in job for a in some]
    reasons = Counter(reason for reason in each if reason is not None)
    lost = sum(reasons.values())
    if lost <= fields.max_failed * len(each):
        return []
    shown = "; ".join(f"{count} × {reason}" for reason, count in reasons.most_common(3))
    mend = f"give the same command again, which asks only for these, or max_failed={lost / len(each):.2g} or more"
    return [Problem(f"endpoints.{name}", f"{lost} of {len(each)} answers", f"failed: {shown}", mend)]


def _ask(backend: Backend, job: Job, rows: Sequence[int], progress: str | None) -> list[Answers]:
    texts = [job.texts[row] for row in rows]
    if job.choices is not None:
        return backend.choice_log_probs(texts, [job.choices[row] for row in rows], progress=progress)
    return backend.generate(texts, job.sampling, samples=job.samples, progress=progress)


def _ask_local(fields: AskFields, output_dir: str, name: str, jobs: Sequence[Job]) -> list[list[Answers]]:
    """The model is loaded only where a shard is missing."""
    from accelerate import PartialState

    from pipelines.seq2seq.shards import run_shards

    opened: list[Backend] = []

    def work(job: Job, rows: Sequence[int], what: str) -> list[Any]:
        if not opened:
            opened.append(open_backend(fields, name))
        bar = what if PartialState().is_main_process else None
        return [[as_plain(one) for one in some] for some in _ask(opened[0], job, rows, bar)]

    return [
        [
            [_restored(one) for one in some]
            for some in run_shards(
                output_dir,
                f"{name}.{job.name}",
                range(len(job.texts)),
                partial(work, job),
                size=fields.shard_size,
            )
        ]
        for job in jobs
    ]


def _restored(value: dict[str, Any]) -> Generation | ChoiceScore:
    if "log_prob" in value:
        return ChoiceScore(**value)
    log_probs = value["log_probs"]
    return Generation(**value | {"log_probs": None if log_probs is None else tuple(log_probs)})


def _ask_endpoint(fields: AskFields, output_dir: str, name: str, jobs: Sequence[Job]) -> list[list[Answers]]:
    def work() -> list[list[Answers]]:
        backend, found = open_backend(fields, name), {}
        # What not every endpoint can do comes first: nobody pays for answers that lead to nothing.
        for job in sorted(jobs, key=lambda job: job.choices is None):
            found[job.name] = _ask(backend, job, range(len(job.texts)), f"{name} {job.name}")
        return [found[job.name] for job in jobs]

    return on_main(work)


def on_main(work: Callable[[], Any]) -> Any:
    """What ``work`` returns in the main process, in every process of a launch."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    box: list[Any] = [work() if PartialState().is_main_process else None]
    broadcast_object_list(box)
    return box[0]
