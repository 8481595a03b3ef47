"""KL one way finite and the other infinite; a Gaussian fitted to two modes by the forward and the reverse divergence.

accelerate launch recipes/problems/divergences.py
python recipes/problems/divergences.py distance=3 weight=0.5 first_scale=1 second_scale=1
"""

from pipelines.problems.divergences import divergences
from pipelines.recipe import recipe

main = recipe(divergences, __doc__)

if __name__ == "__main__":
    main()
