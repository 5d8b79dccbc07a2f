"""Pictures as pixels: brought to a network's input size without aliasing, and compared by PSNR and SSIM."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

RESIZE = "PIL bicubic with antialiasing, each channel in float32"
WINDOW, SIGMA = 11, 1.5  # SSIM's Gaussian window; Wang et al. 2004, section III-B
K1, K2 = 0.01, 0.03
RANGE = 2.0  # from -1 to 1


def resize_pictures(pictures: Sequence[Image.Image], size: int) -> Tensor:
    """RGB pictures as (B, 3, size, size) float32 with values from 0 to 255, not rounded.

    As in clean-fid (Parmar et al. 2022): filters that do not widen when they shrink a picture, the default of most deep
    learning libraries, change FID by more than models differ.
    """
    channels = [channel for picture in pictures for channel in picture.convert("RGB").split()]
    in_float = [Image.fromarray(np.asarray(channel, dtype=np.float32)) for channel in channels]
    resized = [channel.resize((size, size), Image.Resampling.BICUBIC) for channel in in_float]
    return torch.from_numpy(np.stack([np.asarray(channel) for channel in resized]).clip(0, 255)).unflatten(0, (-1, 3))


def pictures_to_pixels(pictures: Sequence[Image.Image]) -> Tensor:
    """RGB pictures of one size as (B, 3, H, W) float32 in [-1, 1]."""
    arrays = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])  # (B, H, W, 3)
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 127.5 - 1


def psnr(prediction: Tensor, target: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, the mean over pictures; 106 dB where two pictures are the same.

    Args:
        prediction: (N, C, H, W), clamped to [-1, 1].
        target: (N, C, H, W) in [-1, 1].

    Raises:
        ValueError: the shapes differ, or there are no pictures.
    """
    check_same_shape(prediction, target)
    error = (prediction.clamp(-1, 1) - target).square().flatten(1).mean(1)  # (N,)
    return float((10 * torch.log10(RANGE**2 / error.clamp(min=1e-10))).mean())


def ssim(prediction: Tensor, target: Tensor) -> float:
    """Structural similarity (Wang et al. 2004), mean over pictures, channels and window positions; 1 if they are equal.

    Each channel by itself, under an 11x11 Gaussian window (sigma 1.5) that stays inside the picture. Black counts as 0,
    as in the paper, whose luminance term assumes values that are not negative.

    Args:
        prediction: (N, C, H, W), clamped to [-1, 1]; H and W at least 11.
        target: (N, C, H, W) in [-1, 1].

    Raises:
        ValueError: the shapes differ, there are no pictures, or they are smaller than the window.
    """
    check_same_shape(prediction, target)
    if min(prediction.shape[-2:]) < WINDOW:
        height, width = prediction.shape[-2:]
        raise ValueError(f"SSIM needs pictures of at least {WINDOW}x{WINDOW}, not {width}x{height}")
    x, y = (prediction.double().clamp(-1, 1) + 1) / RANGE, (target.double() + 1) / RANGE
    c1, c2 = K1**2, K2**2  # of values from 0 to 1
    mean_x, mean_y = blur(x), blur(y)
    var_x = blur(x * x) - mean_x**2
    var_y = blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return float((luminance * structure).mean())  # Eq. 13


def blur(pictures: Tensor) -> Tensor:
    """(N, C, H, W) to (N, C, H-10, W-10): local means under the Gaussian window."""
    channels = pictures.shape[1]
    offsets = torch.arange(WINDOW, dtype=pictures.dtype, device=pictures.device) - WINDOW // 2
    weights = torch.exp(-(offsets**2) / (2 * SIGMA**2))
    weights = (weights / weights.sum()).expand(channels, 1, 1, WINDOW)
    rows = F.conv2d(pictures, weights, groups=channels)
    return F.conv2d(rows, weights.transpose(2, 3), groups=channels)


def check_same_shape(prediction: Tensor, target: Tensor) -> None:
    if prediction.shape != target.shape or prediction.ndim != 4 or not prediction.numel():
        raise ValueError(
            f"two batches (N, C, H, W) of one shape are compared, not {tuple(prediction.shape)} "
            f"with {tuple(target.shape)}"
        )
