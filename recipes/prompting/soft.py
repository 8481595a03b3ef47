"""Train a soft prompt (prompt tuning, prefix tuning, P-tuning), LoRA adapters or a whole model on a prompting task.

    accelerate launch --config_file accelerate_configs/cpu_ddp.yaml recipes/prompting/soft.py \\
        --config recipes/prompting/soft_gpt2_pluralize.yaml method=prefix_tuning
"""

from pipelines.prompting.soft import soft
from pipelines.recipe import recipe

main = recipe(soft, __doc__)

if __name__ == "__main__":
    main()
