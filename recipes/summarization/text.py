"""Reads raw text to pretrain on, and pairs to mix in, and saves both.

accelerate launch --config_file accelerate_configs/cpu_ddp.yaml recipes/summarization/text.py text=folder_of_texts
"""

from pipelines.corpus.text import text
from pipelines.recipe import recipe

main = recipe(text, __doc__)

if __name__ == "__main__":
    main()
