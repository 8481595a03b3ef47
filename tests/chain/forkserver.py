"""Runs ``genalign`` command lines in forked children of one process that has the heavy imports done.

Speaks one JSON line a request on standard input, ``{"argv": [...], "log": path, "kill": [pattern, n]}``, and answers
with one JSON line, ``{"pid": n}`` when the child is started and ``{"code": n}`` when it has ended (negative: the signal
that killed it). A child is a process of its own and dies by a real SIGKILL; only the 8 seconds of imports are shared.
Where ``argv`` begins with ``--recipe family/stage``, that recipe's script is run by itself; where it begins with
``--launch``, ``accelerate launch`` is run with the words after it. ``errors`` names a file of its own for standard
error, ``cwd`` the working folder, ``env`` further variables.
With ``kill``, the interpreter's audit hook ends the child by SIGKILL at the n-th time it opens a file for writing whose
path matches the pattern: a kill in the middle of that very write, at the same place every time. With ``kill_at_step``
it ends when it has begun so many training steps: where that leaves files and processes is left to chance.
"""

import json
import os
import re
import runpy
import signal
import sys
import traceback


def main() -> None:
    import accelerate.commands.launch
    import datasets
    import peft
    import torch.distributed.run
    import transformers
    import trl
    from transformers import AutoModelForSeq2SeqLM, Seq2SeqTrainer, T5ForConditionalGeneration
    from trl import DPOTrainer, GRPOTrainer, RLOOTrainer

    heavy = (accelerate, datasets, peft, torch, transformers, trl, AutoModelForSeq2SeqLM, Seq2SeqTrainer)
    heavy += (T5ForConditionalGeneration, DPOTrainer, GRPOTrainer, RLOOTrainer)
    serve()


def serve() -> None:
    """Answer requests until standard input ends, then end at once: taking down all that was imported takes long."""
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            run(request)
        print(json.dumps({"pid": pid}), file=answers, flush=True)
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"code": os.waitstatus_to_exitcode(status)}), file=answers, flush=True)
    os._exit(0)


def kill_at(pattern: str, count: int) -> None:
    """Die by SIGKILL at the ``count``-th opening for writing of a path that matches ``pattern``."""
    left = count

    def hook(event: str, arguments: tuple) -> None:
        nonlocal left
        if event != "open" or not isinstance(arguments[0], (str, bytes)):
            return
        path, mode, flags = arguments
        writes = bool(set(mode) & set("wax+")) if isinstance(mode, str) else bool(flags & (os.O_WRONLY | os.O_RDWR))
        if writes and re.search(pattern, os.fsdecode(path)):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def kill_at_step(count: int) -> None:
    """Die by SIGKILL on entering the ``count``-th step of any Trainer, before its gradient is there."""
    from transformers import Trainer

    left, plain = count, Trainer.training_step

    def training_step(*args, **kwargs):
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(*args, **kwargs)

    Trainer.training_step = training_step


class Here:
    """In place of ``subprocess.Popen``: runs a Python script in this process, which has its imports done."""

    def __init__(self, command: list[str], env: dict[str, str]):
        os.environ.clear()
        os.environ.update(env)
        self.returncode = 0
        try:
            script(command[1:])
        except SystemExit as ended:
            self.returncode = ended.code if isinstance(ended.code, int) else int(ended.code is not None)

    def wait(self) -> None:
        """It has ended already."""


def script(words: list[str]) -> None:
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


def launch(words: list[str]) -> None:
    """``accelerate launch WORDS``: its own code from the command line to the environments and numbers of the processes.

    Only the interpreters are not started anew: one process is this one, several are forked by torch's own launcher.
    """
    from accelerate.commands import launch as accelerate

    accelerate.subprocess.Popen = Here
    arguments = accelerate.launch_command_parser().parse_args(words)
    arguments.run_path, arguments.start_method = True, "fork"  # of torch.distributed.run, where there are several
    accelerate.launch_command(arguments)


def start(argv: list[str]) -> None:
    """Run a command line as its console script, its recipe's script or ``accelerate launch`` would."""
    if argv[:1] == ["--launch"]:
        launch(argv[1:])
    elif argv[:1] == ["--recipe"]:
        from pipelines.runner import shared_folder

        script([str(shared_folder("recipes") / f"{argv[1]}.py"), *argv[2:]])
    else:
        from pipelines.cli import main as genalign

        sys.argv = ["genalign", *argv]
        genalign(argv)


def run(request: dict) -> None:
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    errors = request.get("errors")
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if errors else log, 2)
    os.chdir(request.get("cwd") or ".")
    os.environ.update(request.get("env") or {})
    code = 1
    try:
        if request.get("kill"):
            kill_at(*request["kill"])
        if request.get("kill_at_step"):
            kill_at_step(request["kill_at_step"])
        start(request["argv"])
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
