"""Fine-tune an encoder-decoder on documents and summaries, or train a small T5 from scratch.

    accelerate launch --config_file accelerate_configs/cpu_ddp.yaml recipes/summarization/sft.py \\
        --config recipes/summarization/demo.yaml learning_rate=1e-3
"""

from pipelines.recipe import recipe
from pipelines.seq2seq.sft import sft

main = recipe(sft, __doc__)

if __name__ == "__main__":
    main()
