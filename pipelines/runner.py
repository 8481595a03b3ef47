"""A chain is named stages in a YAML file; the runner brings each up to date, in order, and merges what they measured.

    name: demo
    about: one line
    defaults: {seed: 0}            # given to every stage that has the field
    stages:
      corpus: {recipe: summarization/corpus, dataset: pydocs}
      sft: {recipe: summarization/sft, dataset: "${corpus}"}   # ${corpus} is the folder of that stage

A chain may be based on another: ``base: NAME`` takes its stages and defaults, and what stands below changes or adds
fields.

A stage depends on the stages it names. It runs again only if its fingerprint changed: its own fields, its inputs'
fingerprints, or the versions of the packages.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import yaml

from pipelines.config import as_plain, fields_of, nearest, override, read_yaml, split_overrides, validate
from pipelines.errors import Problem, UserError, problems_of
from pipelines.publishing.access import check_chain
from pipelines.recipe import EXIT_INTERRUPTED, Recipe, announce, run_one
from pipelines.share import shared_folder
from pipelines.stage import (
    STAGE_FILE,
    finished,
    locked,
    make_folder,
    plain_os_errors,
    read_stage,
    remove_empty,
    stage_name,
    versions,
    write_json,
)

RUN_FILE = "run.json"
_REFERENCE = re.compile(r"^\$\{([^}]*)\}(/.*)?$")
_NAME = re.compile(r"\w[\w.-]*")
_CHAIN_KEYS = ("name", "about", "base", "defaults", "stages")
_AFTER_A_FAILURE = "see what it printed above; the same command goes on from its last checkpoint"


@cache
def load_recipe(name: str) -> Recipe:
    """The recipe ``family/stage``, from ``recipes/family/stage.py``.

    Raises:
        UserError: if there is none of that name.
    """
    root = shared_folder("recipes")
    file = root / f"{name}.py"
    if not file.is_file():
        known = sorted(str(p.relative_to(root).with_suffix("")) for p in root.glob("*/*.py"))
        raise UserError("recipe", name, "no such recipe", nearest(name, known))
    spec = importlib.util.spec_from_file_location(f"recipes.{name.replace('/', '.')}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def list_recipes() -> list[tuple[str, Recipe]]:
    """Every recipe's name and itself, sorted."""
    root = shared_folder("recipes")
    names = sorted(str(p.relative_to(root).with_suffix("")) for p in root.glob("*/*.py") if p.stem != "__init__")
    return [(name, load_recipe(name)) for name in names]


def list_chains() -> list[tuple[str, str, Path]]:
    """Every chain's name, its one-line description and its file, sorted."""
    found = []
    for file in sorted(shared_folder("recipes").glob("*/*.yaml")):
        values = read_yaml(file)
        if "stages" in values or "base" in values:
            found.append((str(values.get("name", file.stem)), str(values.get("about", "")), file))
    return sorted(found)


def chain_file(source: str | Path) -> Path:
    """The file of a chain named by its name or by its path."""
    path = Path(source).expanduser()
    if path.suffix in (".yaml", ".yml") or path.exists():
        return path
    by_name = {name: file for name, _, file in list_chains()}
    if str(source) not in by_name:
        raise UserError("chain", source, "no such chain", nearest(str(source), list(by_name)))
    return by_name[str(source)]


