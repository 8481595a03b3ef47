"""Train a reward model on preference pairs: the encoder reads the document, the decoder each summary.

    accelerate launch --config_file accelerate_configs/cpu_ddp.yaml recipes/summarization/reward.py \\
        --config recipes/summarization/demo.yaml epochs=2
"""

from pipelines.recipe import recipe
from pipelines.seq2seq.reward import reward

main = recipe(reward, __doc__)

if __name__ == "__main__":
    main()
