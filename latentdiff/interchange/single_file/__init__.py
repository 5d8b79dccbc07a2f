"""Checkpoints that hold a whole model in one file, as Stable Diffusion and Latent Diffusion were released."""

from latentdiff.interchange.single_file.configs import unet_config, vae_config
from latentdiff.interchange.single_file.files import HEADER, Checkpoint
from latentdiff.interchange.single_file.parts import (
    build_autoencoder,
    build_text_encoder,
    build_unet,
    check_checkpoint,
    clip_tokenizer,
)
from latentdiff.interchange.single_file.settings import (
    OriginalSettings,
    assumed_settings,
    is_guess,
    scheduler_settings,
)
from latentdiff.interchange.single_file.writing import original_autoencoder, original_text_encoder, original_unet

__all__ = [
    "HEADER",
    "Checkpoint",
    "OriginalSettings",
    "assumed_settings",
    "build_autoencoder",
    "build_text_encoder",
    "build_unet",
    "check_checkpoint",
    "clip_tokenizer",
    "is_guess",
    "original_autoencoder",
    "original_text_encoder",
    "original_unet",
    "scheduler_settings",
    "unet_config",
    "vae_config",
]
