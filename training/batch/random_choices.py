"""What is random in training: which pictures an update has, and the crop, caption and time of each.

All of it is a function of the seed and of a picture's place in the data order. So a batch depends neither on how many
processes or workers there are, nor on where a run was stopped and went on. Crops and caption orders that are encoded
beforehand are limited in number: `ViewChoice.all` and `CaptionChoice.all` give those that the caches must hold.
"""

import hashlib
import struct
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from latentdiff.training.batch.cache import digest
from latentdiff.training.data import CaptionedPicture, assign_buckets
from latentdiff.training.data.buckets import Sizes
from latentdiff.training.data.caption_checks import has_sides
from latentdiff.training.data.captioned_picture import View
from latentdiff.training.data.picture_table import PictureTable, identity
from latentdiff.training.settings import DiffusionSettings, RunSettings

SAMPLE, STRATA, POSTERIOR = 0, 1, 2  # streams of random numbers, kept apart
MOST_CATEGORIES = 1 << 24  # that torch draws among


def seed_of(*numbers: int) -> int:
    """A seed for a random generator, well mixed from whole numbers; the same everywhere and always."""
    packed = struct.pack(f"<{len(numbers)}q", *numbers)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1


def generator_of(*numbers: int) -> torch.Generator:
    """A CPU generator with the seed of `numbers`."""
    return torch.Generator().manual_seed(seed_of(*numbers))


class PictureOrder:
    """Which pictures make the update of step n, for all processes and passes together.

    The pictures of one update are of one bucket, so that they fit into one tensor. Every picture comes once before any
    of its bucket comes again, in a new random order each time; buckets take turns in proportion to their size.
    If weights differ, pictures are drawn in proportion to them instead.

    Args:
        weights: (N,) share of each picture.
        update_size: pictures in one update: batch size x processes x accumulated passes.
        buckets: for each picture, the size it is trained at; by default all are of one.

    Raises:
        ValueError: no picture has a positive weight.
    """

    def __init__(
        self,
        weights: Sequence[float] | NDArray[np.float64],
        update_size: int,
        seed: int,
        buckets: Sequence[Hashable] | None = None,
    ) -> None:
        self.weights = torch.as_tensor(weights, dtype=torch.float64)
        if len(self.weights) == 0 or self.weights.sum() <= 0:
            raise ValueError("there are no pictures of positive weight to train on")
        self.update_size, self.seed = update_size, seed
        self._members = [torch.arange(len(self.weights))] if buckets is None else members(buckets)
        shares = torch.stack([self.weights[m].sum() for m in self._members]) / self.weights.sum()
        self._shares = shares.numpy()  # with which a step takes a tenth of torch's time, and there may be many
        self._turns: list[tuple[int, int]] = []  # (bucket, how many updates it had before) of the steps so far
        self._counts = np.zeros(len(self._members))
        self._rounds: dict[int, tuple[int, Tensor]] = {}  # the order last used of each bucket

    def update(self, step: int) -> list[int]:
        """Indices of the pictures of update `step` (from 0); `update_size` of them."""
        bucket, before = self._turn(step)
        start = before * self.update_size
        return [self._picture(bucket, position) for position in range(start, start + self.update_size)]

    def _turn(self, step: int) -> tuple[int, int]:
        if len(self._members) == 1:
            return 0, step
        while len(self._turns) <= step:  # the bucket that is furthest behind its share
            owed = self._shares * (len(self._turns) + 1) - self._counts
            bucket = int(owed.argmax())
            self._turns.append((bucket, int(self._counts[bucket])))
            self._counts[bucket] += 1
        return self._turns[step]

    def _picture(self, bucket: int, position: int) -> int:
        members = self._members[bucket]
        number, offset = divmod(position, len(members))
        if bucket not in self._rounds or self._rounds[bucket][0] != number:
            generator = generator_of(self.seed, bucket, number)
            weights = self.weights[members]
            if bool((weights == weights[0]).all()):
                order = torch.randperm(len(members), generator=generator)
            else:
                order = draw_in_proportion(weights, generator)
            self._rounds[bucket] = (number, order)
        return int(members[self._rounds[bucket][1][offset]])


def members(buckets: Sequence[Hashable]) -> list[Tensor]:
    """Indices of the pictures of each bucket, in the order in which buckets come first."""
    if isinstance(buckets, Sizes):
        numbers = buckets.numbers
        firsts = {int(number): int((numbers == number).argmax()) for number in np.unique(numbers)}
        return [
            torch.from_numpy(np.flatnonzero(numbers == number)) for number in sorted(firsts, key=firsts.__getitem__)
        ]
    indices: dict[Hashable, list[int]] = {}
    for index, bucket in enumerate(buckets):
        indices.setdefault(bucket, []).append(index)
    return [torch.tensor(some) for some in indices.values()]


def draw_in_proportion(weights: Tensor, generator: torch.Generator) -> Tensor:
    """As many draws, with replacement, as there are weights. (N,)"""
    if len(weights) < MOST_CATEGORIES:
        return torch.multinomial(weights, len(weights), replacement=True, generator=generator)
    sums = weights.cumsum(0)
    uniform = torch.rand(len(weights), dtype=torch.float64, generator=generator)
    return torch.searchsorted(sums, uniform * sums[-1], right=True).clamp_(max=int(weights.nonzero()[-1]))


@dataclass(frozen=True)
class Place:
    """A picture's place in training: picture `index` is number `slot` of the update of `step`."""

    step: int
    slot: int
    index: int


def flips(pictures: Sequence[CaptionedPicture], random_flip: "bool | str") -> "Sequence[bool] | NDArray[np.bool_]":
    """Whether each picture may be mirrored. random_flip: see `RunSettings`."""
    auto = random_flip == "auto"
    if isinstance(pictures, PictureTable):
        return ~pictures.column("has_sides") if auto else np.full(len(pictures), bool(random_flip))
    return [bool(random_flip) and not (auto and has_sides(picture)) for picture in pictures]


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
        self.random_crop = settings.crop == "random"
        self.flips = flips(pictures, settings.random_flip)
        self.variants = variants

    def pick(self, index: int, uniform: Tensor) -> View:
        """The view of picture `index` for three uniform draws in [0, 1)."""
        x, y, flip = uniform.tolist()
        if self.random_crop and self.variants:
            x, y = self._crop(int(x * self.variants))
        crop = (x, y) if self.random_crop else (0.5, 0.5)
        return View(*self.buckets[index], crop=crop, flip=bool(self.flips[index]) and flip < 0.5)

    def all(self, index: int) -> list[View]:
        """Every view that `pick` can give, where their number is limited."""
        crops = [self._crop(i) for i in range(self.variants)] if self.random_crop else [(0.5, 0.5)]
        flips = (False, True) if self.flips[index] else (False,)
        return [View(*self.buckets[index], crop=crop, flip=flip) for crop in crops for flip in flips]

    def centred(self, index: int) -> View:
        """The middle of picture `index`, not mirrored."""
        return View(*self.buckets[index])

    def _crop(self, variant: int) -> tuple[float, float]:
        x, y = torch.rand(2, generator=generator_of(variant)).tolist()
        return x, y


def views_digest(settings: DiffusionSettings, pictures: Sequence[CaptionedPicture], step: int) -> str | None:
    """A digest of the views that `ViewChoice` gives of very many pictures; None: they are only a few."""
    known = identity(pictures)
    values = (settings.resolution, step, settings.buckets, settings.crop, settings.random_flip)
    return None if known is None else digest("views", known, *values, settings.cached_variants)


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
