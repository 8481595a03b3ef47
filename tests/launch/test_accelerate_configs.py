"""Every launcher file is one that the installed Accelerate reads; a mistake in one is a line before anything starts."""

import importlib.util
import os
import re
import subprocess

import pytest
import yaml
from accelerate.commands import launch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

from pipelines.launching import launcher_problems
from pipelines.runner import shared_folder

FILES = sorted(shared_folder("accelerate_configs").glob("*.yaml"))
STRATEGIES = {
    "cpu": "NO",
    "cpu_ddp": "MULTI_GPU",
    "single_gpu": "NO",
    "ddp": "MULTI_GPU",
    "fsdp": "FSDP",
    "zero2": "DEEPSPEED",
    "zero3": "DEEPSPEED",
    "multi_node": "MULTI_GPU",
}


def test_all_are_there():
    assert {file.stem for file in FILES} == set(STRATEGIES)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_file_says_when_to_use_it_and_accelerate_reads_it(file, monkeypatch):
    text = file.read_text(encoding="utf-8")
    comment = text.partition("compute_environment")[0]
    assert comment.startswith("# ")
    assert len(comment) > 20
    arguments, defaults, _ = launch._validate_launch_command(
        launch.launch_command_parser().parse_args(["--config_file", str(file), "script.py"])
    )
    assert defaults.distributed_type == DistributedType(STRATEGIES[file.stem])
    assert defaults.mixed_precision == "no"  # precision is the recipe's own field
    several = arguments.multi_gpu or arguments.use_fsdp or arguments.use_deepspeed
    assert bool(several) == (defaults.num_processes > 1)
    if arguments.use_deepspeed:
        assert arguments.zero_stage == int(file.stem[-1])
        return
    if not several:
        prepare_simple_launcher_cmd_env(arguments)
        return
    environment = prepare_multi_gpu_env(arguments)
    assert (environment.get("ACCELERATE_USE_FSDP") == "true") == (file.stem == "fsdp")
    if file.stem == "fsdp":
        for name, value in environment.items():
            if name.startswith("FSDP_"):
                monkeypatch.setenv(name, value)
        plugin = FullyShardedDataParallelPlugin()
        assert (plugin.fsdp_version, plugin.reshard_after_forward) == (2, True)
        assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_check_finds_nothing_but_what_is_not_installed(file):
    found = [str(problem) for problem in launcher_problems(file)]
    if STRATEGIES[file.stem] == "DEEPSPEED" and importlib.util.find_spec("deepspeed") is None:
        line = "distributed_type=DEEPSPEED: deepspeed is not installed; pip install deepspeed, or take fsdp.yaml"
        assert found == [line]
    else:
        assert found == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_proceses": 2}, r"num_proceses=2: unknown in .*; did you mean 'num_processes'\?"),
        (
            {"distributed_type": "MULTI_GPUS"},
            r"distributed_type=MULTI_GPUS: no strategy .*; did you mean 'MULTI_GPU'\?",
        ),
        (
            {"fsdp_config": {"fsdp_offload_parms": 1}},
            r"fsdp_config.fsdp_offload_parms=1: unknown .* 'fsdp_offload_params'",
        ),
        ({"deepspeed_config": {"zero_stages": 1}}, r"deepspeed_config.zero_stages=1: unknown .* 'zero_stage'"),
        ({"distributed_type": "MULTI_CPU"}, r"distributed_type=MULTI_CPU: .*not start 2 processes.*cpu_ddp.yaml"),
        ({"distributed_type": "NO"}, r"distributed_type=NO: .*not start 2 processes.*cpu_ddp.yaml"),
        ({"num_processes": None}, r"num_processes=None: .*"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, changes, says):
    values = yaml.safe_load((shared_folder("accelerate_configs") / "cpu_ddp.yaml").read_text()) | changes
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(values))
    found = launcher_problems(file)
    assert len(found) == 1
    assert re.match(says, str(found[0])), str(found[0])


def test_genalign_run_refuses_it_before_anything_is_there(launching, begun, tmp_path):
    from tests.chain.conftest import CHAIN

    file = tmp_path / "mine.yaml"
    file.write_text("distributed_type: MULTI_GPU\nnum_proceses: 2\n")
    words = ("run", str(CHAIN), f"dataset={begun.data}", "--output_dir", str(tmp_path / "run"))
    code, printed, errors = launching.answer(*words, "--launcher", "accelerate", "--config_file", str(file))
    assert (code, printed) == (2, "")
    assert len(errors.splitlines()) == 1
    assert "num_proceses=2: unknown in" in errors
    assert not (tmp_path / "run").exists()


SLURM = """#!/bin/sh
# As SLURM's own of this name, for two machines that are one.
"""


@pytest.fixture
def slurm(tmp_path):
    """A folder with stand-ins for the two commands of SLURM that the script uses, and the variables it sets."""
    folder = tmp_path / "bin"
    folder.mkdir()
    scontrol = SLURM + '[ "$1 $2 $3" = "show hostnames node[1-2]" ] && printf "127.0.0.1\\n127.0.0.2\\n"\n'
    srun = SLURM + 'while [ "${1#--}" != "$1" ]; do shift; done\n'
    srun += 'SLURM_NODEID=0 "$@" & first=$!\nSLURM_NODEID=1 "$@"; second=$?\nwait $first && exit $second\n'
    for name, text in (("scontrol", scontrol), ("srun", srun)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    variables = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[1-2]"}
    return variables | {"PATH": f"{folder}:{os.environ['PATH']}"}


def test_the_slurm_script_says_what_is_missing(root, slurm, tmp_path):
    script = str(root / "accelerate_configs" / "slurm.sh")

    def said(*words, **changes):
        environment = {name: value for name, value in (os.environ | slurm | changes).items() if value is not None}
        done = subprocess.run(["bash", script, *words], capture_output=True, text=True, env=environment, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert len(done.stderr.splitlines()) == 1
        return done.stderr

    recipe = str(root / "recipes" / "summarization" / "sft.py")
    assert said().startswith("error: recipe=: ")
    assert said("none.py").startswith("error: recipe=none.py: no such file")
    assert said(recipe).startswith("error: CONFIG_FILE=accelerate_configs/multi_node.yaml: no such file")
    assert said(recipe, SLURM_JOB_ID=None).startswith("error: SLURM_JOB_ID=: this is no SLURM job")


@pytest.mark.slow
def test_the_slurm_script_trains_on_two_machines(root, slurm, begun, tmp_path):
    import shutil
    import sys

    run_dir = tmp_path / "run"
    shutil.copytree(begun.folder, run_dir)
    words = begun.words("sft", run_dir, "copy_steps=0", "max_steps=2", "save_steps=2", "batch_size=4")
    joined, ranks = str(root / "tests" / "chain" / "joined.py"), tmp_path / "ranks"
    ranks.mkdir()
    variables = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
    command = ["bash", str(root / "accelerate_configs" / "slurm.sh"), joined, str(ranks), *words]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | slurm | variables, cwd=root, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(path.name for path in ranks.iterdir()) == ["0-of-2", "1-of-2"]
    assert done.stdout.count(f"finished: {run_dir / 'sft'}") == 1
