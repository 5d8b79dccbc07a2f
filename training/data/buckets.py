"""Aspect-ratio buckets: a few sizes of about the same area, so that pictures keep their shape."""

import math
from collections.abc import Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from latentdiff.training.data.captioned_picture import CaptionedPicture
from latentdiff.training.data.decode import decode
from latentdiff.training.data.picture_table import PictureTable

Size = tuple[int, int]  # (width, height)


def bucket_sizes(resolution: int, step: int, max_ratio: float = 2.0) -> list[Size]:
    """Sizes (width, height), tallest first: sides are multiples of `step`, the area is about ``resolution**2``.

    Args:
        resolution: side of the square one, in pixels, a multiple of `step`.
        max_ratio: the longer side over the shorter one, at most.

    Raises:
        ValueError: `resolution` is not a multiple of `step`.
    """
    if step < 1 or resolution < step or resolution % step:
        raise ValueError(f"resolution {resolution} must be a multiple of {step}")
    if max_ratio < 1:
        raise ValueError(f"max_ratio must be at least 1, not {max_ratio}")
    sizes = {(resolution, resolution)}
    for short in range(step, resolution, step):
        long = round(resolution**2 / short / step) * step
        if short < long <= max_ratio * short:
            sizes |= {(short, long), (long, short)}
    return sorted(sizes)


def nearest(size: Size, sizes: Sequence[Size]) -> Size:
    """Which of `sizes` has the aspect ratio that is nearest to that of `size`, by its logarithm."""
    ratio = math.log(size[0] / size[1])
    return min(sizes, key=lambda bucket: (abs(math.log(bucket[0] / bucket[1]) - ratio), bucket))


class Sizes(Sequence[Size]):
    """The bucket of each of very many pictures.

    Args:
        sizes: the buckets.
        numbers: (N,) of each picture's.
    """

    def __init__(self, sizes: Sequence[Size], numbers: NDArray[Any]) -> None:
        self.sizes, self.numbers = sizes, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> Size: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Size]: ...
    def __getitem__(self, index: int | slice) -> "Size | Sequence[Size]":
        if isinstance(index, slice):
            return Sizes(self.sizes, self.numbers[index])
        return self.sizes[int(self.numbers[index])]


def assign_buckets(
    pictures: Sequence[CaptionedPicture], resolution: int, step: int, enabled: bool, max_ratio: float = 2.0
) -> Sequence[Size]:
    """(width, height) that each picture is trained at: a square where not `enabled`, else the bucket nearest in shape.

    Args:
        step: what sides must be a multiple of, in pixels.

    Raises:
        ValueError: `resolution` is not a multiple of `step`, or a picture without a size cannot be read.
    """
    if not enabled:
        square = (resolution, resolution)
        table = isinstance(pictures, PictureTable)
        return Sizes([square], np.zeros(len(pictures), np.uint8)) if table else [square] * len(pictures)
    sizes = bucket_sizes(resolution, step, max_ratio)
    if isinstance(pictures, PictureTable):
        own = np.stack([pictures.column("width"), pictures.column("height")], axis=1)
        found, numbers = np.unique(own.view(np.int64).reshape(-1), return_inverse=True)
        buckets = [sizes.index(nearest((w, h), sizes)) for w, h in found.view(np.int32).reshape(-1, 2).tolist()]
        return Sizes(sizes, np.array(buckets, dtype=np.uint16)[numbers])
    known: dict[Size, Size] = {}
    for size in {picture.size or _size(picture) for picture in pictures}:
        known[size] = nearest(size, sizes)
    return [known[picture.size or _size(picture)] for picture in pictures]


def _size(picture: CaptionedPicture) -> Size:
    try:
        return decode(picture.read(), picture.name).image.size
    except (OSError, ValueError) as error:
        raise ValueError(f"{picture.name}: cannot be read as a picture ({error})") from error
