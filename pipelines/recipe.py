"""The command line of a recipe script: ``recipes/F/S.py [--config FILE.yaml] [key=value ...]``.

``FILE.yaml`` is either the stage's own configuration (keys and values) or a chain (it has ``stages:``), of which the
recipe's own stage is then run inside the chain's folder, on what the stages before it left there.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipelines.config import config_class, describe, override, read_yaml, split_overrides, validate
from pipelines.errors import UserError
from pipelines.peers import await_the_end, part

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
_PATIENCE = 10.0  # seconds


class Recipe:
    """A stage function with its documentation; calling it runs its command line.

    Args:
        function: the stage, ``(config dataclass) -> metrics``.
        doc: the script's docstring, shown by ``--help``.
    """

    def __init__(self, function: Callable, doc: str | None):
        self.function = function
        self.doc = (doc or "").strip()
        self.config_class = config_class(function)

    @property
    def summary(self) -> str:
        """The first line of the documentation."""
        return self.doc.splitlines()[0] if self.doc else ""

    def __call__(self, argv: list[str] | None = None) -> None:
        """Run the command line; exits with 0, 2 for a user's mistake, 130 when interrupted."""
        arguments = self._parser().parse_intermixed_args(argv)
        raise SystemExit(guarded(lambda: self._run(arguments)))

    def _parser(self) -> argparse.ArgumentParser:
        parser = argparse.ArgumentParser(
            description=self.doc,
            epilog="fields (key=value, or in the YAML file):\n" + describe(self.config_class),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.add_argument("--config", metavar="FILE.yaml", help="configuration of this stage, or a chain that has it")
        parser.add_argument("--stage", help="which stage of the chain, where several use this recipe")
        parser.add_argument("--force", action="store_true", help="run even if the stage is finished")
        parser.add_argument("overrides", nargs="*", metavar="key=value", help="fields set on the command line")
        return parser

    def _run(self, arguments: argparse.Namespace) -> None:
        from pipelines.runner import Chain, run_stage

        values = read_yaml(arguments.config) if arguments.config else {}
        if "stages" in values or "base" in values:
            chain = Chain.load(arguments.config)
            name = chain.stage_of(self, arguments.stage)
            run_stage(chain, name, arguments.overrides, force=arguments.force)
            return
        for key, text in split_overrides(arguments.overrides):
            override(self.config_class, values, key, text)
        if "output_dir" not in values:
            values["output_dir"] = f"runs/{self.function.__name__}"
        config = validate(self.config_class, values)
        announce(run_one(self, config, arguments.force), config.output_dir)


def run_one(recipe: Recipe, config: Any, force: bool = False, name: str = "") -> dict[str, float]:
    """Run one stage (or find it finished), then push it if its configuration says so. Returns its metrics.

    Args:
        recipe: whose stage to run.
        config: its configuration.
        force: run it even if it is finished.
        name: ``family/stage``, noted in ``stage.json``.
    """
    from pipelines.stage import execute

    pushes = getattr(config, "push_to_hub", False)
    if pushes:
        from pipelines.publishing.access import check_stage

        check_stage(config)
    metrics = execute(recipe.function, config, recipe=name or recipe_name(recipe), force=force)
    if pushes:
        from pipelines.publishing.push import push_stage

        push_stage(config)
    return metrics


def recipe_name(recipe: Recipe) -> str:
    """``family/stage`` of a recipe run as a script, from the script's path."""
    script = Path(sys.argv[0])
    return f"{script.parent.name}/{script.stem}" if script.suffix == ".py" else recipe.function.__name__


def announce(metrics: dict[str, float], folder: str) -> None:
    """Print a stage's metrics, once in a run of several processes."""
    if int(os.environ.get("RANK", "0")) != 0:
        return
    for key, value in sorted(metrics.items()):
        if not key.endswith(("_ci_low", "_ci_high")):
            low, high = metrics.get(f"{key}_ci_low"), metrics.get(f"{key}_ci_high")
            interval = f"  [{low:.4g}, {high:.4g}]" if low is not None and high is not None else ""
            print(f"  {key} = {value:.6g}{interval}")
    print(f"finished: {folder}", flush=True)


def recipe(function: Callable, doc: str | None) -> Recipe:
    """The recipe of a stage function; a script binds it to ``main`` and calls it."""
    return Recipe(function, doc)


def _stop(number: int, frame: Any) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)


def _close_bars() -> None:
    """End the lines of progress bars that stand open, so that what is said next has a line of its own."""
    if "tqdm" in sys.modules:
        for bar in list(getattr(sys.modules["tqdm"].tqdm, "_instances", ())):
            bar.close()


def guarded(action: Callable[[], None]) -> int:
    """Run ``action``; a user's mistake becomes lines on standard error and 2, an interruption a hint and 130."""
    rank = int(os.environ.get("RANK", "0"))
    signal.signal(signal.SIGTERM, _stop)
    try:
        action()
    except UserError as error:
        _close_bars()
        part(EXIT_USER_ERROR)
        if rank:
            # What all processes find, the first one says, and the launcher ends the others at the first exit: so the
            # others wait for that, and speak only if theirs was a mistake of their own.
            try:
                time.sleep(_PATIENCE)
            except KeyboardInterrupt:
                return EXIT_USER_ERROR
            if error.shared:
                return EXIT_USER_ERROR
        for problem in error.problems:
            print(f"error: {problem}" + f" (process {rank})" * (rank > 0), file=sys.stderr, flush=True)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        _close_bars()
        part(EXIT_INTERRUPTED)
        if rank == 0:
            print("\ninterrupted: give the same command again to go on from here", file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        return 0
    except Exception as error:
        await_the_end(error)
        raise
    part(0)
    return 0


__all__ = ["Recipe", "announce", "guarded", "recipe", "run_one"]
