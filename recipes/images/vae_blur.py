"""Why reconstructions blur: sharpness of autoencoders against β, likelihood and the nats that the latent carries.

accelerate launch recipes/images/vae_blur.py
python recipes/images/vae_blur.py dataset=FOLDER_WITH_MNIST betas=[0.1,1,10] max_steps=5000
"""

from pipelines.images.vae_blur import vae_blur
from pipelines.recipe import recipe

main = recipe(vae_blur, __doc__)

if __name__ == "__main__":
    main()
