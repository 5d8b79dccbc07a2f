"""LPIPS, a perceptual distance: The Unreasonable Effectiveness of Deep Features (Zhang et al. 2018).

It needs two sets of weights, neither of them part of this package: an ImageNet classifier's, from torchvision, and the
weights of its channels, the authors' "lin" layers of version 0.1 (BSD-2-Clause), which the packages ``lpips`` and
``torchmetrics`` contain. A checkpoint of an autoencoder of Latent Diffusion holds both.
"""

import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentdiff.metrics.extractors import cache_folder, fitting, read_weights

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of pixels in [-1, 1]; ImageNet's, as released
RELEASED = "https://github.com/richzhang/PerceptualSimilarity/tree/master/lpips/weights/v0.1"
NAMES = re.compile(
    r"(?:^|\.)(?:(?:features|net\.slice\d)\.(?P<layer>\d+)\.(?P<kind>weight|bias)|lins?\.?(?P<lin>\d)\.model\.\d\.weight)$"
)
"""torchvision's names and those of the released code, behind any prefix."""


@dataclass(frozen=True)
class Backbone:
    """A classifier of torchvision.

    taps: layers of its ``features``, all ReLUs, whose outputs are compared; widths: their channels.
    least: the smallest side of a picture for which the last of them has an output.
    file: the name of its weights in torch hub's cache.
    """

    model: str
    taps: tuple[int, ...]
    widths: tuple[int, ...]
    least: int
    file: str


BACKBONES = {
    "vgg": Backbone("vgg16", (3, 8, 15, 22, 29), (64, 128, 256, 512, 512), 16, "vgg16-397923af.pth"),
    "alex": Backbone("alexnet", (1, 4, 7, 9, 11), (64, 192, 384, 256, 256), 31, "alexnet-owt-7be5be79.pth"),
}


def level_distance(have: Tensor, want: Tensor, weight: Tensor | None = None) -> Tensor:
    """Zhang et al. 2018, Eq. 1, for one level: squared difference of unit vectors, mean over positions. (B,) float32

    Args:
        have, want: (B, C, h, w).
        weight: (1, C, 1, 1), of the squares; by default 1.
    """
    # A position where all channels are 0 has no direction; it stays 0, and so does its gradient.
    squares = (F.normalize(have.float(), dim=1, eps=1e-10) - F.normalize(want.float(), dim=1, eps=1e-10)).square()
    return (squares if weight is None else squares * weight).sum(1).mean((1, 2))


class LPIPS(nn.Module):
    """The distance of two pictures. On the meta device until weights are loaded with ``assign=True``; see `load_lpips`.

    Args:
        network: "vgg", which is smooth enough to be a loss, or "alex", which agrees better with human judgements.
    """

    def __init__(self, network: str = "vgg") -> None:
        import torchvision

        super().__init__()
        self.network, self.backbone = network, BACKBONES[network]
        with torch.device("meta"):  # the classifier's part is large, and not needed
            layers = getattr(torchvision.models, self.backbone.model)(weights=None).features
            self.features: nn.Sequential = layers[: self.backbone.taps[-1] + 1]
            self.lin = nn.ParameterList(torch.empty(1, width, 1, 1) for width in self.backbone.widths)
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1), persistent=False)
        self.shift: Tensor
        self.scale: Tensor

    def levels(self, pixels: Tensor) -> list[Tensor]:
        """(B, 3, H, W) in [-1, 1] to five levels of features, (B, C_i, h_i, w_i).

        Raises:
            ValueError: the pictures are too small for the network.
        """
        height, width = pixels.shape[-2:]
        if min(height, width) < self.backbone.least:
            least = self.backbone.least
            raise ValueError(f"LPIPS ({self.network}) needs pictures of at least {least}x{least}, not {width}x{height}")
        x, found = (pixels - self.shift) / self.scale, []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.backbone.taps:
                found.append(x)
        return found

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """(B, 3, H, W) each, in [-1, 1]. Returns (B,), 0 where they are the same."""
        levels = zip(self.levels(prediction), self.levels(target), self.lin, strict=True)
        return torch.stack([level_distance(*level) for level in levels]).sum(0)


