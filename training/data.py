"""Captioned pictures from a folder or from a `datasets` dataset, and the order in which training sees them."""

import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

logger = logging.getLogger(__name__)

PICTURE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})


@dataclass(frozen=True)
class CaptionedPicture:
    """One picture: its name (for messages), a function that opens it, its captions and its share in an epoch."""

    name: str
    open: Callable[[], Image.Image] = field(repr=False)
    captions: tuple[str, ...]
    weight: float = 1.0


def load_pictures(
    source: str, split: str = "train", image_column: str = "image", caption_column: str = "text"
) -> list[CaptionedPicture]:
    """The captioned pictures of `source`.

    `source` is a folder with ``metadata.jsonl`` (rows with ``file_name`` and ``text``, a string or a list of strings;
    optional ``weight`` and ``split``), a folder with a ``.txt`` file beside each picture, a folder written by
    ``datasets.save_to_disk``, or a dataset name for ``datasets.load_dataset``.

    Raises:
        FileNotFoundError: a picture that ``metadata.jsonl`` names does not exist, or a folder has no pictures.
        ValueError: a caption is missing or not text; a row is not what it should be. The file and line are named.
    """
    folder = Path(source)
    if folder.is_dir():
        if (folder / "metadata.jsonl").is_file():
            pictures = list(_from_metadata(folder, split, caption_column))
        elif (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file():
            pictures = _from_datasets(source, split, image_column, caption_column)
        else:
            pictures = list(_from_text_files(folder))
    elif os.path.isabs(source) or source.startswith((".", "~")) or folder.exists():
        raise FileNotFoundError(f"{source}: not a folder; --data takes a folder of pictures or a dataset name")
    else:
        pictures = _from_datasets(source, split, image_column, caption_column)
    if not pictures:
        raise FileNotFoundError(f"{source}: no captioned pictures found (split {split!r})")
    logger.info("%s: %d pictures", source, len(pictures))
    return pictures


def _from_metadata(folder: Path, split: str, caption_column: str) -> Iterator[CaptionedPicture]:
    file = folder / "metadata.jsonl"
    root = folder.resolve()
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not JSON ({error.msg})") from None
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            raise ValueError(f'{where}: expected {{"file_name": "...", "{caption_column}": "..."}}')
        if row.get("split", split) != split:
            continue
        path = (root / row["file_name"]).resolve()
        if not path.is_relative_to(root):
            raise ValueError(f"{where}: file_name {row['file_name']!r} leaves the folder {folder}")
        if not path.is_file():
            raise FileNotFoundError(f"{where}: no such picture: {path}")
        weight = row.get("weight", 1.0)
        if not isinstance(weight, int | float) or weight < 0:
            raise ValueError(f"{where}: weight must be a number of at least 0, not {weight!r}")
        captions = _captions(row.get(caption_column), where, caption_column)
        yield CaptionedPicture(str(path), _opener(path), captions, float(weight))


def _from_text_files(folder: Path) -> Iterator[CaptionedPicture]:
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in PICTURE_SUFFIXES:
            continue
        caption_file = path.with_suffix(".txt")
        if not caption_file.is_file():
            raise ValueError(
                f"{path}: no caption; write one into {caption_file.name} beside it, or a metadata.jsonl for the folder"
            )
        captions = _captions(caption_file.read_text(encoding="utf-8").strip(), str(caption_file), "text")
        yield CaptionedPicture(str(path), _opener(path), captions)


def _from_datasets(source: str, split: str, image_column: str, caption_column: str) -> list[CaptionedPicture]:
    import datasets

    if Path(source).is_dir():
        loaded = datasets.load_from_disk(source)
        if isinstance(loaded, datasets.DatasetDict):
            if split not in loaded:
                raise ValueError(f"{source}: no split {split!r}; it has {', '.join(loaded)}")
            loaded = loaded[split]
    else:
        try:
            loaded = datasets.load_dataset(source, split=split)
        except (FileNotFoundError, ConnectionError) as error:
            raise FileNotFoundError(
                f"{source}: no such folder here, and no dataset of that name could be loaded ({error})"
            ) from error
    return from_dataset(loaded, f"{source} ({split})", image_column, caption_column)


def from_dataset(
    dataset: Any, name: str = "dataset", image_column: str = "image", caption_column: str = "text"
) -> list[CaptionedPicture]:
    """Captioned pictures of a `datasets.Dataset` with an image column and a caption column (string or list)."""
    for column in (image_column, caption_column):
        if column not in dataset.column_names:
            raise ValueError(f"{name}: no column {column!r}; it has {', '.join(dataset.column_names)}")

    def opener(index: int) -> Callable[[], Image.Image]:
        return lambda: dataset[index][image_column]

    captions = dataset[caption_column]
    return [
        CaptionedPicture(f"{name}[{i}]", opener(i), _captions(caption, f"{name}[{i}]", caption_column))
        for i, caption in enumerate(captions)
    ]


def _captions(value: Any, where: str, column: str) -> tuple[str, ...]:
    captions = [value] if isinstance(value, str) else value
    if not isinstance(captions, list) or not captions or not all(isinstance(c, str) and c.strip() for c in captions):
        raise ValueError(f"{where}: {column!r} must be a caption or a list of captions, not {value!r}")
    return tuple(captions)


def _opener(path: Path) -> Callable[[], Image.Image]:
    return lambda: Image.open(path)


def read_pixels(picture: CaptionedPicture, resolution: int) -> Tensor:
    """The picture, upright, on white where transparent, resized and centre-cropped. (3, R, R) float32 in [-1, 1].

    Raises:
        ValueError: the picture cannot be read; the message names it.
    """
    try:
        with picture.open() as image:
            upright = ImageOps.exif_transpose(image)
            if upright.has_transparency_data:
                rgba = upright.convert("RGBA")
                flat = Image.new("RGBA", rgba.size, "white")
                upright = Image.alpha_composite(flat, rgba)
            rgb = ImageOps.fit(upright.convert("RGB"), (resolution, resolution), Image.Resampling.LANCZOS)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{picture.name}: cannot be read as a picture ({error}); repair or remove it") from error
    pixels = torch.from_numpy(np.array(rgb))  # (R, R, 3) uint8
    return pixels.permute(2, 0, 1).float() / 127.5 - 1


class PixelDataset(torch.utils.data.Dataset[Tensor]):
    """Pictures as (3, R, R) tensors in [-1, 1]; keys are (index, flip)."""

    def __init__(self, pictures: Sequence[CaptionedPicture], resolution: int) -> None:
        self.pictures = pictures
        self.resolution = resolution

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, key: tuple[int, bool]) -> Tensor:
        index, flip = key
        pixels = read_pixels(self.pictures[index], self.resolution)
        return pixels.flip(-1) if flip else pixels


