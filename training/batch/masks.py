"""Masks of pictures, by places of the latent grid: from a cache, or read each time."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from accelerate import Accelerator
from torch import Tensor

from latentdiff.training.batch.cache import TensorStore, digest
from latentdiff.training.batch.filling import Batches, fill
from latentdiff.training.batch.latents import PictureView, cache_folder, cache_labels, load
from latentdiff.training.data.captioned_picture import CaptionedPicture, View
from latentdiff.training.data.masks import read_mask
from latentdiff.training.loop.run import TrainingRun
from latentdiff.training.settings import DiffusionSettings

MASKS = 1  # to be raised when `read_mask` gives something else for the same view


@dataclass(frozen=True)
class MaskReader:
    """Reads the mask of a view, (1, h, w) float16; picklable, for the workers of a data loader.

    Args:
        factor: pixels along a side of a place.
        store: None: masks are read from their files.
    """

    factor: int
    store: TensorStore | None = None

    def __call__(self, pictured: PictureView) -> Tensor:
        if self.store is None or pictured[0].mask is None:
            return read_mask(*pictured, self.factor)
        return self.store[self.key(*pictured)]

    def key(self, picture: CaptionedPicture, view: View) -> str:
        return digest("mask", picture.mask_digest, view.width, view.height, view.crop, view.flip, self.factor)

    def fill(self, wanted: Iterable[PictureView], accelerator: Accelerator, num_workers: int) -> None:
        """Keep what is missing, each process its share.

        Raises:
            ValueError: a mask cannot be read, or has changed; its picture is named.
        """
        assert self.store is not None
        by_key = {self.key(*pictured): pictured for pictured in wanted if pictured[0].mask is not None}

        def read(batches: Batches) -> Iterator[Mapping[str, Tensor]]:
            for keys, masks in load(by_key, batches, num_workers, partial(read_unchanged, factor=self.factor)):
                yield dict(zip(keys, masks, strict=True))

        def size(key: str) -> tuple[int, int]:
            return by_key[key][1].width, by_key[key][1].height

        fill(self.store, list(by_key), read, accelerator, batch_size=8, kind=size, things="masks")


def read_unchanged(pictured: PictureView, factor: int) -> Tensor:
    """`read_mask` of a mask that is still what its digest says. Raises ValueError if it is not."""
    picture, view = pictured
    assert picture.mask is not None
    try:
        content = picture.mask()
    except (OSError, ValueError) as error:
        raise ValueError(f"{picture.name}: its mask cannot be read ({error})") from error
    if hashlib.sha256(content).hexdigest() != picture.mask_digest:
        raise ValueError(f"{picture.name}: its mask has changed since the pictures were examined; repeat the command")
    return read_mask(replace(picture, mask=lambda: content), view, factor)


def mask_reader(
    run: TrainingRun, settings: DiffusionSettings, factor: int, wanted: Callable[[], Iterable[PictureView]]
) -> MaskReader:
    """The reader that the settings ask for; a cache is filled with all that `wanted` gives.

    Args:
        factor: of the autoencoder.
    """
    if not settings.cache_latents:
        return MaskReader(factor)
    folder: Path = cache_folder(run, settings) / "masks" / digest("masks", MASKS)
    reader = MaskReader(factor, TensorStore(folder, cache_labels(settings)))
    reader.fill(wanted(), run.accelerator, settings.num_workers)
    return reader
