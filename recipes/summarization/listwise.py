"""Listwise DPO of an encoder-decoder on ranked lists of summaries (Plackett–Luce).

    accelerate launch --config_file accelerate_configs/cpu_ddp.yaml recipes/summarization/listwise.py \\
        --config recipes/summarization/demo.yaml beta=0.1
"""

from pipelines.recipe import recipe
from pipelines.seq2seq.listwise import listwise

main = recipe(listwise, __doc__)

if __name__ == "__main__":
    main()
