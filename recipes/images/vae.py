"""Train a variational autoencoder: bounds on the test set, samples, reconstructions, traversals, interpolations.

    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/images/vae.py \\
        --config recipes/images/vae_conv.yaml dataset=FOLDER_WITH_MNIST
    python recipes/images/vae.py --config recipes/images/vae_mlp.yaml dataset=FOLDER_WITH_MNIST
"""

from pipelines.images.vae import vae
from pipelines.recipe import recipe

main = recipe(vae, __doc__)

if __name__ == "__main__":
    main()
