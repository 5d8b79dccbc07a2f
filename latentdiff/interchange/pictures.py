"""Picture files that somebody names: read whole, and safely."""

import hashlib
import io
import warnings
from functools import cache
from pathlib import Path

from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM", "QOI")
"""What is read. Others are left out: some run programs (EPS), some take any file for their own (TGA)."""


def read_picture(file: Path) -> tuple[Image.Image, str]:
    """A picture, decoded as it is (an animation's first frame), and the SHA-256 of its file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no picture, is damaged, or has more pixels or text than Pillow's limits allow.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: {'is a folder, not a picture' if file.is_dir() else 'no such file'}")
    content = file.read_bytes()
    try:
        image = decode(content)
    except Image.UnidentifiedImageError:
        raise ValueError(f"{file} is not a picture of a known format") from None
    except Image.DecompressionBombError:
        raise ValueError(f"{file} has more pixels than Pillow's limit against decompression bombs allows") from None
    except MemoryError:
        raise ValueError(f"{file}: there is not enough memory to decode this picture") from None
    except Exception as error:  # decoders raise nearly everything when a file was made to
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{file} is damaged or was made to do harm: {what}") from None
    return image, hashlib.sha256(content).hexdigest()


@cache
def readable_formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this installation of Pillow can read."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def decode(content: bytes) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # large; twice that is refused
        image = Image.open(io.BytesIO(content), formats=readable_formats())
        image.load()
        return image
