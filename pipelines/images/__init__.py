"""Generative models of images on diffusers' classes: DDPM, bit-flip diffusion, VAE and GAN through one training loop."""
