"""What a training leaves behind, and its comparison with another's."""

from pathlib import Path

import torch
from safetensors.torch import load_file

Weights = dict[str, torch.Tensor]


def weights(folder: Path, part: str = "") -> Weights:
    return load_file(folder / part / "diffusion_pytorch_model.safetensors")


def unet(folder: Path) -> Weights:
    return weights(folder, "unet")


def transformer(folder: Path) -> Weights:
    return weights(folder, "transformer")


def newest(output: Path) -> Path:
    """The last checkpoint."""
    return sorted((output / "training" / "checkpoints").glob("step-*"))[-1]


def checkpoint_weights(output: Path) -> Weights:
    return load_file(newest(output) / "trained.safetensors")


def same(a: Weights, b: Weights) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def assert_close(found: Weights, wanted: Weights, atol: float = 2e-4, rtol: float = 1e-3) -> None:
    """Equal but for the order in which floating-point numbers are added."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, atol=atol, rtol=rtol)
