"""The settings of autoencoders that users begin from."""

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from latentdiff.training.cli import train
from latentdiff.training.recipes.autoencoders import configurations
from latentdiff.training.settings import AutoencoderSettings
from latentdiff.training.starting_networks import build_autoencoder
from latentdiff.training.trainers.autoencoder import train_autoencoder

SHAPES = {  # of the latents of a picture of 256x256
    "kl-f16": (16, 16, 16),
    "kl-f4": (3, 64, 64),
    "kl-f8": (4, 32, 32),
    "small-kl-f8": (4, 32, 32),
    "small-vq-f4": (4, 64, 64),
    "vq-f4": (3, 64, 64),
    "vq-f8": (4, 32, 32),
}


def test_all_are_here() -> None:
    assert configurations().keys() == SHAPES.keys()


@pytest.mark.parametrize("name", SHAPES)
def test_latents_have_the_size_that_the_name_says(name: str) -> None:
    settings = AutoencoderSettings.load(configurations()[name], {"data": "pictures", "output": "model"})
    with torch.device("meta"):
        model = build_autoencoder(settings)
        moments = model.encode_moments(torch.empty(1, 3, 256, 256))
        assert model.bottleneck(moments).latents.shape[1:] == SHAPES[name]


@pytest.mark.parametrize("name", ["kl-f16", "vq-f8"])
def test_a_narrow_one_trains(name: str, pictures: Path, tmp_path: Path) -> None:
    levels = len(AutoencoderSettings.load(configurations()[name], {"data": "d", "output": "o"}).block_out_channels)
    values: dict[str, Any] = {"block_out_channels": [8] * levels, "norm_num_groups": 4, "resolution": 32}
    values |= {"num_vq_embeddings": 32, "max_steps": 2, "warmup_steps": 0, "perceptual_weight": 0, "batch_size": 2}
    values |= {"discriminator_start": 1, "discriminator_channels": 4, "discriminator_layers": 1}
    values |= {"data": str(pictures), "output": str(tmp_path / "out")}
    assert train_autoencoder(AutoencoderSettings.load(configurations()[name], values)).is_dir()


def test_an_unknown_name_is_answered_with_the_known_ones(tmp_path: Path) -> None:
    arguments = ["autoencoder", "--data", str(tmp_path), "--output", str(tmp_path / "out"), "--config", "kl-f7"]
    result = CliRunner().invoke(train, arguments)
    assert result.exit_code != 0
    assert "kl-f7" in f"{result.output}{result.exception}"
    assert "kl-f8" in f"{result.output}{result.exception}"
