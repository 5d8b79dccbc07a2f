"""LPIPS: other people's numbers for the same weights, the files it takes, and what it refuses."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from latentdiff.metrics.lpips import BACKBONES, LPIPS, level_distance, load_lpips


def numbers(*shape: int) -> Tensor:
    """Numbers that look random and are the same everywhere, float32."""
    count = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return torch.sin(count.square() * 0.7 + 0.3).float().view(shape)


def parts(network: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The classifier under torchvision's names and the linear layers under the released ones, by formula."""
    classifier, linear = {"classifier.6.bias": torch.zeros(3)}, {}
    for name, tensor in LPIPS(network).state_dict().items():
        if name.startswith("lin."):
            linear[f"lin{name[4:]}.model.1.weight"] = numbers(*tensor.shape).abs()
        elif tensor.ndim == 4:
            classifier[name] = numbers(*tensor.shape) * (4 / tensor[0].numel()) ** 0.5
        else:
            classifier[name] = numbers(*tensor.shape) * 0.1
    return classifier, linear


def pair(side: int) -> tuple[Tensor, Tensor]:
    """(2, 3, side, side) each: two pictures and the same with stripes."""
    pictures = numbers(2, 3, side, side)
    return pictures, pictures * 0.7 + 0.3 * numbers(side)


@pytest.fixture(scope="module", params=sorted(BACKBONES))
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path, Path]]:
    folder = tmp_path_factory.mktemp(request.param)
    classifier, linear = parts(request.param)
    torch.save(classifier, folder / "classifier.pth")
    torch.save(linear, folder / "linear.pth")
    yield request.param, folder / "classifier.pth", folder / "linear.pth"
    (folder / "classifier.pth").unlink()


EXPECTED = {"vgg": [0.17829348, 0.18518023], "alex": [0.14762992, 0.19333519]}


def test_of_the_released_code(files: tuple[str, Path, Path]) -> None:
    """lpips 0.1.4 with these weights and these pictures."""
    network, classifier, linear = files
    model = load_lpips([linear, classifier])
    assert model.network == network
    assert not any(parameter.requires_grad for parameter in model.parameters())
    first, second = pair(37)
    found = model(first, second)
    torch.testing.assert_close(found, torch.tensor(EXPECTED[network]), rtol=1e-5, atol=1e-6)
    assert (model(first, first) == 0).all()


def test_files_of_every_kind(files: tuple[str, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All in one safetensors file; the loss of a Latent Diffusion checkpoint; the cache and a package."""
    network, classifier, linear = files
    first, second = pair(32)
    expected = load_lpips([classifier, linear])(first, second)
    weights, lin = parts(network)

    def agree(model: LPIPS) -> None:
        torch.testing.assert_close(model(first, second), expected, rtol=0, atol=0)

    save_file({**weights, **lin}, tmp_path / "both.safetensors")
    agree(load_lpips([tmp_path / "both.safetensors"]))
    state = {f"loss.perceptual_loss.net.slice1.{k.removeprefix('features.')}": v for k, v in weights.items()}
    state |= {f"loss.perceptual_loss.{name}": v for name, v in lin.items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "model.ckpt")
    agree(load_lpips([tmp_path / "model.ckpt"]))

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.syspath_prepend(tmp_path / "packages")
    for package in ("lpips", "torchmetrics"):
        monkeypatch.delitem(sys.modules, package, raising=False)
    with pytest.raises(FileNotFoundError, match=rf"{BACKBONES[network].file}, which is not in"):
        load_lpips(network=network)
    cached = tmp_path / "hub" / "checkpoints" / BACKBONES[network].file
    packaged = tmp_path / "packages" / "lpips" / "weights" / "v0.1" / f"{network}.pth"
    for file, tensors in ((cached, weights), (packaged, lin)):
        file.parent.mkdir(parents=True)
        torch.save(tensors, file)
    (tmp_path / "packages" / "lpips" / "__init__.py").write_text("raise ImportError('never run')")
    agree(load_lpips(network=network))
    agree(load_lpips([linear]))
    agree(load_lpips([classifier]))


def test_a_place_without_features_has_a_gradient() -> None:
    """The released code's square root gives NaN there."""
    features = torch.zeros(1, 4, 2, 2, requires_grad=True)
    distance = level_distance(features.relu(), torch.ones(1, 4, 2, 2))
    torch.testing.assert_close(distance, torch.ones(1))
    distance.sum().backward()
    assert features.grad is not None
    assert features.grad.isfinite().all()


def test_level_distance_by_hand() -> None:
    """Unit vectors (1, 0) and (0.6, 0.8) at one place of two: squares 0.16 and 0.64."""
    have = torch.tensor([[2.0, 1.0], [0.0, 0.0]]).view(1, 2, 1, 2)
    want = torch.tensor([[3.0, 5.0], [4.0, 0.0]]).view(1, 2, 1, 2)
    torch.testing.assert_close(level_distance(have, want), torch.tensor([0.4]))
    weight = torch.tensor([1.0, 10.0]).view(1, 2, 1, 1)
    torch.testing.assert_close(level_distance(have, want, weight), torch.tensor([(0.16 + 6.4) / 2]))


def test_pictures_too_small(files: tuple[str, Path, Path]) -> None:
    network, classifier, linear = files
    model, least = load_lpips([classifier, linear]), BACKBONES[files[0]].least
    assert model(*pair(least)).shape == (2,)
    with pytest.raises(ValueError, match=rf"LPIPS \({network}\) needs pictures of at least {least}x{least}, not"):
        model(*pair(least - 1))


class Runs:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('ran')",)


def test_what_is_refused(tmp_path: Path) -> None:
    wrong = {"lin0.model.1.weight": torch.zeros(1, 64, 1, 1), "features.0.weight": torch.zeros(64, 3, 5, 5)}
    torch.save(wrong, tmp_path / "wrong.pth")
    with pytest.raises(ValueError, match=r"wrong\.pth: these are not weights of one network"):
        load_lpips([tmp_path / "wrong.pth"])
    classifier, linear = parts("alex")
    del classifier["features.6.bias"]
    save_file(classifier | linear, tmp_path / "part.safetensors")
    with pytest.raises(
        ValueError, match=r"part\.safetensors does not hold .* LPIPS \(alex\).*such as features\.6\.bias"
    ):
        load_lpips([tmp_path / "part.safetensors"])
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth has weights neither of VGG16 or AlexNet nor of LPIPS"):
        load_lpips([tmp_path / "other.pth"])
    torch.save({"lin0.model.1.weight": Runs()}, tmp_path / "runs.pth")
    with pytest.raises(ValueError, match=r"runs\.pth holds more than tensors"):
        load_lpips([tmp_path / "runs.pth"])
    with pytest.raises(FileNotFoundError, match=r"none\.pth: no such file"):
        load_lpips([tmp_path / "none.pth"])
