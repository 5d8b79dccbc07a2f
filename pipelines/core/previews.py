"""Cheap pictures of latents, to watch a drawing: a small regression of colours on the latents' channels."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from latentdiff.codec import Codec
from latentdiff.interchange.picture_files import to_pictures
from latentdiff.interchange.png import image_grid
from latentdiff.pipelines.core.output import ImagesOutput
from latentdiff.pipelines.core.sampling import Progress

Preview = Callable[[Tensor], list[Image.Image]]
"""Clean scaled latents (B, C, h, w) -> B pictures."""


def preview_of(vae: Any, stand_in: Any = None) -> Preview:
    """What makes previews of the latents of `vae`.

    Args:
        stand_in: a small autoencoder of the same latents, which decodes each preview whole; None: `LatentPreview`.

    Raises:
        ValueError: its latents are not those of `vae`.
    """
    if stand_in is None:
        return LatentPreview(vae)
    codec, wanted = Codec(stand_in), Codec(vae)
    if (codec.channels, codec.factor) != (wanted.channels, wanted.factor):
        raise ValueError(
            f"the preview_autoencoder has latents of {codec.channels} channels, {codec.factor} pixels to each, and the "
            f"pipeline's of {wanted.channels}, {wanted.factor} pixels to each; it is for another model"
        )

    @torch.no_grad()
    def decode(latents: Tensor) -> list[Image.Image]:
        return to_pictures(codec.decode(latents).float())

    return decode


class LatentPreview:
    """Colours of latents, by a map fitted to the decoder while it is used.

    An autoencoder's latents are, to a first approximation, small pictures in other colours. So latents are decoded now
    and then, at the first preview and the second, the fourth, the eighth and so on, shrunk to the latents' grid, and
    the colours regressed on what `features` makes of the latents (least squares over all of them, the later ones
    counting more). In between a preview is one small matrix product.
    """

    def __init__(self, vae: Any) -> None:
        self.vae = vae
        self.used = 0
        self.moments: Tensor | None = None  # (F, F + 3), of features with themselves and with colours

    @torch.no_grad()
    def fit(self, latents: Tensor) -> None:
        """Learn from latents (B, C, h, w), scaled and without noise."""
        pixels = Codec(self.vae).decode(latents).float()  # (B, 3, H, W)
        small = F.adaptive_avg_pool2d(pixels, (latents.shape[-2], latents.shape[-1]))
        wanted = small.permute(0, 2, 3, 1).reshape(-1, small.shape[1]).cpu().double()  # (Bhw, 3)
        given = features(latents)  # (Bhw, F)
        moments = given.T @ torch.cat([given, wanted], dim=1) / len(given)
        self.moments = moments if self.moments is None else 0.3 * self.moments + moments

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> list[Image.Image]:
        """(B, C, h, w) -> B pictures of h x w pixels."""
        self.used += 1
        if self.used & (self.used - 1) == 0:
            self.fit(latents)
        assert self.moments is not None
        size = len(self.moments)
        own, wanted = self.moments[:, :size], self.moments[:, size:]
        colours = torch.linalg.solve(own + 1e-4 * torch.eye(size, dtype=own.dtype), wanted)  # (F, 3)
        seen = (features(latents) @ colours).view(len(latents), *latents.shape[-2:], -1)
        return to_pictures(seen.permute(0, 3, 1, 2))


def features(latents: Tensor) -> Tensor:
    """(B, C, h, w) -> (Bhw, F), in float64: the channels and, if they are few, their products; the same of the 3 x 3
    surroundings' mean; and a constant.
    """
    x = latents.cpu().double()
    if x.shape[1] <= 8:
        pairs = torch.triu_indices(x.shape[1], x.shape[1])
        x = torch.cat([x, x[:, pairs[0]] * x[:, pairs[1]]], dim=1)
    x = torch.cat([x, F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False), torch.ones_like(x[:, :1])], 1)
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def filmstrip(
    progress: Iterable[Progress], frames: int = 8, side: int | None = None
) -> tuple[Image.Image, ImagesOutput]:
    """One denoising as a picture: a row for each image, what it looked like at `frames` steps, and the result last.

    Args:
        progress: from ``pipeline.stream(...)``, which is run to its end.
        frames: how many steps to show, evenly spread, the last among them.
        side: height of a row in pixels; by default that of the images.

    Returns:
        The picture, and what the call gives.

    Raises:
        ValueError: fewer than one frame, or ``output_type`` was not "pil".
    """
    if frames < 1:
        raise ValueError(f"a filmstrip needs at least one frame, not {frames}")
    columns: list[list[Image.Image]] = []
    for one in progress:
        if one.output is not None:
            break
        shown = min(frames, one.total)
        wanted = {round((i + 1) * one.total / shown) - 1 for i in range(shown)}
        if one.step in wanted:
            columns.append(one.preview())
    output = one.output
    images = None if output is None else output.images
    if output is None or not isinstance(images, list):
        raise ValueError("a filmstrip is made of PIL images; leave output_type='pil'")
    height = side or images[0].height
    size = (round(images[0].width * height / images[0].height), height)
    columns.append(images)
    cells = [column[row].resize(size, Image.Resampling.BICUBIC) for row in range(len(images)) for column in columns]
    return image_grid(cells, len(columns)), output
