"""Masks beside pictures: what of a picture the loss looks at, white; black is left out, and grey counts in part."""

import logging

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from latentdiff.interchange.picture_files import shallow
from latentdiff.training.data.caption_checks import shorten
from latentdiff.training.data.captioned_picture import CaptionedPicture, View, covered_box
from latentdiff.training.data.decode import decode
from latentdiff.training.data.picture_table import Joined, PictureTable

logger = logging.getLogger(__name__)

MASK_SUFFIX = ".mask.png"
"""NAME.mask.png is the mask of NAME.jpg, or of whatever other picture NAME is."""
COLOURFUL = 16  # of 255, by which the channels of what is grey may differ: JPEG's do


def to_grey(image: Image.Image) -> Image.Image:
    """A mask of any mode as grey of eight bits.

    Raises:
        ValueError: it is in colours, transparent or all black.
    """
    image = shallow(image)
    if image.has_transparency_data and np.asarray(image.convert("RGBA"))[..., 3].min() < 255:
        raise ValueError("it is transparent in places; save it as grey, white where the loss is to look")
    channels = np.asarray(image.convert("RGB"))  # (H, W, 3)
    if int(np.ptp(channels, axis=2).max()) > COLOURFUL:
        raise ValueError("it is in colours; save it as grey, white where the loss is to look")
    if not channels.any():
        raise ValueError("it is all black, so nothing of the picture would be learned; leave the picture out")
    return Image.fromarray(np.ascontiguousarray(channels[..., 1]))


def decode_mask(content: bytes, size: tuple[int, int]) -> Image.Image:
    """A mask as grey of eight bits.

    Args:
        content: the encoded file.
        size: (width, height) of its picture, which is to be the mask's too.

    Raises:
        ValueError: it is no mask, or of another size.
    """
    mask = decode(content, convert=to_grey).image
    if mask.size != size:
        raise ValueError(f"it has {mask.width} x {mask.height} pixels and the picture {size[0]} x {size[1]}")
    return mask


def read_mask(picture: CaptionedPicture, view: View, factor: int) -> Tensor:
    """What of a view the loss looks at, by places of the latent grid: (1, h, w) float16 in [0, 1].

    A picture without a mask is looked at as a whole.

    Args:
        factor: pixels along a side of one place.

    Raises:
        ValueError: the mask cannot be read; the message names the picture.
    """
    width, height = view.width // factor, view.height // factor
    if picture.mask is None:
        return torch.ones(1, height, width, dtype=torch.float16)
    assert picture.size is not None
    try:
        mask = decode_mask(picture.mask(), picture.size)
    except (OSError, ValueError) as error:
        raise ValueError(f"{picture.name}: its mask cannot be used ({error})") from error
    box = covered_box(mask.size, view.width, view.height, view.crop)
    places = torch.from_numpy(np.array(mask.resize((width, height), Image.Resampling.BOX, box=box)))  # (h, w)
    return (places.flip(-1) if view.flip else places)[None].div(255).half()


def has_masks(pictures: Joined, asked: bool | str) -> bool:
    """Whether the loss looks at masks: where every picture has one.

    Args:
        pictures: that are trained on or measured on.
        asked: `masked_loss` of the settings; "auto" leaves it to the pictures.

    Raises:
        ValueError: some have masks and others none, or none has where they are asked for; the first is named.
    """
    if any(isinstance(part, PictureTable) for part in pictures.parts):
        if asked is True:
            raise ValueError(TOO_MANY)
        return False
    without = [picture.name for picture in pictures if picture.mask is None]
    if not without:
        logger.info("the loss looks at the masks beside the pictures (masked_loss=false: at whole pictures)")
    elif len(without) < len(pictures) or asked is True:
        raise ValueError(
            f"{len(without)} of {len(pictures)} pictures have no mask, such as {shorten(without[0], 300)}; lay a "
            f"NAME{MASK_SUFFIX} beside each, all white for a whole picture, or name the masks in a column "
            f"(mask_column=...); masked_loss=false learns from whole pictures"
        )
    return not without


TOO_MANY = (
    "masks are not read of so many pictures in shards or a dataset; masked_loss=false learns from whole pictures, and "
    "max_pictures=... takes fewer"
)
