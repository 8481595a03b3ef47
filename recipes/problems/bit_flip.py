"""Bit-flip diffusion: coins, posteriors, the sigmoid and the loss by enumeration; digits from fair coins.

accelerate launch recipes/problems/bit_flip.py bitflip=runs/images/bitflip
python recipes/problems/bit_flip.py bitflip=runs/images/bitflip delta=0.2 stages=5
"""

from pipelines.problems.bit_flip import bit_flip
from pipelines.recipe import recipe

main = recipe(bit_flip, __doc__)

if __name__ == "__main__":
    main()
