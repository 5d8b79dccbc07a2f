"""A denoiser of pixels: trained on an autoencoder that does nothing."""

from pathlib import Path

import pytest
import torch
from tiny import DENOISER, VAE

from latentdiff import TextToImagePipeline
from latentdiff.models import FSQModel, IdentityAutoencoder, VQModel
from latentdiff.training.batch.batch_types import DiffusionBatch
from latentdiff.training.objectives.diffusion import DenoiserObjective
from latentdiff.training.objectives.objective import Result
from latentdiff.training.settings import DenoiserSettings
from latentdiff.training.starting_networks import load_autoencoder
from latentdiff.training.trainers.denoiser import train_denoiser


@pytest.mark.parametrize("cached", [True, False])
def test_a_denoiser_learns_pixels(pictures: Path, text_encoder: Path, tmp_path: Path, cached: bool) -> None:
    IdentityAutoencoder(sample_size=16).save_pretrained(tmp_path / "pixels")
    values = {
        **DENOISER,
        "data": str(pictures),
        "autoencoder": str(tmp_path / "pixels"),
        "text_encoder": str(text_encoder),
        "output": str(tmp_path / "out"),
        "max_steps": 2,
        "cache_latents": cached,
    }
    out = train_denoiser(DenoiserSettings.load(None, values))
    pipeline = TextToImagePipeline.from_pretrained(out)
    pipeline.set_progress_bar_config(disable=True)
    assert isinstance(pipeline.vae, IdentityAutoencoder)
    assert (pipeline.unet.config.in_channels, pipeline.unet.config.sample_size) == (3, 16)
    images = pipeline("a red thing", seed=0, num_inference_steps=2, output_type="pt").images
    assert images.shape == (1, 3, 16, 16)
    assert torch.isfinite(images).all()


def test_latents_of_another_width_than_the_config_says_are_refused(tmp_path: Path) -> None:
    VQModel(**VAE, vq_embed_dim=3).save_pretrained(tmp_path / "vq")
    with pytest.raises(ValueError, match=r"vq: its latents have 3 channels \(vq_embed_dim\) and latent_channels=4"):
        load_autoencoder(str(tmp_path / "vq"))
    FSQModel(**VAE, levels=(8, 5, 5)).save_pretrained(tmp_path / "fsq")
    with pytest.raises(ValueError, match=r"fsq: its latents have 3 channels \(levels\) and latent_channels=4"):
        load_autoencoder(str(tmp_path / "fsq"))


@pytest.mark.parametrize("cached", [True, False])
def test_the_objective_gets_pixels_as_they_are(
    labelled: Path, tmp_path: Path, cached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every value is one of the 256 that the likelihood of the last step is about, whatever keeps them."""
    seen: list[torch.Tensor] = []
    loss = DenoiserObjective.training_loss

    def watched(self: DenoiserObjective, batch: DiffusionBatch) -> Result:
        seen.append(batch.latents)
        return loss(self, batch)

    monkeypatch.setattr(DenoiserObjective, "training_loss", watched)
    values = {**DENOISER, "data": str(labelled), "autoencoder": "pixels", "condition": "none", "max_steps": 3}
    values |= {"output": str(tmp_path / "out"), "cache_latents": cached, "loss": "hybrid"}
    train_denoiser(DenoiserSettings.load(None, values))
    pixels = torch.cat(seen)
    levels = ((pixels.double() + 1) * 127.5).round()
    assert torch.equal(pixels, levels.float() / 127.5 - 1)
    assert len(levels.unique()) > 2


def test_broken_config_of_an_autoencoder_is_named(tmp_path: Path) -> None:
    for content in ("{", "[]"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=r"config\.json is damaged"):
            load_autoencoder(str(tmp_path))