def _with_base(values: dict[str, Any], path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A chain's table on top of that of the chain it names as ``base``: fields of defaults and of stages one by one."""
    if "base" not in values:
        return values
    beside = path.parent / str(values["base"])
    file = (beside if beside.suffix and beside.exists() else chain_file(str(values["base"]))).resolve()
    if file in (*seen, path.resolve()):
        raise UserError("base", values["base"], f"{path.name} would be based on itself", "name another chain")
    whole = _with_base(read_yaml(file, "base"), file, (*seen, path.resolve()))
    merged = {**whole, **{key: value for key, value in values.items() if key != "base"}}
    for key in ("defaults", "stages"):
        tables = [table.get(key) or {} for table in (whole, values)]
        if not all(isinstance(table, dict) for table in tables):
            continue  # said where the chain is read
        merged[key] = tables[0] | tables[1]
        if key == "stages":
            both = [
                name
                for name in tables[1]
                if isinstance(tables[0].get(name), dict) and isinstance(tables[1][name], dict)
            ]
            merged[key] |= {name: tables[0][name] | tables[1][name] for name in both}
    return merged


def _references(value: Any) -> Iterator[str]:
    """The stages that a plain value names by ``${stage}``, inside lists and mappings too."""
    if isinstance(value, str):
        match = _REFERENCE.match(value)
        if match:
            yield match.group(1)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _references(item)
    elif isinstance(value, list):
        for item in value:
            yield from _references(item)


def _resolved(value: Any, run_dir: Path) -> Any:
    if isinstance(value, str):
        match = _REFERENCE.match(value)
        return str(run_dir / match.group(1)) + (match.group(2) or "") if match else value
    if isinstance(value, dict):
        return {key: _resolved(item, run_dir) for key, item in value.items()}
    if isinstance(value, list):
        return [_resolved(item, run_dir) for item in value]
    return value


@dataclass
class Chain:
    """A chain as read: which recipe each stage uses and the plain values of its fields.

    Attributes:
        name: what the run folder is called by default.
        about: one line.
        stages: stage name -> its fields, in an order in which each stage comes after those it names.
        recipes: stage name -> its recipe.
        recipe_names: stage name -> ``family/stage``.
        source: the name or path it was read by.
    """

    name: str
    about: str
    stages: dict[str, dict[str, Any]]
    recipes: dict[str, Recipe] = field(repr=False)
    recipe_names: dict[str, str]
    source: str = ""

    @classmethod
    def load(cls, source: str | Path) -> Chain:
        """Read a chain by its name or by the path of its YAML file.

        Raises:
            UserError: unknown chain, unknown keys, recipes or stages, or stages that wait for one another.
        """
        path = chain_file(source)
        values = _with_base(read_yaml(path, "chain"), path)
        problems = [
            Problem(key, values[key], f"unknown key in {path.name}", nearest(key, _CHAIN_KEYS))
            for key in values
            if key not in _CHAIN_KEYS
        ]
        stages, defaults = values.get("stages"), values.get("defaults") or {}
        for what, table in (("stages", stages), ("defaults", defaults)):
            if not isinstance(table, dict) or (what == "stages" and not table):
                problems.append(
                    Problem(what, table, f"not a mapping in {path.name}", f"write {what}: with keys below it")
                )
        if problems:
            raise UserError.of(problems)
        name = str(values.get("name", path.stem))
        stages = {str(stage): table for stage, table in stages.items()}
        mend = "write letters, digits, _, - and ."
        for what, word in (("name", name), *(("stages", stage) for stage in stages)):
            if not _NAME.fullmatch(word):
                problems.append(Problem(what, word, "cannot be the name of a folder", mend))
        if problems:
            raise UserError.of(problems)
        chain = cls._build(name, str(values.get("about", "")), stages, defaults)
        chain.source = str(source)
        return chain

    @classmethod
    def _build(cls, name: str, about: str, stages: dict[str, Any], defaults: dict[str, Any]) -> Chain:
        recipes, names, tables, problems = {}, {}, {}, []
        for stage, table in stages.items():
            if not isinstance(table, dict) or "recipe" not in table:
                mend = "write recipe: family/stage and its fields below it"
                problems.append(Problem(f"stages.{stage}", table, "has no recipe", mend))
                continue
            table = dict(table)
            names[stage] = str(table.pop("recipe"))
            try:
                recipes[stage] = load_recipe(names[stage])
            except UserError as error:
                problems.append(Problem(f"{stage}.recipe", names[stage], *_tail(error)))
                continue
            known = fields_of(recipes[stage].config_class)
            tables[stage] = {key: value for key, value in defaults.items() if key in known} | table
        fields_anywhere = {key for r in recipes.values() for key in fields_of(r.config_class)}
        for key in defaults:
            if key not in fields_anywhere and not problems:
                mend = nearest(key, sorted(fields_anywhere))
                problems.append(Problem(f"defaults.{key}", defaults[key], "no stage has this field", mend))
        for stage, table in tables.items():
            for wanted in _references(table):
                if wanted not in stages:
                    problems.append(
                        Problem(f"{stage}", f"${{{wanted}}}", "no such stage", nearest(wanted, list(stages)))
                    )
        if problems:
            raise UserError.of(problems)
        order = _in_order(tables)
        return cls(name, about, {stage: tables[stage] for stage in order}, recipes, names)

    def stage_of(self, recipe: Recipe, wanted: str | None) -> str:
        """The stage of this chain that uses ``recipe`` (``wanted`` says which, where several do)."""
        mine = [s for s, r in self.recipes.items() if stage_name(r.function) == stage_name(recipe.function)]
        if wanted is not None and wanted not in mine:
            raise UserError(
                "--stage", wanted, "not a stage of this recipe in the chain", nearest(wanted, mine or ["-"])
            )
        if wanted is None and len(mine) != 1:
            shown = ", ".join(mine) or "none"
            raise UserError("--config", self.name, f"stages of this recipe: {shown}", "name one with --stage")
        return wanted or mine[0]

    def needed_for(self, stage: str, what: str = "stage") -> list[str]:
        """The stages that must be up to date before ``stage`` is, and ``stage`` itself, in order.

        Raises:
            UserError: if the chain has no such stage; ``what`` says where it was named.
        """
        if stage not in self.stages:
            raise UserError(what, stage, f"the chain {self.name} has no such stage", nearest(stage, list(self.stages)))
        wanted = {stage}
        for name in reversed(self.stages):
            if name in wanted:
                wanted.update(_references(self.stages[name]))
        return [name for name in self.stages if name in wanted]

    def _taken(self, stage: str, name: str) -> bool:
        """Whether the stage takes this field, or the data that the field describes, from another stage."""
        info = fields_of(self.recipes[stage].config_class)[name]
        wholes = [name, *(info.json_schema_extra or {}).get("of", [])]
        return any(True for whole in wholes for _ in _references(self.stages[stage].get(whole)))

    def configured(self, run_dir: Path, overrides: list[str], *, resolve: bool = True) -> dict[str, Any]:
        """Stage name -> its validated configuration, all mistakes of all stages shown at once.

        Args:
            run_dir: the run's folder.
            overrides: ``stage.key=value`` for one stage, or ``key=value`` for every stage that has the field and does
                not take it from another stage. ``text_column=`` and the like go where the data is read first.
            resolve: put the stages' folders in the place of ${stage}.

        Raises:
            UserError: one line for each mistake.
        """
        tables = {stage: dict(table) for stage, table in self.stages.items()}
        problems: list[Problem] = []
        for key, text in split_overrides(overrides):
            first, _, rest = key.partition(".")
            if first in tables and rest:
                override(self.recipes[first].config_class, tables[first], rest, text)
                continue
            takers = [s for s in tables if first in fields_of(self.recipes[s].config_class)]
            free = [s for s in takers if not self._taken(s, first)]
            if not free or first == "output_dir":
                fields = sorted({f for r in self.recipes.values() for f in fields_of(r.config_class)})
                why = "every stage takes it from another stage" if takers else "no stage or field of this name"
                mend = f"say which: {takers[0]}.{key}=…" if takers else nearest(first, [*tables, *fields])
                problems.append(Problem(key, text, why, "use --output_dir" if first == "output_dir" else mend))
            for stage in free:
                override(self.recipes[stage].config_class, tables[stage], key, text)
        configs = {}
        for stage, table in tables.items():
            try:
                validate(self.recipes[stage].config_class, table | {"output_dir": str(run_dir / stage)}, f"{stage}.")
                resolved = {key: _resolved(value, run_dir) if resolve else value for key, value in table.items()}
                configs[stage] = (resolved, str(run_dir / stage))
            except UserError as error:
                problems.extend(error.problems)
        if problems:
            raise UserError.of(problems)
        return configs

    def unresolved(self, run_dir: Path, overrides: list[str]) -> dict[str, Any]:
        """Stage name -> its configuration object, ${stage} left as it is: what can be said before anything runs.

        Args:
            run_dir: the run's folder.
            overrides: as for ``configured``.

        Raises:
            UserError: one line for each mistake.
        """
        found = self.configured(run_dir, overrides, resolve=False)
        return {stage: self.config_of(stage, table) for stage, table in found.items()}

    def config_of(self, stage: str, resolved: tuple[dict[str, Any], str]) -> Any:
        """The configuration object of a stage whose inputs are there by now."""
        values, folder = resolved
        return validate(self.recipes[stage].config_class, values | {"output_dir": folder}, f"{stage}.")

    def renamed(self, stage: str, metrics: dict[str, float]) -> dict[str, float]:
        """Metrics under the stage's own name, where the chain calls it otherwise than its recipe (``ppo_seed1/kl``)."""
        own = self.recipe_names[stage].rpartition("/")[2]
        if own == stage:
            return metrics
        return {re.sub(rf"^{re.escape(own)}/", f"{stage}/", key): value for key, value in metrics.items()}


def _tail(error: UserError) -> tuple[str, str]:
    return error.problems[0].problem, error.problems[0].mend


def _in_order(tables: dict[str, dict[str, Any]]) -> list[str]:
    """The stages so that each follows those it names, otherwise as written."""
    order: list[str] = []

    def visit(stage: str, path: tuple[str, ...]) -> None:
        if stage in order:
            return
        if stage in path:
            circle = " -> ".join([*path[path.index(stage) :], stage])
            raise UserError("stages", circle, "these stages wait for one another", "take one of the references out")
        for wanted in _references(tables[stage]):
            visit(wanted, (*path, stage))
        order.append(stage)

    for stage in tables:
        visit(stage, ())
    return order


def _refuse_foreign(run_dir: Path, chain: Chain) -> None:
    """Refuse a folder that belongs to something else."""
    file = run_dir / RUN_FILE
    if not file.exists():
        strangers = [p.name for p in run_dir.iterdir() if not p.name.startswith(".")]
        strangers = [name for name in strangers if name not in chain.stages or read_stage(run_dir / name) is None]
        if strangers:
            problem = f"holds files of no run ({', '.join(sorted(strangers)[:3])})"
            raise UserError("output_dir", run_dir, problem, "choose an empty or new folder")
        return
    before = read_yaml(file, "output_dir")
    if before.get("name") != chain.name:
        problem = f"belongs to the chain {before.get('name')!r}, not {chain.name!r}"
        raise UserError("output_dir", run_dir, problem, "choose another folder with --output_dir")


def _claim(run_dir: Path, chain: Chain, command: str) -> None:
    """Note whose folder this is."""
    table = {"name": chain.name, "about": chain.about, "command": command, "stages": list(chain.stages)}
    write_json(run_dir / RUN_FILE, table | {"versions": versions()})


def run(
    chain: Chain,
    run_dir: Path,
    overrides: list[str],
    *,
    force: list[str] | None = None,
    until: str | None = None,
    launcher: list[str] | None = None,
    command: str = "",
) -> dict[str, float]:
    """Bring a chain up to date and write ``metrics.json`` and ``report.html``; returns the metrics.

    Args:
        chain: which.
        run_dir: where; created if missing.
        overrides: see ``Chain.configured``.
        force: stages to run again even if finished.
        until: stop after this stage; stages it does not need are left out.
        launcher: the words of ``accelerate launch …`` to start each stage with; None runs all in this process.
        command: the command line, noted in ``run.json``.

    Raises:
        UserError: for a user's mistake, as far as possible before anything runs.
    """
    stages = chain.needed_for(until, "--until") if until else list(chain.stages)
    for name in force or []:
        chain.needed_for(name, "--force")
    configs = chain.configured(run_dir, overrides)
    check_chain({stage: (chain.recipes[stage].config_class, configs[stage][0]) for stage in stages}, run_dir)
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError("output_dir", run_dir, "is a file", "choose another folder with --output_dir")
    created = make_folder(run_dir)
    try:
        with plain_os_errors(run_dir), locked(run_dir):
            _refuse_foreign(run_dir, chain)
            return _run_locked(chain, run_dir, stages, configs, set(force or []), launcher, command)
    except (UserError, SystemExit):
        remove_empty(created)
        raise


def _run_locked(chain, run_dir, stages, configs, force, launcher, command) -> dict[str, float]:
    start = time.monotonic()
    done = 0  # stages made here; a run that fails in the first of them leaves the folder as it was
    unpushed: list[Problem] = []
    try:
        for number, name in enumerate(stages, 1):
            config = chain.config_of(name, configs[name])
            recipe = chain.recipes[name]
            head = f"[{number}/{len(stages)}] {name}"
            if name not in force and finished(recipe.function, config) is not None:
                print(f"{head}: up to date", flush=True)
                unpushed += _pushed_late(config)
                continue
            print(f"{head}: {recipe.summary}", flush=True)
            before = _stamp(run_dir / name)
            try:
                if launcher:
                    _launch(chain, name, config, run_dir, launcher, name in force)
                    metrics = read_stage(run_dir / name)["metrics"]
                else:
                    metrics = run_one(recipe, config, name in force, chain.recipe_names[name])
            except (UserError, SystemExit) as error:
                # Made, and only its push has failed: what comes after it does not need the Hub.
                stopped = isinstance(error, SystemExit) and error.code == EXIT_INTERRUPTED
                if stopped or not getattr(config, "push_to_hub", False) or _stamp(run_dir / name) == before:
                    raise
                metrics = read_stage(run_dir / name)["metrics"]
                mend = f"give: genalign push {run_dir / name}"
                told = Problem(name, run_dir / name, "was made, but not pushed (see above)", mend)
                unpushed += error.problems if isinstance(error, UserError) else [told]
            finally:
                # A stage may be made and its push fail.
                if _stamp(run_dir / name) != before:
                    _claim(run_dir, chain, command)
                    done += 1
            announce(chain.renamed(name, metrics), config.output_dir)
    finally:
        if done:
            metrics = collect(chain, run_dir)
            from pipelines.reporting.report import write_report

            report = write_report(run_dir)
    if not done:
        _claim(run_dir, chain, command)
        print(f"nothing to do: {run_dir} is up to date (report: {run_dir / 'report.html'})", flush=True)
        metrics = collect(chain, run_dir)
    else:
        print(f"done in {(time.monotonic() - start) / 60:.1f} min: {report}", flush=True)
    if any(configs[name][0].get("push_to_hub") for name in stages):
        from pipelines.publishing.push import refresh_cards

        unpushed += refresh_cards(run_dir / name for name in stages)
    if unpushed:
        raise UserError.of(unpushed)
    return metrics


def _pushed_late(config: Any) -> list[Problem]:
    """Push a stage that was finished before it was told to, or whose push has failed; returns what went wrong."""
    if not getattr(config, "push_to_hub", False):
        return []
    from pipelines.publishing.push import push_missing

    return problems_of(partial(push_missing, config))


def _stamp(stage_dir: Path) -> int:
    """When the stage was made; 0 where it is not there."""
    file = stage_dir / STAGE_FILE
    return file.stat().st_mtime_ns if file.exists() else 0


def collect(chain: Chain, run_dir: Path) -> dict[str, float]:
    """Merge the metrics of the chain's finished stages into ``metrics.json``; returns them."""
    metrics: dict[str, float] = {}
    for name in chain.stages:
        made = read_stage(run_dir / name)
        if made is not None and made["state"] == "finished":
            metrics.update(chain.renamed(name, made["metrics"]))
    metrics = dict(sorted(metrics.items()))
    if metrics:
        write_json(run_dir / "metrics.json", metrics)
    return metrics


def _launch(chain: Chain, name: str, config: Any, run_dir: Path, launcher: list[str], force: bool) -> None:
    """Run one stage in processes of its own."""
    file = run_dir / f".{name}.config.yaml"
    file.write_text(yaml.safe_dump(as_plain(config), sort_keys=False), encoding="utf-8")
    script = shared_folder("recipes") / f"{chain.recipe_names[name]}.py"
    words = [*launcher, str(script), "--config", str(file), *(["--force"] if force else [])]
    environment = dict(os.environ)
    if launcher[-2:-1] == ["--config_file"] and read_yaml(launcher[-1]).get("use_cpu"):
        environment["ACCELERATE_USE_CPU"] = "true"  # accelerate passes this on to a single process only
    try:
        code = subprocess.run(words, env=environment, check=False).returncode
    finally:
        file.unlink(missing_ok=True)
    if code in (2, 130):
        raise SystemExit(code)
    if code:
        raise UserError(name, " ".join(words), f"ended with exit code {code}", _AFTER_A_FAILURE)


def run_stage(chain: Chain, name: str, overrides: list[str], *, force: bool = False) -> None:
    """Run one stage of a chain in its run folder, on what the stages before it left there.

    Args:
        chain: the chain.
        name: the stage.
        overrides: ``key=value`` of this stage; ``output_dir=DIR`` names the run folder.
        force: run it even if finished.

    Raises:
        UserError: if a stage before it is missing, or for any other mistake.
    """
    run_dir = Path("runs") / chain.name
    mine = []
    for key, text in split_overrides(overrides):
        if key == "output_dir":
            run_dir = Path(text).expanduser()
        else:
            mine.append(key if key.startswith(f"{name}.") else f"{name}.{key}")
            mine[-1] += f"={text}"
    for before in chain.needed_for(name)[:-1]:
        made = read_stage(run_dir / before)
        if made is None or made["state"] != "finished":
            mend = f"run it first: genalign run {chain.source} --output_dir {run_dir} --until {name}"
            raise UserError(before, run_dir / before, "this stage comes before and is not finished", mend)
    config = chain.config_of(name, chain.configured(run_dir, mine)[name])
    announce(run_one(chain.recipes[name], config, force, chain.recipe_names[name]), config.output_dir)


def accelerate_launch(config_file: str | None) -> list[str]:
    """The words that start a script through ``accelerate launch``."""
    words = [sys.executable, "-m", "accelerate.commands.launch"]
    return [*words, "--config_file", config_file] if config_file else words
