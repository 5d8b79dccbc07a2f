"""Encoded pictures to RGB: upright, on white, of any mode, and safe against files made to do harm."""

import io
import threading
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageCms, ImageOps

from latentdiff.interchange.pictures import readable_formats

MOST_PIXELS = 178_956_970  # where Pillow too speaks of a decompression bomb
LARGE = 2**25  # pixels; of these, threads decode one at a time, for each may take gigabytes
SMALLEST_SIDE = 8

_large = threading.Lock()


@dataclass(frozen=True, slots=True)
class Decoded:
    """image: RGB, upright. format: Pillow's name of it. animated: whether there were further frames."""

    image: Image.Image
    format: str
    animated: bool


def decode(content: bytes) -> Decoded:
    """The first frame of an encoded picture as RGB.

    Raises:
        ValueError: the picture cannot be decoded whole, has more than `MOST_PIXELS`, or a side of fewer than
            `SMALLEST_SIDE`; the message says which.
    """
    if not content:
        raise ValueError("the file is empty")
    try:
        return _decode(content)
    except MemoryError:
        raise ValueError("there is not enough memory to decode it") from None
    except Exception as error:  # decoders raise nearly everything when a file was made to
        raise ValueError(_tidy(error)) from None


def _tidy(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "not a picture of a known format"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {MOST_PIXELS:,} pixels"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _decode(content: bytes) -> Decoded:
    with Image.open(io.BytesIO(content), formats=readable_formats()) as image:
        width, height = image.size
        if width * height > MOST_PIXELS:
            raise ValueError(f"{width} x {height} pixels are more than {MOST_PIXELS:,}")
        if min(width, height) < SMALLEST_SIDE:
            raise ValueError(f"{width} x {height} pixels; a side must have at least {SMALLEST_SIDE}")
        animated = bool(getattr(image, "is_animated", False)) and image.format != "MPO"
        with _large if width * height > LARGE else nullcontext():
            image.load()
            return Decoded(to_rgb(_upright(image)), image.format or "", animated)


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # broken EXIF does not spoil the pixels
        return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode as RGB: on white where transparent, 16 bits scaled to 8, CMYK by its profile where it has one.

    Raises:
        ValueError: the mode cannot be converted, or pixels are not numbers.
    """
    if image.mode == "I" or image.mode == "F" or image.mode.startswith("I;16"):
        return _deep_grey(image).convert("RGB")
    if image.mode == "CMYK":
        return _from_cmyk(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _deep_grey(image: Image.Image) -> Image.Image:
    """Grey of more than eight bits; Pillow's own conversion clips it."""
    grey = np.asarray(image, dtype=np.float32)
    most = float(grey.max(initial=0.0))
    if not np.isfinite(grey).all():
        raise ValueError("there are pixels that are not numbers")
    if image.mode == "F":
        scale = 255.0 if most <= 1 else 1.0 if most <= 255 else 1 / 257
    else:
        scale = 1 / 257 if most <= 65535 else 255 / (2**31 - 1)
    return Image.fromarray((grey * scale).round().clip(0, 255).astype(np.uint8))


def _from_cmyk(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    if isinstance(profile, bytes):
        try:
            own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            converted = ImageCms.profileToProfile(image, own, ImageCms.createProfile("sRGB"), outputMode="RGB")
            if converted is not None:
                return converted
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):  # a broken profile: convert without
            pass
    return image.convert("RGB")
