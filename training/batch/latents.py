"""Where a batch's latents come from: a cache, or the frozen autoencoder that would fill it.

A source has a part for the workers of a data loader, which reads, and one for the training process, which makes
latents of what was read.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from latentdiff.codec import Codec, Posterior
from latentdiff.training.batch.choices import ViewChoice
from latentdiff.training.batch.samples import read_view
from latentdiff.training.cache import LatentCache
from latentdiff.training.data import CaptionedPicture
from latentdiff.training.data.pictures import View
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

    def __init__(self, cache: LatentCache, codec: Codec, device: torch.device) -> None:
        self.read, self.codec, self.device = CacheReader(cache), codec, device
        self.idle = (codec.autoencoder,)

    def latents(self, pictures: Tensor, noise: Tensor) -> Tensor:
        mean, *std = pictures.to(self.device).float().unbind(1)  # (B, C, h, w) each
        return self.codec.scaled(Posterior(mean, *std).sample(noise.to(self.device)))


class EncodedLatents(LatentSource):
    """Pictures through a frozen autoencoder, batch by batch."""

    def __init__(self, codec: Codec, device: torch.device) -> None:
        self.read, self.codec = read_view, codec
        codec.autoencoder.to(device)

    @torch.no_grad()
    def latents(self, pictures: Tensor, noise: Tensor) -> Tensor:
        return self.codec.encode_with(pictures, noise)


@dataclass
class CacheReader:
    """Reads a cache, in a worker."""

    cache: LatentCache

    def __call__(self, picture: CaptionedPicture, view: View) -> Tensor:
        return self.cache[picture, view]


def latent_source(
    run: TrainingRun,
    settings: DiffusionSettings,
    codec: Codec,
    wanted: Sequence[tuple[CaptionedPicture, View]],
) -> LatentSource:
    """The source that the settings ask for; a cache is filled with all of `wanted`.

    The autoencoder is back on the CPU afterwards where it is not needed, so that a GPU's memory is the denoiser's.
    """
    if not settings.cache_latents:
        return EncodedLatents(codec, run.device)
    codec.autoencoder.to(run.device)
    cache = LatentCache(cache_folder(run, settings) / "latents", codec.autoencoder)
    cache.fill(wanted, codec.autoencoder, run.accelerator, min(8, settings.batch_size), settings.num_workers)
    codec.autoencoder.to("cpu")
    return CachedLatents(cache, codec, run.device)


def cache_folder(run: TrainingRun, settings: DiffusionSettings) -> Path:
    """The folder of a run's caches."""
    return Path(settings.cache_dir) if settings.cache_dir else run.folder / "cache"


def all_views(views: ViewChoice, pictures: Sequence[CaptionedPicture]) -> list[tuple[CaptionedPicture, View]]:
    """Each picture with every view of it that training may take."""
    return [(picture, view) for i, picture in enumerate(pictures) for view in views.all(i)]


def centred_views(views: ViewChoice, pictures: Sequence[CaptionedPicture]) -> list[tuple[CaptionedPicture, View]]:
    """Each picture with its middle, not mirrored."""
    return [(picture, views.centred(i)) for i, picture in enumerate(pictures)]
