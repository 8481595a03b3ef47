"""The GAN's game: the vanishing gradient, the best discriminator, the value at it, and what a trained one shows.

accelerate launch recipes/problems/gan_game.py gan=runs/images/gan output_dir=runs/gan_game shift=4
"""

from pipelines.problems.gan_game import gan_game
from pipelines.recipe import recipe

main = recipe(gan_game, __doc__)

if __name__ == "__main__":
    main()
