"""Checkpoints that hold a whole model in one file, as Stable Diffusion and Latent Diffusion were released."""

from latentdiff.interchange.single_file.files import Checkpoint
from latentdiff.interchange.single_file.parts import (
    build_autoencoder,
    build_text_encoder,
    build_unet,
    check_checkpoint,
    clip_tokenizer,
    original_weights,
)
from latentdiff.interchange.single_file.settings import OriginalSettings, scheduler_settings

__all__ = [
    "Checkpoint",
    "OriginalSettings",
    "build_autoencoder",
    "build_text_encoder",
    "build_unet",
    "check_checkpoint",
    "clip_tokenizer",
    "original_weights",
    "scheduler_settings",
]
