"""Pictures that a call is given, to tensors: what users have in hand, brought to what the networks take."""

from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageOps
from torch import Tensor

Pictures = Any
"""A PIL image, an array (B, H, W, C) or (H, W, C) with values in [0, 1], a tensor (B, C, H, W) or (C, H, W) with values
in [0, 1] or [-1, 1], or a list of one of these kinds."""


def upright_rgb(image: Any) -> Any:
    """A PIL image, or each of a list, as RGB: turned as its camera says, on white where it is transparent.

    Other things are given back as they are.
    """
    if isinstance(image, (list, tuple)):
        return [upright_rgb(one) for one in image]
    if not isinstance(image, Image.Image) or (image.mode == "RGB" and not image.getexif()):
        return image
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def to_pixels(processor: VaeImageProcessor, image: Pictures, **options: Any) -> Tensor:
    """Pictures as (P, 3, H, W), values in [-1, 1], sides multiples of the autoencoder's factor.

    What has the latents' channels is taken for scaled latents and given back as it is, (P, C, h, w).

    Args:
        options: ``height``, ``width`` and so on of ``VaeImageProcessor.preprocess``.

    Raises:
        TypeError: not a picture.
        ValueError: NaN or infinite values, or another number of channels.
    """
    if image is None:
        raise ValueError("image is missing; give a picture")
    try:
        pixels = processor.preprocess(upright_rgb(image), **options)
    except (ValueError, IndexError) as error:
        kind = type(image[0] if isinstance(image, list) and image else image).__name__
        raise TypeError(
            f"image must be a PIL image, an array (B, H, W, C), a tensor (B, C, H, W) or a list of them, not {kind} "
            f"({error})"
        ) from error
    if not torch.isfinite(pixels).all():
        raise ValueError("image has values that are not finite")
    latent_channels = processor.config.vae_latent_channels
    if pixels.shape[1] not in (3, latent_channels):
        raise ValueError(
            f"image has {pixels.shape[1]} channels; a picture has 3, and latents of this model have {latent_channels}"
        )
    return pixels


def are_latents(pixels: Tensor, channels: int) -> bool:
    """Whether `to_pixels` gave back latents; a model of 3 latent channels cannot be given any."""
    return pixels.shape[1] == channels and channels != 3


def check_pictures(name: str, given: int, prompts: int, count: int) -> None:
    """Raises ValueError if `given` pictures are neither one for all, nor one for each prompt or each image."""
    if given not in (1, prompts, count):
        raise ValueError(f"{given} pictures were given as {name} for {prompts} prompts; give one, or one for each")


def to_mask(processor: VaeImageProcessor, mask: Pictures, **options: Any) -> Tensor:
    """Masks as (P, 1, H, W), 1 where to paint (what was at least half white) and 0 elsewhere.

    Raises:
        TypeError: not a mask.
        ValueError: it is missing.
    """
    if mask is None:
        raise ValueError("mask_image is missing; give one that is white where to paint and black elsewhere")
    try:
        pixels = processor.preprocess(mask, **options)
    except (ValueError, IndexError) as error:
        raise TypeError(
            f"mask_image must be a PIL image, an array (B, H, W), a tensor (B, 1, H, W) or a list of them ({error})"
        ) from error
    if pixels.shape[1] != 1:
        raise ValueError(f"mask_image has {pixels.shape[1]} channels; give one with a single channel")
    return pixels
