"""Train the small classifier whose features and probabilities images are measured in.

    accelerate launch --config_file accelerate_configs/cpu_ddp.yaml recipes/images/classifier.py \\
        --config recipes/images/images.yaml epochs=30
"""

from pipelines.images.classifier import classifier
from pipelines.recipe import recipe

main = recipe(classifier, __doc__)

if __name__ == "__main__":
    main()
