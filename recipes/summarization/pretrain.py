"""Pretrain a T5 on raw text and pairs: span corruption mixed with copying, gap sentences and summaries.

    accelerate launch --config_file accelerate_configs/cpu_ddp.yaml recipes/summarization/pretrain.py \\
        text=runs/text tokenizer=runs/tokenizer d_model=256 num_layers=4 optimizer=adafactor learning_rate=0.02
"""

from pipelines.recipe import recipe
from pipelines.seq2seq.pretrain import pretrain

main = recipe(pretrain, __doc__)

if __name__ == "__main__":
    main()
