"""What PPO is paid for: a weighted sum of reward functions, each checked every time it is called.

A reward function is called with N documents, N summaries and N lists of references and returns N finite numbers, higher
for better. A configuration names it

- by the folder (or hub id) of a reward model,
- ``rouge``: mean of ROUGE-1, -2 and -L F1 (0-100) against the best reference,
- ``length``: minus the relative difference in words to the first reference, at best 0,
- ``module:function``: the user's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pipelines.errors import Problem, UserError, problems_of
from pipelines.seq2seq.annotators import Annotator, annotator_problems, checked_scores, load_annotator
from pipelines.seq2seq.models import check_reward_model, check_same_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def length_reward(
    documents: Sequence[str], summaries: Sequence[str], references: Sequence[Sequence[str]]
) -> list[float]:
    """−|n − n_ref| / n_ref with n the number of words of a summary and n_ref that of its first reference.

    Args:
        documents: N texts, not read.
        summaries: N texts.
        references: N lists of texts.

    Returns:
        N numbers, at best 0.
    """
    scores = []
    for summary, several in zip(summaries, references, strict=True):
        wanted = max(1, len(several[0].split()))
        scores.append(-abs(len(summary.split()) - wanted) / wanted)
    return scores


class RewardFunction(NamedTuple):
    """One term of the reward: its name in the logs, its weight, and the function."""

    name: str
    weight: float
    function: Annotator


class Rewards:
    """A weighted sum of reward functions.

    Args:
        functions: its terms; their names must differ.
    """

    def __init__(self, functions: Sequence[RewardFunction]):
        self.functions = list(functions)
        self.names = [function.name for function in self.functions]

    def __call__(
        self, documents: Sequence[str], summaries: Sequence[str], references: Sequence[Sequence[str]]
    ) -> list[list[float]]:
        """Score N summaries.

        Returns:
            A list for each summary: the weighted sum first, then the terms in the order of ``names``, unweighted.

        Raises:
            UserError: a function raised, or returned anything but N finite numbers.
        """
        terms = [function.function(documents, summaries, references) for function in self.functions]
        weights = [function.weight for function in self.functions]
        return [[sum(w * s for w, s in zip(weights, row, strict=True)), *row] for row in zip(*terms, strict=True)]


def _checked(function: Annotator, spec: str, field: str) -> Annotator:
    def score(documents, summaries, references):
        return checked_scores(function(documents, summaries, references), len(summaries), field, spec)

    return score


def is_function(spec: str) -> bool:
    """``module:function``, and not a path (which may hold a colon too)."""
    return ":" in spec and "/" not in spec and "\\" not in spec and not Path(spec).expanduser().exists()


def _check_name(spec: str, field: str) -> None:
    """Refuse a word that is neither a folder nor a function nor a hub's ``owner/name``."""
    if "/" not in spec and not spec.startswith("${") and not Path(spec).expanduser().exists():
        mend = "give a reward model's folder or owner/name, rouge, length, or module:function"
        raise UserError(field, spec, "no such folder or reward function", mend)
    check_reward_model(spec, field)


def reward_problems(specs: Sequence[str], field: str = "reward") -> list[Problem]:
    """What is wrong with the reward functions that a configuration names, as far as nothing is loaded or called."""
    functions = [spec for spec in specs if is_function(spec)]
    folders = [spec for spec in specs if spec not in ("rouge", "length", *functions)]
    return [p for spec in functions for p in annotator_problems(spec, field)] + problems_of(
        *(partial(_check_name, spec, field) for spec in folders)
    )


def load_rewards(
    specs: Sequence[str],
    weights: Sequence[float] | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    field: str = "reward",
    batch_size: int = 64,
    device: str | None = None,
) -> Rewards:
    """The reward functions that a configuration names.

    Args:
        specs: what each is, see the module's description.
        weights: one for each; all 1 where None.
        tokenizer: the policy's; a reward model with another is refused.
        field: the configuration field, for messages.
        batch_size: summaries a reward model scores at once.
        device: where reward models compute; None takes a GPU where there is one.

    Raises:
        UserError: nothing of that name, a reward model with another tokenizer, or weights that do not match.
    """
    weights = [1.0] * len(specs) if weights is None else list(weights)
    if len(weights) != len(specs):
        problem = f"{len(weights)} weights for {len(specs)} reward functions"
        raise UserError(f"{field}_weights", weights, problem, "give one weight for each")
    functions: list[RewardFunction] = []
    for spec, weight in zip(specs, weights, strict=True):
        if spec == "length":
            name, function = spec, _checked(length_reward, spec, field)
        elif spec == "rouge" or is_function(spec):
            name, function = spec, load_annotator(spec, field=field)
        else:
            name, function = "model", _checked(_reward_model(spec, tokenizer, field, batch_size, device), spec, field)
        taken = sum(other.name.partition("#")[0] == name for other in functions)
        functions.append(RewardFunction(f"{name}#{taken + 1}" if taken else name, weight, function))
    return Rewards(functions)


def _reward_model(
    path: str, tokenizer: PreTrainedTokenizerBase, field: str, batch_size: int, device: str | None
) -> Annotator:
    from pipelines.seq2seq.reward_model import RewardScorer

    scorer = RewardScorer(path, batch_size=batch_size, device=device, field=field)
    check_same_tokenizer(tokenizer, scorer.tokenizer, "model", field)

    def score(documents, summaries, references):
        return scorer(documents, summaries)

    return score
