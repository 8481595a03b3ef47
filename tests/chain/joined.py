"""Runs a recipe's script as ``accelerate launch`` would, then has every process say which of how many it was.

accelerate launch --config_file … tests/chain/joined.py FOLDER recipes/summarization/sft.py …
"""

import runpy
import sys
from pathlib import Path


def main() -> None:
    folder, script, *words = sys.argv[1:]
    sys.argv = [script, *words]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as ended:
        if ended.code:
            raise
    from accelerate import PartialState

    state = PartialState()
    Path(folder, f"{state.process_index}-of-{state.num_processes}").touch()


if __name__ == "__main__":
    main()
