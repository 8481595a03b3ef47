"""What answers prompts: one protocol for local transformers models and for OpenAI-compatible endpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from pydantic import Field

from pipelines.config import config


@config
class Sampling:
    """How an answer is drawn."""

    temperature: float = Field(0.0, ge=0, description="the logits are divided by it; 0 takes the likeliest token")
    top_p: float = Field(1.0, gt=0, le=1, description="only the likeliest tokens that hold this probability")
    max_new_tokens: int = Field(16, ge=1, description="tokens of an answer at most")
    stop: str | None = Field(None, description="the answer ends before this text")
    seed: int = Field(0, ge=0, description="of the draws")


@dataclass(frozen=True)
class TokenProbability:
    """A token that was generated.

    Attributes:
        token: as text.
        probability: of it, before temperature and top-p.
        alternatives: (token, probability) of the likeliest ones, falling; the token itself is among them if it is one.
    """

    token: str
    probability: float
    alternatives: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Generation:
    """One answer.

    Attributes:
        text: what was generated, without the stop text and special tokens; not stripped.
        log_probs: natural logarithm of each generated token's probability, where the backend gives them.
        finished: whether it ended by itself (an end mark or the stop text), not at ``max_new_tokens``.
        failure: why there is no answer; then ``text`` is empty and nothing may be concluded from it.
    """

    text: str
    log_probs: tuple[float, ...] | None = None
    finished: bool = True
    failure: str | None = None


@dataclass(frozen=True)
class ChoiceScore:
    """Log-probability of one continuation after its prompt.

    Attributes:
        log_prob: sum over its tokens, nats; NaN where it failed.
        tokens: how many these are.
        failure: why there is none.
    """

    log_prob: float
    tokens: int
    failure: str | None = None


class Backend(Protocol):
    """Answers prompts."""

    name: str

    def generate(
        self, prompts: Sequence[str], sampling: Sampling, *, samples: int = 1, progress: str | None = None
    ) -> list[list[Generation]]:
        """``samples`` answers to each prompt; sample n of a prompt depends on (seed, prompt, n) alone."""
        ...

    def choice_log_probs(
        self, prompts: Sequence[str], choices: Sequence[Sequence[str]], *, progress: str | None = None
    ) -> list[list[ChoiceScore]]:
        """The score of every continuation of every prompt, ragged as ``choices`` is.

        Raises:
            UserError: the backend gives no log-probabilities.
        """
        ...

    def token_probabilities(
        self, prompts: Sequence[str], sampling: Sampling, *, alternatives: int = 5
    ) -> list[list[TokenProbability]]:
        """What is generated, token by token, with the likeliest alternatives at each place.

        Raises:
            UserError: the backend gives no log-probabilities.
        """
        ...
