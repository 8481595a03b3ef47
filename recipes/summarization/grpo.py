"""Group-relative policy optimization (GRPO) of an encoder-decoder against reward functions.

    accelerate launch --config_file accelerate_configs/cpu_ddp.yaml recipes/summarization/grpo.py \\
        --config recipes/summarization/demo.yaml kl_coefficient=0.05
"""

from pipelines.recipe import recipe
from pipelines.seq2seq.group import grpo

main = recipe(grpo, __doc__)

if __name__ == "__main__":
    main()
