"""Runs a recipe's script so that a test can disturb it: every process leaves its number and what kind its
parameters are of, and pauses before each step.

accelerate launch --config_file … tests/launch/disturbed.py FOLDER SECONDS recipes/summarization/sft.py …
"""

import os
import runpy
import sys
import time
from pathlib import Path


def main() -> None:
    folder, seconds, script, *words = sys.argv[1:]
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, f"rank-{os.environ.get('RANK', '0')}").write_text(str(os.getpid()))
    from transformers import Trainer

    plain = Trainer.training_step

    def training_step(trainer, model, *args, **kwargs):
        time.sleep(float(seconds))
        kinds = {type(parameter.data).__name__ for parameter in model.parameters()}
        Path(folder, f"parameters-{os.environ.get('RANK', '0')}").write_text(" ".join(sorted(kinds)))
        return plain(trainer, model, *args, **kwargs)

    Trainer.training_step = training_step
    sys.argv = [script, *words]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
