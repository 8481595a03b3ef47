"""Train a bit-flip diffusion of binary images, with its exact variational bound.

    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/images/bitflip.py \\
        --config recipes/images/bitflip.yaml dataset=FOLDER_WITH_MNIST
"""

from pipelines.images.bitflip import bitflip
from pipelines.recipe import recipe

main = recipe(bitflip, __doc__)

if __name__ == "__main__":
    main()
