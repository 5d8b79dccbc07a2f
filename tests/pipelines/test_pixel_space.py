"""Pipelines whose latents are pixels, and others with autoencoders that diffusers has no class for."""

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image
from tiny import UNET, VAE, tiny_pipeline

from latentdiff import ImageToImagePipeline, TextToImagePipeline, UNet2DConditionModel
from latentdiff.models import FSQModel, GumbelVQModel, IdentityAutoencoder

DRAW = {"num_inference_steps": 2, "output_type": "pt"}


def pipeline_with(vae: Any, **unet: Any) -> TextToImagePipeline:
    channels = vae.config.latent_channels
    parts = tiny_pipeline("clip").components
    network = UNet2DConditionModel(**{**UNET, "in_channels": channels, "out_channels": channels, **unet}).eval()
    pipeline = TextToImagePipeline(**{**parts, "vae": vae.eval(), "unet": network})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def pixels() -> TextToImagePipeline:
    return pipeline_with(IdentityAutoencoder(sample_size=16), sample_size=16)


def test_draws_what_the_unet_leaves(pixels: TextToImagePipeline, tmp_path: Path) -> None:
    images = pixels("a red thing", seed=0, **DRAW).images
    latents = pixels("a red thing", seed=0, **{**DRAW, "output_type": "latent"}).images
    assert images.shape == latents.shape == (1, 3, 16, 16)
    assert torch.equal(images, (latents / 2 + 0.5).clamp(0, 1))
    assert pixels("a", height=9 * 2, width=6, **DRAW).images.shape == (1, 3, 18, 6)


def test_goes_to_a_folder_and_back(
    pixels: TextToImagePipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pixels.save_pretrained(tmp_path / "m")
    index = json.loads((tmp_path / "m" / "model_index.json").read_text())
    assert index["vae"] == ["latentdiff.models.identity", "IdentityAutoencoder"]
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    again = TextToImagePipeline.from_pretrained(tmp_path / "m")
    assert "Expected types" not in caplog.text
    again.set_progress_bar_config(disable=True)
    wanted = pixels("a red thing", seed=0, **DRAW).images
    assert torch.equal(again("a red thing", seed=0, **DRAW).images, wanted)
    again.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "model_index.json").read_text())["vae"] == index["vae"]
    assert TextToImagePipeline.from_pretrained(tmp_path / "m", dtype=torch.float16).vae.dtype == torch.float16


def test_diffusers_pipeline_draws_the_same_where_latentdiff_is(pixels: TextToImagePipeline, tmp_path: Path) -> None:
    pixels.save_pretrained(tmp_path / "m")
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "m")
    theirs.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 3, 16, 16)
    torch.testing.assert_close(
        theirs("a cup", latents=noise, **DRAW).images, pixels("a cup", latents=noise, **DRAW).images, atol=1e-5, rtol=0
    )


def test_changes_a_picture(pixels: TextToImagePipeline) -> None:
    painter = ImageToImagePipeline.from_pipe(pixels)
    painter.set_progress_bar_config(disable=True)
    picture = Image.new("RGB", (16, 16), (200, 40, 40))
    changed = painter("a red thing", image=picture, strength=0.5, num_inference_steps=4, seed=0, output_type="pt")
    assert changed.images.shape == (1, 3, 16, 16)
    assert torch.equal(
        changed.images,
        painter("a red thing", image=picture, strength=0.5, num_inference_steps=4, seed=0, output_type="pt").images,
    )


@pytest.mark.parametrize(
    "vae", [GumbelVQModel(**VAE, num_vq_embeddings=16), FSQModel(**VAE, levels=(4, 4, 3, 3))], ids=["gumbel", "fsq"]
)
def test_codes_that_diffusers_does_not_know(vae: Any, tmp_path: Path) -> None:
    pipeline = pipeline_with(vae)
    pipeline.save_pretrained(tmp_path / "m")
    index = json.loads((tmp_path / "m" / "model_index.json").read_text())
    assert index["vae"] == ["latentdiff.models.codes", type(vae).__name__]
    wanted = pipeline("a red thing", seed=0, **DRAW).images
    assert wanted.shape == (1, 3, 16, 16)
    for module in ("latentdiff.models.codes", "latentdiff.models.autoencoder"):  # the latter in older folders
        saved = json.dumps({**index, "vae": [module, type(vae).__name__]})
        (tmp_path / "m" / "model_index.json").write_text(saved)
        again = TextToImagePipeline.from_pretrained(tmp_path / "m")
        again.set_progress_bar_config(disable=True)
        assert torch.equal(again("a red thing", seed=0, **DRAW).images, wanted)


def test_no_other_module_of_ours_is_taken(pixels: TextToImagePipeline, tmp_path: Path) -> None:
    pixels.save_pretrained(tmp_path / "m")
    index = json.loads((tmp_path / "m" / "model_index.json").read_text())
    for library, kind, told in (
        ("latentdiff.cli", "IdentityAutoencoder", "vae is of 'latentdiff.cli'"),
        ("latentdiff.models.identity", "PixelDistribution", "its vae is a PixelDistribution; this pipeline takes"),
    ):
        (tmp_path / "m" / "model_index.json").write_text(json.dumps({**index, "vae": [library, kind]}))
        with pytest.raises(ValueError, match=told):
            TextToImagePipeline.from_pretrained(tmp_path / "m")
