"""Weights and numbers in configs that are NaN, infinite, or 0 where something is divided by them."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import CODER, UNET

from latentdiff import models

SMALL: dict[str, dict[str, Any]] = {
    "UNet2DConditionModel": UNET,
    "AutoencoderKL": CODER,
    "VQModel": CODER,
    "IdentityAutoencoder": {},
}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", SMALL)
def test_weights_that_are_not_finite_are_not_loaded(name: str, value: float, tmp_path: Path) -> None:
    network = getattr(models, name)(**SMALL[name])
    network.save_pretrained(tmp_path / "part")
    file = tmp_path / "part" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    spoilt = max(weights)
    weights[spoilt].flatten()[-1] = value
    save_file(weights, file, {"format": "pt"})
    for given in ({}, {"torch_dtype": torch.float16}, {"output_loading_info": True}):
        with pytest.raises(ValueError, match=rf"part: 1 weights of the {name} .* not finite .*such as {spoilt};"):
            getattr(models, name).from_pretrained(tmp_path, subfolder="part", **given)


def test_large_weights_are_finite(tmp_path: Path) -> None:
    """Their sum in half precision is not."""
    network = models.AutoencoderKL(**CODER).half()
    torch.nn.init.constant_(network.encoder.conv_in.weight, 6e4)
    network.save_pretrained(tmp_path)
    again, info = models.AutoencoderKL.from_pretrained(tmp_path, torch_dtype=torch.float16, output_loading_info=True)
    assert torch.equal(again.encoder.conv_in.weight, network.encoder.conv_in.weight)
    assert not info["missing_keys"]
    largest = models.AutoencoderKL(**CODER).float()
    torch.nn.init.constant_(largest.encoder.conv_in.weight, 3e38)
    largest.save_pretrained(tmp_path / "largest")
    models.AutoencoderKL.from_pretrained(tmp_path / "largest")


@pytest.mark.parametrize("name", [name for name in SMALL if name != "UNet2DConditionModel"])
@pytest.mark.parametrize(
    ("value", "message"), [(math.nan, "is not a number"), (0, "other than 0"), ("big", "a number")]
)
def test_a_scaling_factor_is_a_number_to_multiply_and_divide_by(
    name: str, value: Any, message: str, tmp_path: Path
) -> None:
    getattr(models, name)(**SMALL[name]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"scaling_factor": value}))
    with pytest.raises(ValueError, match=f"scaling_factor.*{message}"):
        getattr(models, name).from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{name}: scaling_factor={value!r} is not"):
        getattr(models, name)(**SMALL[name] | {"scaling_factor": value})


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("UNet2DConditionModel", "norm_eps", math.inf),
        ("AutoencoderKL", "shift_factor", math.nan),
        ("AutoencoderKL", "latents_std", [1.0, math.nan, 1.0, 1.0]),
    ],
)
def test_numbers_of_configs_are_finite(name: str, key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}: {key}=.* is not finite"):
        getattr(models, name)(**SMALL[name] | {key: value})
