"""The Inception network of FID: the TensorFlow graph of 2015-12-05, as torchvision's blocks with its pooling.

Its weights are Google's (Apache-2.0), converted by pytorch-fid and torch-fidelity. They are not part of this package.
"""

import warnings
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import inception

from latentdiff.metrics.extractors import cache_folder, fitting, read_weights

FILE_NAME = "pt_inception-2015-12-05-6726825d.pth"
OTHER_NAMES = ("weights-inception-2015-12-05-6726825d.pth",)  # torch-fidelity's
SOURCE = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILE_NAME}"
SIZE, DIMENSIONS, CLASSES = 299, 2048, 1008


class CountInside:
    """Mixed into a block: the average pool of its last branch counts pixels inside the picture only."""

    def _forward(self: Any, x: Tensor) -> list[Tensor]:
        *branches, _ = super()._forward(x)  # type: ignore[misc]
        pooled = F.avg_pool2d(x, kernel_size=3, stride=1, padding=1, count_include_pad=False)
        return [*branches, self.branch_pool(pooled)]


class BlockA(CountInside, inception.InceptionA):
    """35x35."""


class BlockC(CountInside, inception.InceptionC):
    """17x17."""


class BlockE(CountInside, inception.InceptionE):
    """8x8."""


class LastBlock(inception.InceptionE):
    """8x8; the graph takes the maximum in its last branch, where the paper takes the average."""

    def _forward(self, x: Tensor) -> list[Tensor]:
        *branches, _ = super()._forward(x)
        return [*branches, self.branch_pool(F.max_pool2d(x, kernel_size=3, stride=1, padding=1))]


class FidInception(nn.Module):
    """(B, 3, 299, 299), (pixel - 128) / 128 with pixels from 0 to 255 -> (B, 2048), the input of the classifier."""

    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            network = inception.Inception3(num_classes=CLASSES, aux_logits=False, init_weights=False)
        network.Mixed_5b = BlockA(192, pool_features=32)
        network.Mixed_5c = BlockA(256, pool_features=64)
        network.Mixed_5d = BlockA(288, pool_features=64)
        network.Mixed_6b = BlockC(768, channels_7x7=128)
        network.Mixed_6c = BlockC(768, channels_7x7=160)
        network.Mixed_6d = BlockC(768, channels_7x7=160)
        network.Mixed_6e = BlockC(768, channels_7x7=192)
        network.Mixed_7b = BlockE(1280)
        network.Mixed_7c = LastBlock(2048)
        self.network = network

    def forward(self, pixels: Tensor) -> Tensor:
        for name, layer in self.network.named_children():
            if name == "avgpool":
                break
            pixels = layer(pixels)  # (B, 2048, 8, 8) at the end
        return pixels.mean((2, 3))  # (B, 2048)


def load_inception(file: Path | None = None) -> FidInception:
    """The network with weights from `file`, or from torch hub's cache, in evaluation mode.

    Raises:
        FileNotFoundError: there is no such file, or none in the cache; the message says where to get it.
        ValueError: the file does not hold these weights.
    """
    file = find_weights() if file is None else file
    if file is None:
        raise FileNotFoundError(
            f"the FID Inception weights are not in {cache_folder()}; put {SOURCE} there, or give a file with "
            f"--extractor inception:FILE"
        )
    model = FidInception()
    weights = fitting(read_weights(file), model.network, f"{file} does not hold the FID Inception weights ({SOURCE})")
    model.network.load_state_dict(weights, strict=False)
    return model.eval()


def find_weights() -> Path | None:
    """The file in torch hub's cache, or None."""
    files = (cache_folder() / name for name in (FILE_NAME, *OTHER_NAMES))
    return next((file for file in files if file.is_file()), None)
