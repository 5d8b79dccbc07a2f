"""Pictures: files read safely, and tensors to pictures."""

import hashlib
import io
import warnings
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageOps

from latentdiff.interchange.user_files import MAX_PICTURE, read_bytes

if TYPE_CHECKING:
    from torch import Tensor

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM", "QOI")
"""The formats that are read. Others are left out: some run programs (EPS), some accept any file (TGA)."""


def read_picture(file: Path) -> tuple[Image.Image, str]:
    """A picture, decoded without conversion (of an animation the first frame), and the SHA-256 of its file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no regular file or no picture, damaged, or has more pixels or text than Pillow's limits allow.
    """
    return picture_of(read_bytes(file, MAX_PICTURE), file)


def picture_of(content: bytes, file: Path | str) -> tuple[Image.Image, str]:
    """The same of a file that was read already.

    Args:
        file: how messages name it.
    """
    try:
        image = decode(content)
    except Image.UnidentifiedImageError:
        raise ValueError(f"{file} is not a picture of a known format") from None
    except Image.DecompressionBombError:
        raise ValueError(f"{file} has more pixels than Pillow's limit against decompression bombs allows") from None
    except MemoryError:
        raise ValueError(f"{file}: there is not enough memory to decode this picture") from None
    except Exception as error:  # on crafted files decoders raise nearly anything
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
        warnings.simplefilter(
            "ignore", Image.DecompressionBombWarning
        )  # a warning at the limit; twice the limit is an error
        image = Image.open(io.BytesIO(content), formats=readable_formats())
        image.load()
        return image


def upright(image: Image.Image) -> Image.Image:
    """A picture turned as its camera says (EXIF)."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # broken EXIF does not spoil the pixels
        return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode as RGB: on white where transparent, 16 bits scaled to 8, CMYK by its profile where it has one.

    Raises:
        ValueError: the mode cannot be converted, or pixels are not numbers.
    """
    image = shallow(image)
    if image.mode == "CMYK":
        return _from_cmyk(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def shallow(image: Image.Image) -> Image.Image:
    """Grey of more than eight bits as grey of eight, which Pillow's own conversion clips; others as they are.

    Raises:
        ValueError: pixels are not numbers.
    """
    if not (image.mode in ("I", "F") or image.mode.startswith("I;16")):
        return image
    import numpy as np

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
    from PIL import ImageCms

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


def to_pictures(pixels: "Tensor") -> list[Image.Image]:
    """(B, 3, H, W) or (B, 1, H, W), values in [-1, 1] -> B pictures, in colour or grey.

    Values outside are clipped, and what is not a number becomes mid-grey.
    """
    values = pixels.detach() if pixels.element_size() == 8 else pixels.detach().float()
    levels = ((values.nan_to_num(0.0).clamp(-1, 1) + 1) * 127.5).round().byte()
    arrays = levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()  # (B, H, W, C)
    return [Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array) for array in arrays]
