"""Reads text with summaries, checks it and saves train, validation and test splits.

accelerate launch --config_file accelerate_configs/cpu_ddp.yaml recipes/summarization/corpus.py dataset=train.jsonl
"""

from pipelines.corpus.corpus import corpus
from pipelines.recipe import recipe

main = recipe(corpus, __doc__)

if __name__ == "__main__":
    main()
