"""Encoded pictures to RGB: upright, on white, of any mode, and safe against files made to do harm."""

import io
import os
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec

from PIL import Image

from latentdiff.interchange.picture_files import readable_formats, to_rgb, upright

MOST_PIXELS = 178_956_970  # where Pillow too speaks of a decompression bomb
LARGE = 2**25  # pixels; of these, threads decode one at a time, for each may take gigabytes
SMALLEST_SIDE = 8
ALWAYS = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff"),
    *(".avif", ".avifs", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".ppm", ".pgm", ".pbm", ".pnm", ".qoi"),
)
"""Suffixes of the formats that are recognised by their content; see `readable_formats`."""
BY_NAME = {".tga": "TGA", ".psd": "PSD", ".dds": "DDS", ".pcx": "PCX", ".sgi": "SGI"}
"""Formats, as Pillow calls them, that are read where the name says so."""
PLUGINS = {
    **dict.fromkeys((".heic", ".heif", ".hif"), ("HEIF", "pi_heif", "pi-heif")),
    ".jxl": ("JXL", "pillow_jxl", "pillow-jxl-plugin"),
}
"""By suffix, formats that Pillow reads with a further package: Pillow's name, the module, how to get it."""
OTHERS = frozenset(
    (".exr", ".hdr", ".xcf", ".kra", ".svg", ".svgz", ".jxr", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf")
)
"""Suffixes of pictures that are not read."""
PICTURE_SUFFIXES = frozenset((*ALWAYS, *BY_NAME, *PLUGINS, *OTHERS))

_large = threading.Lock()


@dataclass(frozen=True, slots=True)
class Decoded:
    """image: upright, RGB or what was asked for. format: Pillow's name of it. animated: whether it has more frames."""

    image: Image.Image
    format: str
    animated: bool


def is_picture(name: str) -> bool:
    """Whether a name is that of a picture, of whatever kind; see `why_unreadable`."""
    return os.path.splitext(name)[1].lower() in PICTURE_SUFFIXES


def why_unreadable(name: str) -> str | None:
    """Why a picture of this name is not read, and what to do; None if it is, or is no picture's name."""
    suffix = os.path.splitext(name)[1].lower()
    if suffix in PLUGINS and find_spec(PLUGINS[suffix][1]) is None:
        return f"{suffix} pictures are read with a further package: install {PLUGINS[suffix][2]}, or save it as PNG"
    return f"{suffix} pictures are not read; save it as PNG or JPEG" if suffix in OTHERS else None


@cache
def formats_of(suffix: str) -> tuple[str, ...]:
    """Formats, as Pillow calls them, that a picture with this suffix may have."""
    if suffix in BY_NAME:
        return (*readable_formats(), BY_NAME[suffix])
    if suffix in PLUGINS and find_spec(PLUGINS[suffix][1]) is not None:
        module = import_module(PLUGINS[suffix][1])  # one registers itself, the other has to be asked
        getattr(module, "register_heif_opener", lambda: None)()
        return (*readable_formats(), PLUGINS[suffix][0])
    return readable_formats()


def decode(content: bytes, name: str = "", convert: Callable[[Image.Image], Image.Image] = to_rgb) -> Decoded:
    """The first frame of an encoded picture as RGB.

    Args:
        name: of its file; some formats are read only where its suffix says so.
        convert: makes of a picture of any mode what is wanted instead of RGB.

    Raises:
        ValueError: the picture cannot be decoded whole, has more than `MOST_PIXELS`, or a side of fewer than
            `SMALLEST_SIDE`; the message says which.
    """
    if not content:
        raise ValueError("the file is empty")
    try:
        return _decode(content, formats_of(os.path.splitext(name)[1].lower()), convert)
    except MemoryError:
        raise ValueError("there is not enough memory to decode it") from None
    except Exception as error:  # decoders raise nearly everything when a file was made to
        raise ValueError(_tidy(error, name)) from None


def _tidy(error: Exception, name: str) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return why_unreadable(name) or "not a picture of a known format"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {MOST_PIXELS:,} pixels"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _decode(content: bytes, formats: tuple[str, ...], convert: Callable[[Image.Image], Image.Image]) -> Decoded:
    with Image.open(io.BytesIO(content), formats=formats) as image:
        width, height = image.size
        if width * height > MOST_PIXELS:
            raise ValueError(f"{width} x {height} pixels are more than {MOST_PIXELS:,}")
        if min(width, height) < SMALLEST_SIDE:
            raise ValueError(f"{width} x {height} pixels; a side must have at least {SMALLEST_SIDE}")
        animated = bool(getattr(image, "is_animated", False)) and image.format not in ("MPO", "PSD")
        with _large if width * height > LARGE else nullcontext():
            image.load()
            return Decoded(convert(upright(image)), image.format or "", animated)
