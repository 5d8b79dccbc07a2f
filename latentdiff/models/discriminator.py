"""Discriminators of patches and of features, and the losses of adversarial training."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call


class PatchDiscriminator(nn.Module):
    """Logits for patches of a picture, real or not.

    Image-to-Image Translation (Isola et al. 2017), Sec. 3.2.2 and App. 6.1; as in VQGAN (Esser et al. 2021), with that
    code's parameter names. With three layers a patch is 70 pixels wide.

    Args:
        in_channels: channels of the pictures.
        channels: channels of the first layer; the next have 2, 4 and at most 8 times as many.
        layers: number of layers that halve the resolution.
        norm: "batch" as in VQGAN, or "group", which computes each picture independently of the others in the batch.
    """

    def __init__(
        self, in_channels: int = 3, channels: int = 64, layers: int = 3, norm: Literal["batch", "group"] = "batch"
    ) -> None:
        super().__init__()
        widths = [channels * min(2**i, 8) for i in range(layers + 1)]
        main: list[nn.Module] = [nn.Conv2d(in_channels, widths[0], 4, 2, 1), nn.LeakyReLU(0.2, inplace=True)]
        for i in range(1, layers + 1):
            stride = 1 if i == layers else 2
            after = nn.BatchNorm2d(widths[i]) if norm == "batch" else nn.GroupNorm(min(8, widths[i]), widths[i])
            main.append(nn.Conv2d(widths[i - 1], widths[i], 4, stride, 1, bias=False))
            main += [after, nn.LeakyReLU(0.2, inplace=True)]
        main.append(nn.Conv2d(widths[-1], 1, 4, 1, 1))
        self.main = nn.Sequential(*main)
        self.apply(self._initialize)

    @staticmethod
    def _initialize(module: nn.Module) -> None:
        """Isola et al. 2017, App. 6.2."""
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, 0.0, 0.02)
        elif isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
            nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, C, H, W), values in [-1, 1] -> logits of the patches, (B, 1, h, w): above 0 is real."""
        return self.main(pixels)

    def judge(self, pixels: Tensor) -> Tensor:
        """As ``forward``, with gradients for the pixels only and none for the discriminator's weights."""
        return functional_call(self, detached(self), (pixels,))


class FeatureDiscriminator(nn.Module):
    """Logits for features that another network has of a picture, real or not: a small head for each of its layers.

    As the heads of Projected GANs (Sauer et al. 2021, Sec. 3.2) and of ADD (Sauer et al. 2023), in two layers.

    Args:
        widths: channels of the features of each layer.
        channels: of each head.
    """

    def __init__(self, widths: Sequence[int], channels: int = 64) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, channels, 1),
                nn.GroupNorm(math.gcd(8, channels), channels),
                nn.LeakyReLU(0.2),
                nn.Conv2d(channels, 1, 3, padding=1),
            )
            for width in widths
        )

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """(B, C, h, w) of each layer -> the logits of all places, (B, N): above 0 is real."""
        return torch.cat([head(one).flatten(1) for head, one in zip(self.heads, features, strict=True)], dim=1)

    def judge(self, features: Sequence[Tensor]) -> Tensor:
        """As ``forward``, with gradients for the features only and none for the discriminator's weights."""
        return functional_call(self, detached(self), (features,))


def detached(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def adversarial_loss(fake: Tensor) -> Tensor:
    """The autoencoder's adversarial loss: minus the mean logit of its patches, in VQGAN's code for both kinds below."""
    return -fake.mean()


def discriminator_loss(real: Tensor, fake: Tensor, kind: Literal["hinge", "vanilla"]) -> Tensor:
    """The discriminator's loss, of its logits for real patches and for the autoencoder's.

    "hinge": Geometric GAN (Lim & Ye 2017), Eq. 14; "vanilla": Goodfellow et al. 2014, Eq. 1. Both halved, as in VQGAN.
    """
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def gradient_penalty(logits: Tensor, pixels: Tensor) -> Tensor:
    """R1 (Mescheder et al. 2018, Eq. 9): the squared gradient norm of the logits at real pictures, mean over the batch.

    Args:
        logits: (B, 1, h, w); a picture's logit is their mean.
        pixels: (B, C, H, W), from which the logits were computed; they require a gradient.
    """
    (slope,) = torch.autograd.grad(logits.mean(dim=(1, 2, 3)).sum(), pixels, create_graph=True)
    return slope.square().sum(dim=(1, 2, 3)).mean()
