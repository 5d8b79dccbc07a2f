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

# Poorly held is what is little better than shrunk and has other colours too. Mean PSNR alone does not tell: white
# backgrounds raise it, and Stable Diffusion's autoencoder has 23 to 24 dB on photographs, whose texture it changes. Of
# the packaged model, eight at a time: Twemoji, which it was made for, are 3.5 to 8 dB better than shrunk (20 of 20
# times above the limit); Tux Paint's stamps -1.2 to 3.6, their colours mostly at 27 to 31 (16 of 20 below both limits);
# photographs -2 to 0, their colours at 25. Sprites of Wesnoth keep colours (32 to 35) and lose detail: 2.2 to
# 2.8 dB better than shrunk, at 19.7 to 21.8 dB (10 of 10); composed scenes of its own drawings have 23.3 to 27.6.
GOOD = 3.4  # dB, that an autoencoder with other colours must be better than shrinking
COLOURS = 31.0  # dB PSNR of the means of squares of 8x8 pixels: 7 of 255 off
DETAIL = 22.0  # dB, that an autoencoder which is little better than shrinking must give where it keeps the colours


@dataclass(frozen=True)
class Suitability:
    """How a few pictures came back.

    Args:
        psnr: of each, in dB.
        shrunk: the mean of what shrinking them to an eighth and enlarging them again gives, in dB.
        colours: mean PSNR of the means of squares of 8x8 pixels, in dB, which shrinking keeps.
        names: theirs.
        size: side of the squares that they were brought to, in pixels.
        sheet: originals, below them the reconstructions, and four times the differences.
    """

    psnr: list[float]
    shrunk: float
    colours: float
    names: list[str]
    size: int
    sheet: Image.Image

    @property
    def mean(self) -> float:
        return sum(self.psnr) / len(self.psnr)

    @property
    def loses_all(self) -> bool:
        """Whether shrinking them keeps as much."""
        return self.mean < min(HELD, self.shrunk + BETTER)

    @property
    def suits(self) -> bool:
        good = self.mean >= min(HELD, self.shrunk + GOOD) or (self.colours >= COLOURS and self.mean >= DETAIL)
        return good and not self.loses_all

    def figures(self, model: str) -> str:
        """One sentence."""
        worst = min(range(len(self.psnr)), key=self.psnr.__getitem__)
        return (
            f"The autoencoder of {model} gives {len(self.psnr)} of these pictures back, at {self.size}x{self.size}, "
            f"with {self.mean:.1f} dB PSNR; the worst, {shorten(self.names[worst], 200)}, with {self.psnr[worst]:.1f}."
        )

    def advice(self, model: str, own: bool = False) -> str:
        """What to take instead; empty if this suits.

        own: whether the model is an autoencoder that a denoiser is to be trained on, and not a whole model.
        """
        if self.suits:
            return ""
        if self.loses_all:
            how = (
                f"{model} cannot hold these pictures: shrinking them to an eighth keeps about as much "
                f"({self.shrunk:.1f} dB)."
            )
        else:
            what, of, off = ("colours and detail", "whole patches", self.colours)
            if self.colours >= COLOURS:
                what, of, off = ("detail", "pixels", self.mean)
            how = (
                f"{model} holds these pictures poorly: {what} will change, as the reconstructions show. Shrinking them "
                f"to an eighth keeps little less ({self.shrunk:.1f} dB), and colours of {of} are off by "
                f"{255 * 10 ** (-off / 20):.0f} of 255."
            )
        if own:
            return (
                f"{how} What it loses, no denoiser brings back. Train it for longer first (repeat 'latentdiff train "
                f"autoencoder' with a larger max_steps), or give another --autoencoder."
            )
        return (
            f"{how} What its autoencoder loses, no training brings back. Take another model: for photographs a Stable "
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
    colours = psnr(F.avg_pool2d(back, SHRUNK), F.avg_pool2d(originals, SHRUNK))
    return Suitability(figures, shrunk, colours, [picture.name for picture in some], size, sheet(originals, back))
