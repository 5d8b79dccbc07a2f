"""Resizing pictures to a network's input size, without aliasing."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

RESIZE = "PIL bicubic with antialiasing, each channel in float32"


def resize_pictures(pictures: Sequence[Image.Image], size: int) -> Tensor:
    """RGB pictures as (B, 3, size, size) float32 with values from 0 to 255, not rounded.

    As in clean-fid (Parmar et al. 2022): filters that do not widen when they shrink a picture, the default of most deep
    learning libraries, change FID by more than models differ.
    """
    channels = [resize_channel(channel, size) for picture in pictures for channel in picture.convert("RGB").split()]
    return torch.from_numpy(np.stack(channels)).unflatten(0, (-1, 3))


def resize_channel(channel: Image.Image, size: int) -> np.ndarray:
    values = Image.fromarray(np.asarray(channel, dtype=np.float32))
    resized = values.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(resized, dtype=np.float32).clip(0, 255)


def pictures_to_pixels(pictures: Sequence[Image.Image]) -> Tensor:
    """RGB pictures of one size as (B, 3, H, W) float32 in [-1, 1]."""
    arrays = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])  # (B, H, W, 3)
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 127.5 - 1
