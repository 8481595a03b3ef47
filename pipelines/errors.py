"""A user's mistake ends in one line that names what, which value, why and how to mend it; never in a traceback."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

_LONGEST_VALUE = 200


def _one_line(text: str) -> str:
    return " ".join(str(text).split())


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with the input.

    Args:
        what: the field, file or line at fault, as the user wrote it (``learning_rate``, ``dataset``).
        value: the value found there; cut to 200 characters when it is shown.
        problem: what is wrong with it.
        mend: what to do about it, as an instruction.
    """

    what: str
    value: object
    problem: str
    mend: str

    def __str__(self) -> str:
        shown = _one_line(str(self.value) if isinstance(self.value, (str, os.PathLike)) else repr(self.value))
        if len(shown) > _LONGEST_VALUE:
            shown = shown[: _LONGEST_VALUE - 1] + "…"
        return f"{self.what}={shown}: {_one_line(self.problem)}; {_one_line(self.mend)}"


class UserError(Exception):
    """One mistake of the user's, shown as one line; the command line turns it into exit code 2.

    Attributes:
        problems: what is wrong, a line each.
        shared: every process of the run has this very error, and the first one says it for all.
    """

    def __init__(self, what: str, value: object, problem: str, mend: str):
        self.problems = [Problem(what, value, problem, mend)]
        self.shared = False
        # The value is put into words when it is shown: a place in a file may have its lines to count.
        super().__init__(what, value, problem, mend)

    def __str__(self) -> str:
        return "\n".join(str(p) for p in self.problems)

    @classmethod
    def of(cls, problems: list[Problem], *, shared: bool = False) -> UserError:
        """The error that shows several problems, one line each.

        Args:
            problems: at least one.
            shared: every process of the run raises it.

        Raises:
            ValueError: if ``problems`` is empty.
        """
        if not problems:
            raise ValueError("an error needs at least one problem")
        first = problems[0]
        error = cls(first.what, first.value, first.problem, first.mend)
        error.problems, error.shared = list(problems), shared
        return error


def problems_of(*checks: Callable[[], object]) -> list[Problem]:
    """What the ``UserError`` of each check says, in order; a check that passes adds nothing."""
    found: list[Problem] = []
    for check in checks:
        try:
            check()
        except UserError as error:
            found.extend(error.problems)
    return found
