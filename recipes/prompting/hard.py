"""Measure prompting: strategies of hard prompts asked of models and endpoints, judged, paired and compared.

    accelerate launch --config_file accelerate_configs/cpu_ddp.yaml recipes/prompting/hard.py \\
        --config recipes/prompting/pluralize_gpt2.yaml max_examples=100
"""

from pipelines.prompting.hard import hard
from pipelines.recipe import recipe

main = recipe(hard, __doc__)

if __name__ == "__main__":
    main()
