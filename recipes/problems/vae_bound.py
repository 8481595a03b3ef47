"""The variational autoencoder's sampling and bound against quadrature, and what a trained one reaches.

accelerate launch recipes/problems/vae_bound.py vae=runs/images/vae output_dir=runs/vae_bound variance=0.2
"""

from pipelines.problems.vae_bound import vae_bound
from pipelines.recipe import recipe

main = recipe(vae_bound, __doc__)

if __name__ == "__main__":
    main()
