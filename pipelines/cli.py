"""The ``genalign`` command: list, run, estimate, report, push, doctor."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

import pipelines
from pipelines.errors import UserError
from pipelines.recipe import guarded


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="genalign", description="Align encoder-decoder models; measure honestly.")
    parser.add_argument("--version", action="version", version=f"genalign {pipelines.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    commands.add_parser("list", help="show every chain and every recipe").set_defaults(action=_list)

    run = commands.add_parser(
        "run",
        help="bring a chain up to date",
        description="Bring a chain up to date: finished stages are kept unless something that decides them changed.",
    )
    run.add_argument("chain", help="name of a chain (see genalign list) or path of its YAML file")
    run.add_argument(
        "overrides", nargs="*", metavar="[stage.]key=value", help="fields; without a stage, of every stage"
    )
    run.add_argument("--output_dir", help="the run's folder (default runs/NAME)")
    run.add_argument("--force", action="append", default=[], metavar="STAGE", help="run this stage again (repeatable)")
    run.add_argument("--until", metavar="STAGE", help="stop after this stage")
    run.add_argument("--launcher", choices=["accelerate"], help="start each stage through accelerate launch")
    run.add_argument("--config_file", metavar="FILE.yaml", help="accelerate's configuration, for --launcher accelerate")
    run.set_defaults(action=_run)

    estimate = commands.add_parser(
        "estimate",
        help="memory of each device and time of a chain's training stages, before anything runs",
        description="Memory of each device and time of every training stage. Needs no weights, no data and no network: "
        "the step of each stage is run on tensors without values.",
    )
    estimate.add_argument(
        "config", metavar="CONFIG", help="chain (name or YAML), recipe's name, or a recipe's own YAML"
    )
    estimate.add_argument("overrides", nargs="*", metavar="[stage.]key=value", help="fields, as for genalign run")
    estimate.add_argument("--recipe", metavar="FAMILY/STAGE", help="whose YAML it is, where it has no stages")
    estimate.add_argument("--device", default="a100-80gb", help="see the message on an unknown one (default a100-80gb)")
    estimate.add_argument("--launcher", default="single", help="single, ddp, fsdp, zero2, zero3 or a launcher file")
    estimate.add_argument("--processes", type=int, help="devices (default: the launcher file's, or 8)")
    estimate.add_argument("--utilization", type=float, default=0.4, help="share of the device's peak (default 0.4)")
    estimate.add_argument("--documents", type=int, help="training examples, where they are not known")
    estimate.add_argument("--json", action="store_true", help="print numbers: bytes, FLOPs and seconds")
    estimate.add_argument("--write", action="store_true", help="put the estimate into the head of the chain's file")
    estimate.set_defaults(action=_estimate)

    report = commands.add_parser("report", help="write DIR/report.html anew")
    report.add_argument("run_dir", metavar="DIR", help="a run's folder, or that of a recipe run by itself")
    report.set_defaults(action=_report)

    push = commands.add_parser(
        "push",
        help="write a stage's card and push what it made to the Hub",
        description="Write a stage's card and push what it made to the Hub, in one commit. What is left out is taken "
        "from the stage's own fields. A push that broke off is finished by giving it again: what arrived is not sent "
        "again.",
    )
    push.add_argument("stage_dir", metavar="DIR/STAGE", help="a finished stage's folder")
    push.add_argument("--repo_id", help="owner/name on the Hub; {stage} in it stands for the folder's name")
    push.add_argument("--private", action="store_true", default=None, help="create the repository as a private one")
    push.add_argument("--branch", help="branch that is committed to, made where there is none (default main)")
    push.add_argument("--commit_message", metavar="TEXT", help="of the commit (default: says what was made)")
    push.add_argument("--licence", metavar="NAME", help="licence on the card, by the Hub's name (apache-2.0 …)")
    push.add_argument("--adapter", action="store_true", default=None, help="the LoRA adapter alone, as PEFT loads it")
    push.add_argument("--base_model", metavar="ID", help="its base on the Hub, where that is not known")
    push.set_defaults(action=_push)

    doctor = commands.add_parser("doctor", help="versions, devices, precision, threads, disk, and what is off")
    doctor.set_defaults(action=_doctor)
    return parser


def _list(arguments: argparse.Namespace) -> None:
    from pipelines.runner import Chain, list_chains, list_recipes

    print("chains (genalign run NAME):")
    for name, about, file in list_chains():
        print(f"  {name:<22} {about}")
        print(f"  {'':<22} {' -> '.join(Chain.load(file).stages)}")
    print("\nrecipes (accelerate launch recipes/NAME.py --help):")
    for name, recipe in list_recipes():
        print(f"  {name:<28} {recipe.summary}")


def _run(arguments: argparse.Namespace) -> None:
    from pipelines.runner import Chain, accelerate_launch, run

    if arguments.config_file and not arguments.launcher:
        raise UserError("--config_file", arguments.config_file, "says how to launch", "add --launcher accelerate")
    if arguments.config_file and not Path(arguments.config_file).is_file():
        raise UserError("--config_file", arguments.config_file, "no such file", "see the folder accelerate_configs")
    if arguments.output_dir is not None and not arguments.output_dir.strip():
        raise UserError("--output_dir", arguments.output_dir, "is empty", "name a folder, or leave the option out")
    chain = Chain.load(arguments.chain)
    run_dir = Path(arguments.output_dir).expanduser() if arguments.output_dir else Path("runs") / chain.name
    if arguments.config_file:
        from pipelines.launching import check_launcher

        wanted = chain.needed_for(arguments.until, "--until") if arguments.until else chain.stages
        configs = chain.unresolved(run_dir, arguments.overrides)
        check_launcher(arguments.config_file, {name: configs[name] for name in wanted})
    run(
        chain,
        run_dir,
        arguments.overrides,
        force=arguments.force,
        until=arguments.until,
        launcher=accelerate_launch(arguments.config_file) if arguments.launcher else None,
        command=shlex.join(["genalign", *sys.argv[1:]]),
    )


def _estimate(arguments: argparse.Namespace) -> None:
    from pipelines.estimate import command

    print(command(arguments))


def _report(arguments: argparse.Namespace) -> None:
    from pipelines.runner import RUN_FILE
    from pipelines.stage import STAGE_FILE

    run_dir = Path(arguments.run_dir).expanduser()
    if not any((run_dir / name).is_file() for name in (RUN_FILE, STAGE_FILE)):
        raise UserError("DIR", run_dir, f"is not a run's folder (no {RUN_FILE})", "give the folder of genalign run")
    from pipelines.reporting.report import write_report

    print(write_report(run_dir))


def _push(arguments: argparse.Namespace) -> None:
    from pipelines.publishing.push import push

    names = ("repo_id", "private", "branch", "commit_message", "licence", "adapter", "base_model")
    print(push(Path(arguments.stage_dir).expanduser(), **{name: getattr(arguments, name) for name in names}))


def _doctor(arguments: argparse.Namespace) -> None:
    from pipelines.doctor import examine

    print(examine())


def main(argv: list[str] | None = None) -> None:
    """Entry point; exits with 0, 2 for a user's mistake, 130 when interrupted."""
    parser = _parser()
    # argparse gives a subcommand's overrides up at the first option; those that come after it are picked up here.
    arguments, rest = parser.parse_known_args(argv)
    if rest and (arguments.command not in ("run", "estimate") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides += rest
    raise SystemExit(guarded(lambda: arguments.action(arguments)))


if __name__ == "__main__":
    main()
