"""Measure image models of all families by their samples: Fréchet distance, precision and recall, memorization, speed.

    accelerate launch --config_file accelerate_configs/cpu_ddp.yaml recipes/images/measure.py \\
        --config recipes/images/images.yaml samples=2000
"""

from pipelines.images.measure import measure
from pipelines.recipe import recipe

main = recipe(measure, __doc__)

if __name__ == "__main__":
    main()
