"""Where a batch's latents come from: a cache, or the frozen autoencoder that would fill it.

A source has a part for the workers of a data loader, which reads, and one for the training process, which makes
latents of what was read.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.training.batch.choices import ViewChoice
from latentdiff.training.batch.samples import read_view
from latentdiff.training.cache import LatentCache
from latentdiff.training.data import CaptionedPicture
from latentdiff.training.data.view import View
from latentdiff.training.loop.run import TrainingRun
from latentdiff.training.settings import DiffusionSettings


class LatentSource(ABC):
    """Latents of pictures.

    Attributes:
        read: for workers; a picture's view, as a tensor.
        idle: networks that training does not need, as a cache takes their place.
    """

    read: Callable[[CaptionedPicture, View], Tensor]
    idle: tuple[nn.Module, ...] = ()

    @abstractmethod
    def latents(self, pictures: Tensor, noise: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) float32, drawn from the posterior by `noise` of that shape."""


class CachedLatents(LatentSource):
    """Moments of the posterior from a cache."""

    def __init__(self, cache: LatentCache, autoencoder: Any, device: torch.device) -> None:
        self.read, self.idle, self.device = CacheReader(cache), (autoencoder,), device
        self.scale, self.shift = scale_of(autoencoder)

    def latents(self, pictures: Tensor, noise: Tensor) -> Tensor:
        mean, *std = pictures.to(self.device).float().unbind(1)  # (B, C, h, w) each
        drawn = mean + std[0] * noise.to(self.device) if std else mean
        return (drawn - self.shift) * self.scale


class EncodedLatents(LatentSource):
    """Pictures through a frozen autoencoder, batch by batch."""

    def __init__(self, autoencoder: Any, device: torch.device) -> None:
        self.read, self.device = read_view, device
        self.autoencoder = autoencoder.to(device)
        self.scale, self.shift = scale_of(autoencoder)

    @torch.no_grad()
    def latents(self, pictures: Tensor, noise: Tensor) -> Tensor:
        encoded = self.autoencoder.encode(pictures.to(self.device))
        if hasattr(encoded, "latents"):  # a codebook's latents have no spread
            return (encoded.latents - self.shift) * self.scale
        posterior = encoded.latent_dist
        return (posterior.mean + posterior.std * noise.to(self.device) - self.shift) * self.scale


@dataclass
class CacheReader:
    """Reads a cache, in a worker."""

    cache: LatentCache

    def __call__(self, picture: CaptionedPicture, view: View) -> Tensor:
        return self.cache[picture, view]


def scale_of(autoencoder: Any) -> tuple[float, float]:
    """What an autoencoder's latents are multiplied by, and what is subtracted before."""
    shift = getattr(autoencoder.config, "shift_factor", None) or 0.0
    return float(autoencoder.config.scaling_factor), float(shift)


def latent_source(
    run: TrainingRun,
    settings: DiffusionSettings,
    autoencoder: Any,
    wanted: Sequence[tuple[CaptionedPicture, View]],
) -> LatentSource:
    """The source that the settings ask for; a cache is filled with all of `wanted`.

    The autoencoder is back on the CPU afterwards where it is not needed, so that a GPU's memory is the denoiser's.
    """
    if not settings.cache_latents:
        return EncodedLatents(autoencoder, run.device)
    autoencoder.to(run.device)
    cache = LatentCache(cache_folder(run, settings) / "latents", autoencoder)
    cache.fill(wanted, autoencoder, run.accelerator, min(8, settings.batch_size), settings.num_workers)
    return CachedLatents(cache, autoencoder.to("cpu"), run.device)


def cache_folder(run: TrainingRun, settings: DiffusionSettings) -> Path:
    """The folder of a run's caches."""
    return Path(settings.cache_dir) if settings.cache_dir else run.folder / "cache"


def all_views(views: ViewChoice, pictures: Sequence[CaptionedPicture]) -> list[tuple[CaptionedPicture, View]]:
    """Each picture with every view of it that training may take."""
    return [(picture, view) for i, picture in enumerate(pictures) for view in views.all(i)]


def centred_views(views: ViewChoice, pictures: Sequence[CaptionedPicture]) -> list[tuple[CaptionedPicture, View]]:
    """Each picture with its middle, not mirrored."""
    return [(picture, views.centred(i)) for i, picture in enumerate(pictures)]