class BatchOrder:
    """Which pictures make batch number n: a pure function of the seed and n, so a resumed run sees what it would have.

    Every picture comes once an epoch, in an order drawn for that epoch. If weights differ, each epoch instead draws
    pictures in proportion to their weights. Each process takes its own slice of a batch.

    Args:
        weights: (N,) share of each picture.
        batch_size: of one process.
    """

    def __init__(
        self, weights: Sequence[float], batch_size: int, seed: int, process_index: int = 0, num_processes: int = 1
    ) -> None:
        self.weights = torch.tensor(weights, dtype=torch.float64)
        if len(self.weights) == 0 or self.weights.sum() <= 0:
            raise ValueError("there are no pictures of positive weight to train on")
        self.batch_size, self.seed = batch_size, seed
        self.process_index, self.num_processes = process_index, num_processes
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def batch(self, number: int) -> list[int]:
        """Picture indices of this process's batch `number` (from 0); `batch_size` of them, across epochs if need be."""
        start = (number * self.num_processes + self.process_index) * self.batch_size
        return [self._picture(position) for position in range(start, start + self.batch_size)]

    def _picture(self, position: int) -> int:
        epoch, offset = divmod(position, len(self.weights))
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            if bool((self.weights == self.weights[0]).all()):
                self._order = torch.randperm(len(self.weights), generator=generator)
            else:
                self._order = torch.multinomial(self.weights, len(self.weights), replacement=True, generator=generator)
            self._epoch = epoch
        return int(self._order[offset])
