"""Train a bit-flip diffusion of binary images, with its exact variational bound.

accelerate launch --config_file accelerate_configs/cpu.yaml recipes/images/bitflip.py dataset=mnist-folder
"""

from pipelines.images.bitflip import bitflip
from pipelines.recipe import recipe

main = recipe(bitflip, __doc__)

if __name__ == "__main__":
    main()
