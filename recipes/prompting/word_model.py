"""Train the small decoder-only model on which prompting is shown offline, on in-context word tasks.

    accelerate launch --config_file accelerate_configs/cpu_ddp.yaml recipes/prompting/word_model.py \\
        --config recipes/prompting/prompting.yaml max_steps=1000
"""

from pipelines.prompting.word_model import word_model
from pipelines.recipe import recipe

main = recipe(word_model, __doc__)

if __name__ == "__main__":
    main()