def load_lpips(files: Sequence[Path] = (), network: str = "vgg") -> LPIPS:
    """LPIPS with weights, frozen and in evaluation mode.

    Args:
        files: with the classifier's weights, those of the linear layers, or both. Missing ones are searched: the
            classifier's in torch hub's cache, the linear layers' in an installed package.
        network: "vgg" or "alex", if there are no files; else it is inferred from them.

    Raises:
        FileNotFoundError: something is missing, and where to get it.
        ValueError: a file cannot be read, or holds no such weights.
    """
    found: dict[str, Tensor] = {}
    for file in files:
        found |= read_part(file)
    if found:
        network = network_of(found, files)
    for part, file_of in (("features.", find_classifier), ("lin.", find_linear)):
        if not any(name.startswith(part) for name in found):
            found |= read_part(file_of(network))
    model = LPIPS(network)
    names = ", ".join(map(str, files)) or "what was found"
    weights = fitting(found, model, f"{names} does not hold the weights of LPIPS ({network})")
    model.load_state_dict({name: w.to(torch.float32, copy=True) for name, w in weights.items()}, assign=True)
    return model.eval().requires_grad_(False)


def read_part(file: Path) -> dict[str, Tensor]:
    """The weights of LPIPS in a file, by their names in `LPIPS`. No code in the file is executed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, or has no such weights.
    """
    from latentdiff.interchange.single_file.checkpoint import PICKLED, read_pickle

    if file.suffix in PICKLED and file.is_file():  # a whole checkpoint can hold objects of a trainer too
        weights: Mapping[str, Tensor] = read_pickle(file, allow=True)[0]
    else:
        weights = read_weights(file)
    found = {}
    for name, tensor in weights.items():
        match = NAMES.search(name)
        if match:
            lin = match["lin"]
            found[f"features.{match['layer']}.{match['kind']}" if lin is None else f"lin.{lin}"] = tensor
    if not found:
        raise ValueError(f"{file} has weights neither of VGG16 or AlexNet nor of LPIPS' linear layers ({RELEASED})")
    return found


def network_of(found: Mapping[str, Tensor], files: Sequence[Path]) -> str:
    """The network that these weights belong to, by their shapes."""
    for network in BACKBONES:
        wanted = LPIPS(network).state_dict()
        if all(name in wanted and tensor.shape == wanted[name].shape for name, tensor in found.items()):
            return network
    names = ", ".join(map(str, files))
    raise ValueError(f"{names}: these are not weights of one network, {' or '.join(BACKBONES)}, of LPIPS")


def find_classifier(network: str) -> Path:
    """The file in torch hub's cache. Raises FileNotFoundError, with where to get it, if there is none."""
    file = cache_folder() / BACKBONES[network].file
    if not file.is_file():
        raise FileNotFoundError(
            f"LPIPS ({network}) needs {file.name}, which is not in {file.parent}; put it there from "
            f"https://download.pytorch.org/models/{file.name}, or name it with lpips:FILE,FILE"
        )
    return file


def find_linear(network: str) -> Path:
    """The file in an installed package. Raises FileNotFoundError, with where to get it, if there is none."""
    for package, folder in (("lpips", "weights/v0.1"), ("torchmetrics", "functional/image/lpips_models")):
        spec = importlib.util.find_spec(package)
        for place in (spec.submodule_search_locations or ()) if spec else ():
            file = Path(place) / folder / f"{network}.pth"
            if file.is_file():
                return file
    raise FileNotFoundError(
        f"LPIPS ({network}) needs the weights of its linear layers: pip install lpips, or get {network}.pth from "
        f"{RELEASED} and name it with lpips:FILE,FILE"
    )
