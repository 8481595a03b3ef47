"""Proximal policy optimization of an encoder-decoder against a reward model or other reward functions.

    accelerate launch --config_file accelerate_configs/cpu_ddp.yaml recipes/summarization/ppo.py \\
        --config recipes/summarization/demo.yaml kl_coefficient=0.05
"""

from pipelines.recipe import recipe
from pipelines.seq2seq.ppo import ppo

main = recipe(ppo, __doc__)

if __name__ == "__main__":
    main()
