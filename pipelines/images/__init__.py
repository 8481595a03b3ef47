"""Generative models of images on diffusers' classes: one training loop for DDPM, bit-flip diffusion, VAE and GAN."""
