"""DDPM and DDIM from a Gaussian, where every law is known: simulated, checked and drawn (no data needed).

accelerate launch recipes/problems/ddim_gaussian.py output_dir=runs/ddim_gaussian sigma=0.2 steps=128
"""

from pipelines.problems.ddim_gaussian import ddim_gaussian
from pipelines.recipe import recipe

main = recipe(ddim_gaussian, __doc__)

if __name__ == "__main__":
    main()
