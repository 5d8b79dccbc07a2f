"""Checkpoints that hold a whole model in one file, as Stable Diffusion and Latent Diffusion were released."""

from latentdiff.interchange.single_file.adm import AdmCheckpoint, read_adm
from latentdiff.interchange.single_file.autoencoder_configs import autoencoder_kind, vae_config
from latentdiff.interchange.single_file.autoencoders import read_autoencoder, write_autoencoder
from latentdiff.interchange.single_file.configs import text_kind, unet_config
from latentdiff.interchange.single_file.files import HEADER, Checkpoint
from latentdiff.interchange.single_file.parts import (
    build_autoencoder,
    build_text_encoder,
    build_unet,
    check_checkpoint,
    clip_tokenizer,
)
from latentdiff.interchange.single_file.places import HUB_OPTIONS, ON_THE_HUB, find_file
from latentdiff.interchange.single_file.settings import (
    OriginalSettings,
    assumed_settings,
    is_guess,
    scheduler_settings,
)
from latentdiff.interchange.single_file.writing import (
    autoencoder_alone,
    check_target,
    header_of_parts,
    original_autoencoder,
    original_text_encoder,
    original_unet,
    plain_config,
    write_checkpoint,
)

__all__ = [
    "HEADER",
    "HUB_OPTIONS",
    "ON_THE_HUB",
    "AdmCheckpoint",
    "Checkpoint",
    "OriginalSettings",
    "assumed_settings",
    "autoencoder_alone",
    "autoencoder_kind",
    "build_autoencoder",
    "build_text_encoder",
    "build_unet",
    "check_checkpoint",
    "check_target",
    "clip_tokenizer",
    "find_file",
    "header_of_parts",
    "is_guess",
    "original_autoencoder",
    "original_text_encoder",
    "original_unet",
    "plain_config",
    "read_adm",
    "read_autoencoder",
    "scheduler_settings",
    "text_kind",
    "unet_config",
    "vae_config",
    "write_autoencoder",
    "write_checkpoint",
]
