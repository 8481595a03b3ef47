"""Annotators: judges that give a summary a score. The *gold* judge of preferences and evaluation is one of them.

An annotator is called with N documents, N summaries and N lists of references and returns N finite numbers, higher for
better. ``rouge`` is built in; a user's own is named ``module:function``.
"""

from __future__ import annotations

import hashlib
import importlib
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from pipelines.errors import Problem, UserError, problems_of

Annotator = Callable[[Sequence[str], Sequence[str], Sequence[Sequence[str]]], list[float]]

_SIGNATURE = "(documents, summaries, references) -> one finite number for each summary"


def rouge_annotator(
    documents: Sequence[str], summaries: Sequence[str], references: Sequence[Sequence[str]]
) -> list[float]:
    """Mean of ROUGE-1, -2 and -L F1 (0-100), each against the best reference; see ``metrics.rouge``."""
    from pipelines.seq2seq.metrics import rouge

    scores = rouge(summaries, references, ("rouge1", "rouge2", "rougeL"))
    return ((scores["rouge1"] + scores["rouge2"] + scores["rougeL"]) / 3.0).tolist()


def _user_function(spec: str, field: str) -> Callable:
    module_name, _, function_name = spec.partition(":")
    if not module_name or not function_name:
        raise UserError(field, spec, "neither 'rouge' nor of the form module:function", "give e.g. my_judge:score")
    # A console script does not put the working folder on the path, where a user's own module lies.
    here = os.getcwd()
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        mend = "start in the folder that holds it, or install it"
        raise UserError(field, spec, f"no module named {error.name!r} can be imported", mend) from error
    except (Exception, SystemExit) as error:
        problem = f"importing {module_name} raised {type(error).__name__}: {error}"
        raise UserError(field, spec, problem, "mend that module") from error
    finally:
        if added:
            sys.path.remove(here)
    function = getattr(module, function_name, None)
    if function is None:
        raise UserError(field, spec, f"module {module_name} has no {function_name!r}", "mend the name after the colon")
    if not callable(function):
        raise UserError(field, spec, f"{function_name!r} is not a function", f"give a function {_SIGNATURE}")
    return function


def checked_scores(scores: object, count: int, field: str, spec: str) -> list[float]:
    """What a scoring function of the user's returned, as ``count`` plain floats.

    Raises:
        UserError: if it is not a sequence of ``count`` finite numbers.
    """
    tolist = getattr(scores, "tolist", None)  # tensors and arrays
    values = tolist() if tolist is not None else scores
    if not isinstance(values, (list, tuple)):
        raise UserError(field, spec, f"it returned {type(scores).__name__}, not a list", f"return {_SIGNATURE}")
    if len(values) != count:
        raise UserError(field, spec, f"it returned {len(values)} scores for {count} summaries", f"return {_SIGNATURE}")
    checked = []
    for index, value in enumerate(values):
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise UserError(field, spec, f"score {index} is {value!r}, not a number", f"return {_SIGNATURE}") from None
        if not math.isfinite(number):
            raise UserError(field, spec, f"score {index} is {number}", "return finite numbers only")
        checked.append(number)
    return checked


def annotator_problems(spec: str, field: str = "annotator") -> list[Problem]:
    """What is wrong with the annotator that a configuration names: a user's module is imported, nothing is called."""
    return problems_of(partial(load_annotator, spec, field=field))


def annotator_sources(specs: Iterable[str]) -> dict[str, str]:
    """Digests of the files that users' own functions stand in: a function that was mended is another one.

    Args:
        specs: names of functions; what is not of the form ``module:function`` is passed over.

    Returns:
        spec -> SHA-256 of its module's file, where it has one.
    """
    found = {}
    for spec in specs:
        if ":" in spec:
            _user_function(spec, "annotator")
            file = getattr(sys.modules[spec.partition(":")[0]], "__file__", None)
            found[spec] = hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else ""
    return found


def load_annotator(spec: str, *, field: str = "annotator") -> Annotator:
    """The annotator named by a configuration field.

    Args:
        spec: ``rouge``, or ``module:function`` of the user's own (looked up in the working folder too).
        field: the field's name, for messages.

    Returns:
        A function ``(documents, summaries, references) -> list[float]``; called with N of each. Calling it raises
        UserError if the user's function raises, or returns anything but N finite numbers.

    Raises:
        UserError: if there is no such function.
    """
    function = rouge_annotator if spec == "rouge" else _user_function(spec, field)

    def annotate(
        documents: Sequence[str], summaries: Sequence[str], references: Sequence[Sequence[str]]
    ) -> list[float]:
        try:
            scores = function(list(documents), list(summaries), [list(several) for several in references])
        except UserError:
            raise
        except (Exception, SystemExit) as error:
            problem = f"it raised {type(error).__name__}: {error}"
            raise UserError(field, spec, problem, "mend that function") from error
        return checked_scores(scores, len(summaries), field, spec)

    return annotate
