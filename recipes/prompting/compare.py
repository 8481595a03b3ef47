"""Compare the best written prompt with soft prompts, LoRA and full fine-tuning, in one table and figure.

    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/prompting/compare.py \\
        --config recipes/prompting/prompting.yaml resamples=5000
"""

from pipelines.prompting.compare import compare
from pipelines.recipe import recipe

main = recipe(compare, __doc__)

if __name__ == "__main__":
    main()
