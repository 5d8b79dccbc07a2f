"""Reading and writing files of autoencoders alone, as Latent Diffusion and Taming Transformers released theirs."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from latentdiff.interchange.single_file.autoencoder_configs import vae_config
from latentdiff.interchange.single_file.configs import Config
from latentdiff.interchange.single_file.files import Checkpoint
from latentdiff.interchange.single_file.parts import build_autoencoder, check_checkpoint
from latentdiff.interchange.single_file.settings import assumed_settings, autoencoder_settings, measured_scale
from latentdiff.interchange.single_file.writing import (
    autoencoder_alone,
    header_of_parts,
    plain_config,
    write_checkpoint,
)

logger = logging.getLogger(__name__)

TRAINED_ON = 256
"""Side in pixels of the pictures on which all released autoencoders were trained."""

XL_SCALE = 0.13025
"""``scaling_factor`` of Stable Diffusion XL, whose autoencoder has the same shape as the others."""


def read_autoencoder(
    weights: Checkpoint,
    kinds: Mapping[str, Any],
    dtype: torch.dtype | None = None,
    scaling_factor: float | None = None,
    sample_size: int | None = None,
    original_config: str | Path | None = None,
) -> Any:
    """The autoencoder in a checkpoint, which may hold a whole model; see `SingleFileModel.from_single_file`.

    Args:
        kinds: the allowed classes, by name.

    Raises:
        FileNotFoundError, ValueError: see there.
    """
    if scaling_factor is not None and not 0 < scaling_factor < float("inf"):
        raise ValueError(f"scaling_factor={scaling_factor} should be a number above 0")
    if not weights.has_vae:
        check_checkpoint(weights)
        raise ValueError(f"{weights.file} has no autoencoder")
    changes = {"sample_size": sample_size, "scaling_factor": scaling_factor}
    if original_config is not None:
        said = autoencoder_settings(Path(original_config).expanduser())
        changes = {key: said.get(key) if value is None else value for key, value in changes.items()}
    given = {key: value for key, value in changes.items() if value is not None}
    if "vae" in weights.header:
        return build_autoencoder(weights, dtype, given, kinds)
    vae = build_autoencoder(weights, dtype, {**usual(weights), **given}, kinds)
    if "scaling_factor" not in given and is_unusual(weights, vae.config):
        logger.warning(
            "%s does not say how its latents are scaled; scaling_factor=%g is assumed. It matters only to a denoiser: "
            "give scaling_factor= (--scaling-factor) as the one was trained with",
            *(weights.file, vae.config["scaling_factor"]),
        )
    return vae


def usual(weights: Checkpoint) -> Config:
    """Default settings that the weights do not contain, for an autoencoder alone or in a whole model."""
    assumed, size = assumed_settings(weights), TRAINED_ON
    if weights.has_unet:
        levels = len(vae_config(weights)["block_out_channels"])
        size = (assumed.sample_size or 64) * 2 ** (levels - 1)
    is_xl = any(name.startswith("conditioner.") for name in weights)
    return {"sample_size": size, "scaling_factor": XL_SCALE if is_xl else assumed.scaling_factor}


def is_unusual(weights: Checkpoint, config: Any) -> bool:
    """Whether the scale of a Gaussian's latents is unknown: not in the file, and not of Stable Diffusion's shape."""
    if "num_vq_embeddings" in config or measured_scale(weights) is not None or weights.has_unet:
        return False
    return (config["latent_channels"], len(config["block_out_channels"])) != (4, 4)


def write_autoencoder(vae: Any, file: str | Path, dtype: torch.dtype | None = None, overwrite: bool = False) -> None:
    """Write an autoencoder under its original names; see `SingleFileModel.save_single_file`."""
    write_checkpoint(autoencoder_alone(vae), header_of_parts({"vae": plain_config(vae)}), file, dtype, overwrite)
