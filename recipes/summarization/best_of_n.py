"""Best-of-n as a baseline: what picking the best of n samples by the reward model is worth, at what KL.

    accelerate launch --config_file accelerate_configs/cpu_ddp.yaml recipes/summarization/best_of_n.py \\
        --config recipes/summarization/demo.yaml samples=64
"""

from pipelines.recipe import recipe
from pipelines.seq2seq.best_of_n import best_of_n

main = recipe(best_of_n, __doc__)

if __name__ == "__main__":
    main()
