"""Train a GAN on images: a generator against a discriminator.

    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/images/gan.py \\
        --config recipes/images/gan.yaml dataset=FOLDER_WITH_MNIST
"""

from pipelines.images.gan import gan
from pipelines.recipe import recipe

main = recipe(gan, __doc__)

if __name__ == "__main__":
    main()
