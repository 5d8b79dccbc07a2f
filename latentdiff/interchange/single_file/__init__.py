"""Checkpoints that hold a whole model in one file, as Stable Diffusion and Latent Diffusion were released."""
