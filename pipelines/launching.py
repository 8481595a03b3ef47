"""Accelerate's configuration files, read before anything is started: a mistake in one is one line, not a traceback.

Accelerate itself takes keys of its nested tables that it does not know without a word, and starts one process where a
file asks for several on the CPU.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipelines.config import StageConfig, nearest, read_yaml
from pipelines.distributed import Strategy, strategy_problems
from pipelines.errors import Problem, UserError

_WHAT = "--config_file"
_NESTED = ("fsdp_config", "deepspeed_config", "dynamo_config", "megatron_lm_config", "parallelism_config")


def launcher_problems(file: str | Path) -> list[Problem]:
    """What is wrong with a configuration file of ``accelerate launch``, on this machine and with this Accelerate.

    Args:
        file: its path.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        return [Problem(_WHAT, file, "no such file", "see the folder accelerate_configs")]
    try:
        values = read_yaml(path, _WHAT)
    except UserError as error:
        return error.problems
    found = _unknown(values, path)
    if found:
        return found
    return _strategy(values, path)


def _unknown(values: dict[str, Any], path: Path) -> list[Problem]:
    """Keys and strategies that the installed Accelerate does not know."""
    from accelerate.commands.config.config_args import ClusterConfig
    from accelerate.commands.launch import launch_command_parser
    from accelerate.utils import DistributedType

    known = sorted(ClusterConfig.__dataclass_fields__)
    found = [Problem(key, values[key], f"unknown in {path}", nearest(key, known)) for key in values if key not in known]
    strategies = [str(strategy.value) for strategy in DistributedType]
    named = values.get("distributed_type")
    if named not in strategies:
        mend = nearest(str(named), strategies) if named is not None else "name one, such as MULTI_GPU"
        found.append(Problem("distributed_type", named, f"no strategy of Accelerate ({path})", mend))
    options = sorted(vars(launch_command_parser().parse_args(["script.py"])))
    for table in _NESTED:
        for key in values.get(table) or {}:
            prefix = table.removesuffix("_config") + "_"
            names = {key, prefix + key} if table in ("fsdp_config", "dynamo_config") else {key}
            if not names & set(options):
                mine = [name for name in options if name.startswith(prefix) or table == "deepspeed_config"]
                found.append(Problem(f"{table}.{key}", values[table][key], f"unknown in {path}", nearest(key, mine)))
    return found


def _strategy(values: dict[str, Any], path: Path) -> list[Problem]:
    """Strategies that cannot do here what the file asks for."""
    from accelerate.commands.config.config_args import load_config_from_file

    try:
        config = load_config_from_file(str(path))
    except (ValueError, TypeError) as error:
        return [Problem(_WHAT, path, str(error), "compare it with the files in accelerate_configs")]
    kind, on_cpu = str(config.distributed_type.value), config.use_cpu
    if not isinstance(config.num_processes, int) or config.num_processes < 1:
        return [
            Problem("num_processes", config.num_processes, f"not a number from 1 in {path}", "give how many to start")
        ]
    if kind == "DEEPSPEED" and importlib.util.find_spec("deepspeed") is None:
        return [
            Problem("distributed_type", kind, "deepspeed is not installed", "pip install deepspeed, or take fsdp.yaml")
        ]
    if config.num_processes > 1 and (kind in ("NO", "MULTI_CPU") or (on_cpu and kind != "MULTI_GPU")):
        problem = f"Accelerate would not start {config.num_processes} processes that train together"
        return [Problem("distributed_type", kind, problem, "take cpu_ddp.yaml (MULTI_GPU with use_cpu: true)")]
    return []


def strategy_of(file: str | Path) -> Strategy:
    """How a configuration file has processes share the work."""
    values = read_yaml(file, _WHAT)
    kind = values.get("distributed_type")
    if kind == "FSDP":
        return "fsdp"
    if kind == "DEEPSPEED":
        return "zero3" if (values.get("deepspeed_config") or {}).get("zero_stage") == 3 else "zero2"
    return "ddp"


def check_launcher(file: str | Path, stages: Mapping[str, StageConfig]) -> None:
    """Refuse a configuration file with which the stages of a chain could not be started.

    Args:
        file: its path.
        stages: name -> its configuration.

    Raises:
        UserError: one line for each problem.
    """
    problems = launcher_problems(file)
    if not problems:
        strategy = strategy_of(file)
        for name, settings in stages.items():
            whole = strategy_problems(type(settings), strategy, f"{name} under")
            found = settings.launch_problems(strategy) if hasattr(settings, "launch_problems") else []
            problems += whole or [replace(problem, what=f"{name}.{problem.what}") for problem in found]
    if problems:
        raise UserError.of(problems)
