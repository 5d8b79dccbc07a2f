"""The scale of an autoencoder's latents, which its config keeps for denoisers."""

import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from latentdiff.codec import Codec, Posterior
from latentdiff.training.data import CaptionedPicture, read_pixels
from latentdiff.training.settings import AutoencoderSettings

logger = logging.getLogger(__name__)

CHUNK = 16  # pictures through the autoencoder at a time, at most
MEASURED = 1024  # pictures that the scale is measured on, at most


class LatentMoments:
    """Mean and standard deviation of all elements of latents, as running sums in float64."""

    def __init__(self) -> None:
        self.count, self.total, self.squares = 0, 0.0, 0.0

    def add(self, posterior: Posterior) -> None:
        """Count what is drawn from it: (B, C, h, w)."""
        mean = posterior.mean.double()
        self.count += mean.numel()
        self.total += float(mean.sum())
        self.squares += float(mean.square().sum())
        if posterior.std is not None:
            self.squares += float(posterior.std.double().square().sum())

    @property
    def mean(self) -> float:
        return self.total / self.count

    @property
    def std(self) -> float:
        variance = self.squares / self.count - self.mean**2
        return math.sqrt(max(variance, 0.0)) if math.isfinite(variance) else math.nan


@torch.no_grad()
def measure_latents(
    model: Any, pictures: Sequence[CaptionedPicture], settings: AutoencoderSettings, most: int = MEASURED
) -> LatentMoments:
    """Set `config.scaling_factor` so that scaled latents have unit standard deviation (Rombach et al. 2022, App. G).

    Latents are those that a denoiser is trained on: draws from the posterior, whose own variance counts, or what is
    not yet quantized. With ``settings.latent_shift``, `config.shift_factor` takes their mean away (diffusers':
    (latents - shift) * scale). Measured over at most `most` of the pictures, evenly spread. Latents that are all the
    same, or not finite, leave the config as it is, with a logged error.
    """
    codec, found = Codec(model), LatentMoments()
    for pixels in read_chunks(spread(pictures, most), settings):
        found.add(codec.posterior(pixels))
    if not found.std > 0:
        logger.error("the latents have mean %.4g and deviation %.4g: no scale suits them", found.mean, found.std)
        return found
    factor = 1 / found.std
    model.register_to_config(scaling_factor=factor)
    logger.info("latents: mean %.4g, deviation %.4g, so scaling_factor=%.5g", found.mean, found.std, factor)
    set_shift(model, found, settings.latent_shift)
    return found


def set_shift(model: Any, found: LatentMoments, wanted: bool) -> None:
    """Set `config.shift_factor` if `wanted`, or say whether it would matter; models with codes have none."""
    matters = abs(found.mean) > 0.1 * found.std
    if wanted:
        model.register_to_config(shift_factor=found.mean)
        logger.info(
            "shift_factor=%.5g: plain diffusers' Stable Diffusion pipelines ignore it, and would draw off colour",
            found.mean,
        )
    elif matters and "shift_factor" in model.config:
        logger.info(
            "their mean is %.2g deviations away from 0; latent_shift=true would save a shift_factor, which plain "
            "diffusers' Stable Diffusion pipelines ignore",
            abs(found.mean) / found.std,
        )


def spread(pictures: Sequence[CaptionedPicture], most: int) -> list[CaptionedPicture]:
    """At most `most` of them, evenly spread."""
    count = min(most, len(pictures))
    return [pictures[i * len(pictures) // count] for i in range(count)]


def chunk_size(settings: AutoencoderSettings) -> int:
    return min(CHUNK, settings.batch_size)


def read_chunks(pictures: Sequence[CaptionedPicture], settings: AutoencoderSettings) -> Iterator[Tensor]:
    """The pictures as (B, 3, R, R), some at a time."""
    size = settings.resolution
    for start in range(0, len(pictures), chunk_size(settings)):
        chunk = pictures[start : start + chunk_size(settings)]
        yield torch.stack([read_pixels(picture, size, size) for picture in chunk])
