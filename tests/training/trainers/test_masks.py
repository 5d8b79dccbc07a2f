"""Trainings whose loss looks at masks: in latents and in pixels, cached or not, resumed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from discs import add_masks
from PIL import Image
from safetensors.torch import load_file
from tiny import DENOISER, tiny_pipeline
from trained import same

from latentdiff.training.settings import DenoiserSettings, FinetuneSettings
from latentdiff.training.trainers.denoiser import train_denoiser
from latentdiff.training.trainers.finetune import finetune


@pytest.fixture
def masked(pictures: Path) -> Path:
    add_masks(pictures)
    return pictures


def pixels(data: Path, output: Path, **changes: object) -> dict[str, torch.Tensor]:
    values = {**DENOISER, "data": str(data), "autoencoder": "pixels", "condition": "none", "output": str(output)}
    values |= {"buckets": True, "max_steps": 4, "random_flip": True, "log_every": 1}
    train_denoiser(DenoiserSettings.load(None, {**values, **changes}))
    return load_file(output / "unet" / "diffusion_pytorch_model.safetensors")


def val_loss(output: Path) -> float:
    rows = map(json.loads, (output / "training" / "metrics.jsonl").read_text().splitlines())
    return next(float(row["val_loss"]) for row in rows if "val_loss" in row)


def test_of_pixels_in_buckets_cached_or_not_and_resumed(masked: Path, tmp_path: Path) -> None:
    calm = pixels(masked, tmp_path / "calm")
    assert same(calm, pixels(masked, tmp_path / "uncached", cache_latents=False))
    pixels(masked, tmp_path / "stopped", max_steps=3)
    assert same(calm, pixels(masked, tmp_path / "stopped"))
    assert not same(calm, pixels(masked, tmp_path / "whole", masked_loss=False))
    assert val_loss(tmp_path / "calm") != val_loss(tmp_path / "whole")


def test_of_latents_a_white_mask_is_no_mask(masked: Path, tmp_path: Path) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "model")

    def tune(name: str, **changes: Any) -> dict[str, torch.Tensor]:
        values = {"data": str(masked), "model": str(tmp_path / "model"), "output": str(tmp_path / name)}
        values |= {"batch_size": 2, "max_steps": 2, "sample_every": 2, "lora_rank": 2, **changes}
        return load_file(finetune(FinetuneSettings.load(None, values)) / "pytorch_lora_weights.safetensors")

    found = tune("masked")
    whole = tune("whole", masked_loss=False)
    assert any((found[name] - whole[name]).abs().max() > 1e-5 for name in whole)
    for file in masked.glob("*.mask.png"):
        Image.new("L", Image.open(file).size, 255).save(file)
    white = tune("white")
    for name in whole:
        torch.testing.assert_close(white[name], whole[name], atol=2e-5, rtol=1e-3)
    assert val_loss(tmp_path / "white") == pytest.approx(val_loss(tmp_path / "whole"), rel=1e-5)
