"""The closed forms of Gaussian diffusion by simulation, by Bayes and by diffusers' scheduler (no data needed).

accelerate launch recipes/problems/gaussian_diffusion.py output_dir=runs/gaussian_diffusion stage=10 beta_end=0.02
"""

from pipelines.problems.gaussian_diffusion import gaussian_diffusion
from pipelines.recipe import recipe

main = recipe(gaussian_diffusion, __doc__)

if __name__ == "__main__":
    main()
