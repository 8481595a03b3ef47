"""The folder that the package ships: a pretrained model's weights and tokenizer, with a card of how it was made.

accelerate launch recipes/summarization/ship.py phases='[runs/pretraining/pretrain]' text=runs/pretraining/text
"""

from pipelines.recipe import recipe
from pipelines.seq2seq.ship import ship

main = recipe(ship, __doc__)

if __name__ == "__main__":
    main()
