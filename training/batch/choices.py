"""What is random about a picture's turn in training: a function of the seed and of its place in the data order.

So a batch depends neither on how many processes or workers there are, nor on where a run was stopped and went on.
Crops and caption orders that are encoded beforehand are limited in number: `ViewChoice.all` and `CaptionChoice.all`
give those that the caches must hold.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from latentdiff.training.data import CaptionedPicture, assign_buckets
from latentdiff.training.data.pictures import View
from latentdiff.training.loop.order import generator_of, seed_of
from latentdiff.training.settings import DiffusionSettings, RunSettings

SAMPLE, STRATA, POSTERIOR = 0, 1, 2  # streams of random numbers, kept apart


@dataclass(frozen=True)
class Place:
    """A picture's place in training: picture `index` is number `slot` of the update of `step`."""

    step: int
    slot: int
    index: int


def sample_seed(settings: RunSettings, place: Place, stream: int = SAMPLE) -> int:
    """The seed of what is random about one picture's turn in one update."""
    return seed_of(settings.seed, stream, place.step, place.slot)


def sample_generator(settings: RunSettings, place: Place) -> torch.Generator:
    return torch.Generator().manual_seed(sample_seed(settings, place))


class ViewChoice:
    """Which part of each picture is taken, and whether it is mirrored.

    Args:
        step: what the sides must be multiples of, in pixels.
        variants: how many different random crops a picture has; 0: any number.
    """

    def __init__(
        self, settings: RunSettings, pictures: Sequence[CaptionedPicture], step: int, variants: int = 0
    ) -> None:
        self.buckets = assign_buckets(pictures, settings.resolution, step, settings.buckets)
        self.random_crop, self.flip = settings.crop == "random", settings.random_flip
        self.variants = variants

    def pick(self, index: int, uniform: Tensor) -> View:
        """The view of picture `index` for three uniform draws in [0, 1)."""
        x, y, flip = uniform.tolist()
        if self.random_crop and self.variants:
            x, y = self._crop(int(x * self.variants))
        crop = (x, y) if self.random_crop else (0.5, 0.5)
        return View(*self.buckets[index], crop=crop, flip=self.flip and flip < 0.5)

    def all(self, index: int) -> list[View]:
        """Every view that `pick` can give, where their number is limited."""
        crops = [self._crop(i) for i in range(self.variants)] if self.random_crop else [(0.5, 0.5)]
        flips = (False, True) if self.flip else (False,)
        return [View(*self.buckets[index], crop=crop, flip=flip) for crop in crops for flip in flips]

    def centred(self, index: int) -> View:
        """The middle of picture `index`, not mirrored."""
        return View(*self.buckets[index])

    def _crop(self, variant: int) -> tuple[float, float]:
        x, y = torch.rand(2, generator=generator_of(variant)).tolist()
        return x, y


class CaptionChoice:
    """A picture's caption at each of its turns: one of several, perhaps reordered, perhaps left out."""

    def __init__(self, settings: DiffusionSettings) -> None:
        self.dropout, self.shuffle = settings.caption_dropout, settings.caption_shuffle
        self.keep = settings.caption_keep
        self.variants = settings.cached_variants if settings.cache_text else 1 << 30

    def pick(self, captions: Sequence[str], uniform: Tensor) -> str:
        """The caption for three uniform draws in [0, 1)."""
        drop, which, variant = uniform.tolist()
        if drop < self.dropout:
            return ""
        caption = captions[int(which * len(captions))]
        return self._shuffled(caption, int(variant * self.variants)) if self.shuffle else caption

    def all(self, captions: Sequence[str]) -> list[str]:
        """Every caption that `pick` can give from these, where their number is limited."""
        if not self.shuffle:
            return [*captions]
        return [self._shuffled(caption, i) for caption in captions for i in range(self.variants)]

    def _shuffled(self, caption: str, variant: int) -> str:
        parts = [part.strip() for part in caption.split(",")]
        kept, rest = parts[: self.keep], parts[self.keep :]
        order = torch.randperm(len(rest), generator=generator_of(variant, len(rest)))
        return ", ".join(kept + [rest[i] for i in order.tolist()])


def time_draw(settings: RunSettings, place: Place, update_size: int, within: float) -> float:
    """Uniform in [0, 1), but each of an update's B equal bands has one picture, which lowers the loss's variance.

    Variational Diffusion Models (Kingma et al. 2021), App. I.1.

    Args:
        update_size: B, pictures in one update of all processes.
        within: uniform in [0, 1), the position within the band.
    """
    band = int(strata(settings.seed, place.step, update_size)[place.slot])
    return (band + within) / update_size


@lru_cache(maxsize=8)
def strata(seed: int, step: int, size: int) -> Tensor:
    """Which band of timesteps each picture of an update has. (size,)"""
    return torch.randperm(size, generator=generator_of(seed, STRATA, step))
