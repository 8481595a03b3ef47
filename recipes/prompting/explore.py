"""Look at what models write: a temperature sweep, a test of "random" digits, token probabilities with alternatives.

    accelerate launch --config_file accelerate_configs/cpu_ddp.yaml recipes/prompting/explore.py \\
        --config recipes/prompting/pluralize_gpt2.yaml samples=4
"""

from pipelines.prompting.explore import explore
from pipelines.recipe import recipe

main = recipe(explore, __doc__)

if __name__ == "__main__":
    main()
