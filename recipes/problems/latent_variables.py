"""Latent variable models: a forward pass, rate against distortion, why reconstructions blur, and new images.

accelerate launch recipes/problems/latent_variables.py vae=runs/images/vae
python recipes/problems/latent_variables.py vae=runs/images/vae betas=[0.5,1,2] dimensions=[2,10]
"""

from pipelines.problems.latent_variables import latent_variables
from pipelines.recipe import recipe

main = recipe(latent_variables, __doc__)

if __name__ == "__main__":
    main()
