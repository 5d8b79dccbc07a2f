"""Whether a frozen autoencoder can hold the pictures that a denoiser is to learn: what it loses, none can draw."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image

from latentdiff.codec import Codec, execution_device
from latentdiff.metrics import psnr
from latentdiff.training.data import CaptionedPicture, read_pixels
from latentdiff.training.data.caption_checks import shorten
from latentdiff.training.evaluation.reconstruction import COLUMNS, sheet
from latentdiff.training.trainers.latent_scale import spread

SHRUNK = 8  # what pictures are shrunk by to compare with: latents of Stable Diffusion's size without their channels
BETTER = 1.0  # dB, that an autoencoder must be better than that; Stable Diffusion's is by 2 at least on photographs
HELD = 30.0  # dB, that are enough in any case, as for smooth pictures; the packaged model gives its drawings so


@dataclass(frozen=True)
class Suitability:
    """How a few pictures came back.

    Args:
        psnr: of each, in dB.
        shrunk: the mean of what shrinking them to an eighth and enlarging them again gives, in dB.
        names: theirs.
        size: side of the squares that they were brought to, in pixels.
        sheet: originals, below them the reconstructions, and four times the differences.
    """

    psnr: list[float]
    shrunk: float
    names: list[str]
    size: int
    sheet: Image.Image

    @property
    def mean(self) -> float:
        return sum(self.psnr) / len(self.psnr)

    @property
    def suits(self) -> bool:
        return self.mean >= min(HELD, self.shrunk + BETTER)

    def figures(self, model: str) -> str:
        """One sentence."""
        worst = min(range(len(self.psnr)), key=self.psnr.__getitem__)
        return (
            f"The autoencoder of {model} gives {len(self.psnr)} of these pictures back, at {self.size}x{self.size}, "
            f"with {self.mean:.1f} dB PSNR; the worst, {shorten(self.names[worst], 200)}, with {self.psnr[worst]:.1f}."
        )

    def advice(self, model: str) -> str:
        """What to take instead; empty if this suits."""
        if self.suits:
            return ""
        return (
            f"{model} cannot hold these pictures: shrinking them to an eighth keeps about as much ({self.shrunk:.1f} "
            f"dB). What its autoencoder loses, no training brings back. Take another model: for photographs a Stable "
            f"Diffusion 1 or 2 folder or hub id (--model), or an autoencoder of your own ('latentdiff train "
            f"autoencoder', then 'latentdiff train denoiser')."
        )


@torch.no_grad()
def examine_autoencoder(codec: Codec, pictures: Sequence[CaptionedPicture], resolution: int) -> Suitability:
    """Encode and decode at most eight of `pictures`, evenly spread, as squares of `resolution` without noise.

    The autoencoder stays on its device; a side that it cannot divide becomes the next smaller one.

    Raises:
        ValueError: a picture cannot be read, or there is none.
    """
    if not pictures:
        raise ValueError("there are no pictures to examine the autoencoder with")
    size = max(codec.factor, resolution // codec.factor * codec.factor)
    some = spread(pictures, COLUMNS)
    originals = torch.stack([read_pixels(picture, size, size) for picture in some])
    device = execution_device(codec.autoencoder)
    means = (codec.posterior(one.to(device)).mean for one in originals.split(1))
    back = torch.cat([codec.decode(codec.scaled(mean)).float().cpu().clamp(-1, 1) for mean in means])
    figures = [psnr(have, want) for have, want in zip(back.split(1), originals.split(1), strict=True)]
    small = F.interpolate(originals, size=(max(1, size // SHRUNK),) * 2, mode="bicubic", antialias=True)
    shrunk = psnr(F.interpolate(small, size=(size, size), mode="bicubic"), originals)
    return Suitability(figures, shrunk, [picture.name for picture in some], size, sheet(originals, back))
