"""Wrong folders: what is written into, reported, pushed."""

import json
import os
import shutil
import subprocess

from tests.chain.wrong_input import At, Wrong, kind


@kind
def output_is_a_file(at: At) -> Wrong:
    at.write("out", "mine")
    says = f"output_dir={at.out}: is a file; choose another folder with --output_dir"
    return Wrong(at.chain(), [says])


@kind
def output_of_a_recipe_is_a_file(at: At) -> Wrong:
    at.write("out", "mine")
    return Wrong(at.corpus(at.data), [f"output_dir={at.out}: is a file; choose another output_dir"])


@kind
def output_lies_in_a_file(at: At) -> Wrong:
    at.write("out", "mine")
    argv = [word.replace(str(at.out), f"{at.out}/deep/run") for word in at.chain()]
    says = f"output_dir={at.out}/deep/run: {at.out} is a file; choose another output_dir"
    return Wrong(argv, [says])


@kind
def output_is_locked(at: At) -> Wrong:
    shutil.copytree(at.run, at.out)
    at.held()
    problem = "another run is writing into it; wait until it ends, or choose another output_dir"
    return Wrong(at.chain("--force", "evaluate"), [f"output_dir={at.out}: {problem}"])


@kind
def output_of_a_recipe_is_locked(at: At) -> Wrong:
    at.held()
    problem = "another run is writing into it; wait until it ends, or choose another output_dir"
    return Wrong(at.corpus(at.data), [f"output_dir={at.out}: {problem}"])


@kind
def output_is_not_writable(at: At) -> Wrong:
    closed = "/sys"  # to root too
    if os.geteuid() != 0:
        at.out.mkdir()
        at.out.chmod(0o555)
        closed = str(at.out)
    says = f"output_dir={closed}/run: may not be written; choose a folder you may write"
    return Wrong([word.replace(str(at.out), f"{closed}/run") for word in at.chain()], [says])


@kind
def run_that_may_no_longer_be_written(at: At) -> Wrong:
    at.mount("size=8m")
    shutil.copytree(at.run, at.out / "run")
    subprocess.run(["mount", "-o", "remount,ro", at.out], check=True)
    argv = [word.replace(str(at.out), f"{at.out}/run") for word in at.chain("--force", "evaluate")]
    return Wrong(argv, [f"output_dir={at.out}/run: may not be written; choose a folder you may write"])


@kind
def disk_that_is_full(at: At) -> Wrong:
    at.mount("size=16k")
    argv = [word.replace(str(at.out), f"{at.out}/run") for word in at.corpus(at.data)]
    mend = "free some space and give the same command again: it goes on from there"
    return Wrong(argv, [f"output_dir={at.out}/run: the disk is full; {mend}"])


@kind
def output_of_another_chain(at: At) -> Wrong:
    shutil.copytree(at.run, at.out)
    table = json.loads((at.out / "run.json").read_text()) | {"name": "theirs"}
    (at.out / "run.json").write_text(json.dumps(table))
    problem = "belongs to the chain 'theirs', not 'tiny'"
    return Wrong(at.chain(), [f"output_dir={at.out}: {problem}; choose another folder with --output_dir"])


@kind
def output_of_another_stage(at: At) -> Wrong:
    shutil.copytree(at.run / "tokenizer", at.out)
    says = f"output_dir={at.out}: holds the result of corpus.tokenizer.tokenizer; choose another output_dir"
    return Wrong(at.corpus(at.data), [says])


@kind
def output_holds_the_users_files(at: At) -> Wrong:
    at.write("out/thesis.tex", "mine")
    says = f"output_dir={at.out}: holds files of no run (thesis.tex); choose an empty or new folder"
    return Wrong(at.chain(), [says])


@kind
def output_of_a_recipe_holds_the_users_files(at: At) -> Wrong:
    at.write("out/thesis.tex", "mine")
    says = f"output_dir={at.out}: holds files that no stage made; choose an empty or new folder"
    return Wrong(at.corpus(at.data), [says])


@kind
def report_of_no_run(at: At) -> Wrong:
    says = f"DIR={at.data}: is not a run's folder (no run.json); give the folder of genalign run"
    return Wrong(["report", str(at.data)], [says])


@kind
def push_of_no_stage(at: At) -> Wrong:
    says = f"DIR/STAGE={at.run}: not a stage's folder (no stage.json); give runs/NAME/STAGE"
    return Wrong(["push", str(at.run), "--repo_id", "me/model"], [says])


@kind
def push_of_nothing(at: At) -> Wrong:
    says = f"DIR/STAGE={at.out}: no such folder; give the folder of a finished stage"
    return Wrong(["push", str(at.out), "--repo_id", "me/model"], [says])


@kind
def push_of_an_unfinished_stage(at: At) -> Wrong:
    shutil.copytree(at.run / "sft", at.out)
    record = json.loads((at.out / "stage.json").read_text()) | {"state": "interrupted"}
    (at.out / "stage.json").write_text(json.dumps(record))
    says = f"DIR/STAGE={at.out}: the stage is interrupted; let it finish, then push it"
    return Wrong(["push", str(at.out), "--repo_id", "me/model"], [says])


@kind
def push_to_a_bad_name(at: At) -> Wrong:
    shutil.copytree(at.run / "sft", at.out)
    says = "repo_id=me/my/model: not a valid name; give owner/name, of letters, digits, -, _ and ."
    return Wrong(["push", str(at.out), "--repo_id", "me/my/model"], [says])
