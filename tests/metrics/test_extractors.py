"""Extractors: what they compute, what they say of themselves, and what they refuse."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor, ViTModel

from latentdiff.metrics import frechet_distance
from latentdiff.metrics.extractors import load_extractor
from latentdiff.metrics.pixels import resize_pictures

TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 16,
    "patch_size": 8,
}


def pictures(count: int, colour: int = 255) -> list[Image.Image]:
    """Discs of noise."""
    random = np.random.default_rng(5)
    return [Image.fromarray(random.integers(0, colour, (20, 24, 3), dtype=np.uint8)) for _ in range(count)]


def test_resizing_does_not_alias() -> None:
    """A checkerboard of single pixels, ten times smaller: even grey, where plain bicubic would leave stripes."""
    board = Image.fromarray(np.indices((300, 300)).sum(0).astype(np.uint8) % 2 * 255).convert("RGB")
    small = resize_pictures([board], 30)
    assert small.shape == (1, 3, 30, 30)
    torch.testing.assert_close(small, torch.full((1, 3, 30, 30), 127.5), atol=2.0, rtol=0)
    values = resize_pictures([Image.new("RGB", (7, 9), (10, 20, 30))], 16)
    torch.testing.assert_close(values.mean((0, 2, 3)), torch.tensor([10.0, 20.0, 30.0]))


def test_the_packaged_encoder() -> None:
    extractor = load_extractor("autoencoder")
    features = extractor.features(pictures(5), batch_size=2)
    assert features.shape == (5, 48 + 96 + 128 + 128 + 128)
    torch.testing.assert_close(features[3:4], extractor(pictures(5)[3:4]), atol=1e-4, rtol=1e-4)
    assert not extractor.is_fid
    assert "encoder" in extractor.describe()["name"]
    assert "128x128" in extractor.describe()["resize"]
    real = extractor.features(pictures(40))
    near, far = extractor.features(pictures(40, colour=240)), extractor.features(pictures(40, colour=100))
    assert 0 < frechet_distance(near, real) < frechet_distance(far, real)


def test_auto_takes_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert load_extractor().name == load_extractor("autoencoder").name
    cached = tmp_path / "checkpoints" / "pt_inception-2015-12-05-6726825d.pth"
    cached.parent.mkdir()
    torch.save({}, cached)
    with pytest.raises(ValueError, match="does not hold the FID Inception weights"):
        load_extractor()


def test_transformers_model(tmp_path: Path) -> None:
    folder = tmp_path / "vit"
    model = ViTModel(ViTConfig(**TINY)).eval()
    model.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"vit has no preprocessor_config\.json"):
        load_extractor(str(folder))
    ViTImageProcessor(image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4]).save_pretrained(folder)
    extractor = load_extractor(str(folder))
    pixels = resize_pictures(pictures(2), 16) / 255
    inputs = (pixels - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    with torch.no_grad():
        expected = model(pixel_values=inputs).pooler_output
    torch.testing.assert_close(extractor(pictures(2)), expected)
    assert extractor.name == "transformers ViTModel vit"  # and nothing about where it lies
    with torch.no_grad():
        model.layernorm.bias += 1
    model.save_pretrained(folder)
    assert load_extractor(str(folder)).digest != extractor.digest


def test_weights_that_are_missing_are_not_made_up(tmp_path: Path) -> None:
    folder = tmp_path / "classifier"
    ViTForImageClassification(ViTConfig(**TINY, num_labels=3)).save_pretrained(folder)
    ViTImageProcessor().save_pretrained(folder)
    first, second = load_extractor(str(folder)), load_extractor(str(folder))  # it has no pooler
    torch.testing.assert_close(first(pictures(2)), second(pictures(2)), atol=0, rtol=0)
    weights = load_file(folder / "model.safetensors")
    weights.pop("vit.layernorm.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing, such as layernorm\.weight"):
        load_extractor(str(folder))


def test_timm_model(tmp_path: Path) -> None:
    network = timm.create_model("test_vit", pretrained=False, num_classes=0).eval()
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    extractor = load_extractor(f"timm:test_vit={tmp_path / 'weights.pth'}")
    assert extractor.name == "timm test_vit"
    assert extractor(pictures(2)).shape == (2, network.num_features)
    torch.save({"other": torch.zeros(1)}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"does not hold weights of test_vit.*such as"):
        load_extractor(f"timm:test_vit={tmp_path / 'weights.pth'}")
    with pytest.raises(ValueError, match="written timm:NAME=FILE"):
        load_extractor("timm:test_vit")
    with pytest.raises(ValueError, match="no model named 'no_such'"):
        load_extractor(f"timm:no_such={tmp_path / 'weights.pth'}")


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such folder; --extractor takes auto, autoencoder"):
        load_extractor(str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load_extractor(str(tmp_path))
    with pytest.raises(ValueError, match="no pictures"):
        load_extractor("autoencoder").features([])
