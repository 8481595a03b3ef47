"""Measure models on held-out documents: ROUGE, gold and proxy scores, win rate and KL, beside trivial baselines.

    accelerate launch --config_file accelerate_configs/cpu_ddp.yaml recipes/summarization/evaluate.py \\
        --config recipes/summarization/demo.yaml max_examples=400
"""

import sys
from pathlib import Path

# Python puts a script's folder first on the path, where this file would pass for the library of the same name.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

from pipelines.recipe import recipe  # noqa: E402
from pipelines.seq2seq.evaluate import evaluate  # noqa: E402

main = recipe(evaluate, __doc__)

if __name__ == "__main__":
    main()
