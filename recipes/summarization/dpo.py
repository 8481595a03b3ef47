"""Direct Preference Optimization of an encoder-decoder on preference pairs.

    accelerate launch --config_file accelerate_configs/cpu_ddp.yaml recipes/summarization/dpo.py \\
        --config recipes/summarization/demo.yaml beta=0.1
"""

from pipelines.recipe import recipe
from pipelines.seq2seq.dpo import dpo

main = recipe(dpo, __doc__)

if __name__ == "__main__":
    main()
