"""Trains a tokenizer on the training split, or copies the one that a model brings.

accelerate launch --config_file accelerate_configs/cpu_ddp.yaml recipes/summarization/tokenizer.py dataset=runs/corpus
"""

from pipelines.corpus.tokenizer import tokenizer
from pipelines.recipe import recipe

main = recipe(tokenizer, __doc__)

if __name__ == "__main__":
    main()
