"""A captioned picture, where its bytes come from, and its pixels."""

import hashlib
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from latentdiff.training.data.decode import decode

MOST_BYTES = 2**30  # of one encoded picture

Read = Callable[[], bytes]


@dataclass(frozen=True, slots=True)
class CaptionedPicture:
    """One picture and what is said about it.

    Args:
        name: a path, ``dataset[17]`` or ``shard.tar/0001.jpg``; for messages.
        read: gives the encoded file. It must be picklable, for the workers of a data loader.
        captions: at least one.
        weight: share in an epoch.
        loss_weight: factor of this picture's loss.
        digest: SHA-256 of the encoded bytes in hexadecimal; the survey fills it in.
        size: (width, height) as seen, after EXIF rotation; the survey fills it in.
        mask: gives the encoded mask, see `masks`; None: there is none, or it is not wanted.
        mask_digest: SHA-256 of the mask's bytes in hexadecimal; the survey fills it in.
    """

    name: str
    read: Read = field(repr=False)
    captions: tuple[str, ...]
    weight: float = 1.0
    loss_weight: float = 1.0
    digest: str = ""
    size: tuple[int, int] | None = None
    mask: Read | None = field(default=None, repr=False)
    mask_digest: str = ""


@dataclass(frozen=True, slots=True)
class FileReader:
    """The bytes of a file."""

    path: str

    def __call__(self) -> bytes:
        found = os.stat(self.path)
        if not stat.S_ISREG(found.st_mode):  # a pipe would block for ever
            raise ValueError("not a file")
        if found.st_size > MOST_BYTES:
            raise ValueError(f"{found.st_size:,} bytes are more than a picture has")
        return Path(self.path).read_bytes()

    def stamp(self) -> str:
        """Changes when the file does."""
        return stamp_of(self.path)


@dataclass(frozen=True, slots=True)
class PartReader:
    """Bytes `start` to `start + length` of a file, such as one picture in a tar."""

    path: str
    start: int
    length: int

    def __call__(self) -> bytes:
        if self.length > MOST_BYTES:
            raise ValueError(f"{self.length:,} bytes are more than a picture has")
        with open(self.path, "rb") as file:
            file.seek(self.start)
            content = file.read(self.length)
        if len(content) < self.length:
            raise ValueError(f"{self.path} is cut off")
        return content

    def stamp(self) -> str:
        """Changes when the file does."""
        return f"{stamp_of(self.path)} {self.start} {self.length}"


def stamp_of(path: str) -> str:
    found = os.stat(path)
    return f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"


@dataclass(frozen=True, slots=True)
class View:
    """A crop of a picture.

    Args:
        width, height: in pixels; the picture is resized to cover them.
        crop: where the crop lies in what is left over along x and y, 0 to 1.
        flip: mirrored left to right.
    """

    width: int
    height: int
    crop: tuple[float, float] = (0.5, 0.5)
    flip: bool = False

    def told(self, picture: CaptionedPicture) -> tuple[int, int, int, int, int, int]:
        """What SDXL (Podell et al. 2023, Sec. 2.2) is told of the picture that this view is of.

        Its own height and width, how many pixels of the resized one were cut off at the top and at the left (as it is
        seen, mirrored or not), height and width of the view.

        Raises:
            ValueError: the picture's size is not known.
        """
        if picture.size is None:
            raise ValueError(
                f"{picture.name}: has no size; take pictures from prepare_pictures, or set (width, height)"
            )
        width, height = picture.size
        scale = min(width / self.width, height / self.height)
        x, y = 1 - self.crop[0] if self.flip else self.crop[0], self.crop[1]
        top, left = round(y * (height / scale - self.height)), round(x * (width / scale - self.width))
        return height, width, top, left, self.height, self.width


def read_pixels(
    picture: CaptionedPicture,
    width: int,
    height: int,
    crop: tuple[float, float] = (0.5, 0.5),
    flip: bool = False,
) -> Tensor:
    """The picture upright, on white where transparent, resized to cover and cropped. (3, H, W) float32 in [-1, 1].

    Args:
        width: in pixels.
        height: in pixels.
        crop: where to crop, from (0, 0), left and top, to (1, 1), right and bottom.
        flip: mirror it, left to right, after cropping.

    Raises:
        ValueError: the picture cannot be read, or is no longer what its digest says; the message names it.
    """
    content = unchanged(picture)
    try:
        image = decode(content, picture.name).image
    except ValueError as error:
        raise ValueError(f"{picture.name}: cannot be read as a picture ({error}); repair or remove it") from error
    box = covered_box(image.size, width, height, crop)
    pixels = torch.from_numpy(np.array(image.resize((width, height), Image.Resampling.LANCZOS, box=box)))  # (H, W, 3)
    pixels = pixels.permute(2, 0, 1).float() / 127.5 - 1  # (3, H, W)
    return pixels.flip(-1) if flip else pixels


def unchanged(picture: CaptionedPicture) -> bytes:
    """The bytes of a picture, which are those of its digest if it has one.

    Raises:
        ValueError: they differ, and would be taken for another picture; or they cannot be read.
    """
    try:
        content = picture.read()
    except (OSError, ValueError) as error:
        raise ValueError(f"{picture.name}: cannot be read ({error})") from error
    if picture.digest and hashlib.sha256(content).hexdigest() != picture.digest:
        raise ValueError(
            f"{picture.name}: has changed since the pictures were examined; repeat the command, which examines it anew"
        )
    return content


def covered_box(
    size: tuple[int, int], width: int, height: int, crop: tuple[float, float]
) -> tuple[float, float, float, float]:
    """The part of a picture that is kept, in its own pixels: left, top, right, bottom.

    Args:
        size: (width, height) of the picture.
        width, height, crop: see `View`.
    """
    scale = min(size[0] / width, size[1] / height)
    covered = (width * scale, height * scale)
    left, top = (crop[0] * (size[0] - covered[0]), crop[1] * (size[1] - covered[1]))
    left, top = max(left, 0.0), max(top, 0.0)  # which rounding may have made less
    return left, top, min(left + covered[0], size[0]), min(top + covered[1], size[1])
