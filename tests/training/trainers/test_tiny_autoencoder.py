"""``train autoencoder kind=tiny``: a stand-in learns another autoencoder's latents, resumes exactly, and is loaded."""

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from tiny import VAE, autoencoder_settings
from trained import weights

from latentdiff.codec import Codec
from latentdiff.models import AutoencoderKL, AutoencoderTiny
from latentdiff.training.batch.batch_types import PixelBatch
from latentdiff.training.objectives.tiny import TinyObjective, load_teacher
from latentdiff.training.settings import AutoencoderSettings
from latentdiff.training.starting_networks import build_autoencoder
from latentdiff.training.trainers.autoencoder import train_autoencoder

TINY: dict[str, Any] = {"kind": "tiny", "block_out_channels": (8, 8), "layers_per_block": 1}
AGAINST = {
    "discriminator_weight": 0.5,
    "discriminator_start": 1,
    "discriminator_channels": 4,
    "discriminator_layers": 1,
}


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    torch.manual_seed(3)
    AutoencoderKL(**VAE).save_pretrained(tmp_path / "teacher" / "vae")
    return tmp_path / "teacher"  # as a pipeline's folder


def test_it_learns_the_latents_and_diffusers_loads_it(pictures: Path, teacher: Path, tmp_path: Path) -> None:
    changes = {"max_steps": 60, "learning_rate": 1e-2, "sample_every": 30, "ema_decay": 0.0, "log_every": 1}
    out = train_autoencoder(autoencoder_settings(pictures, tmp_path / "out", **TINY, **changes, teacher=str(teacher)))
    rows = [json.loads(line) for line in (out / "training" / "metrics.jsonl").read_text().splitlines()]
    psnr, latents = ([row[name] for row in rows if name in row] for name in ("psnr", "latents"))
    assert psnr[-1] > psnr[0] + 0.3
    assert sum(latents[-5:]) < 0.8 * sum(latents[:5])  # of different pictures, most of which are noise
    peer = diffusers.AutoencoderTiny.from_pretrained(out)
    assert peer.config.scaling_factor == 1.0
    assert weights(out).keys() == peer.state_dict().keys()
    assert "AutoencoderTiny.from_pretrained" in (out / "README.md").read_text()


def test_it_resumes_exactly_against_a_discriminator(pictures: Path, teacher: Path, tmp_path: Path) -> None:
    common = {**TINY, **AGAINST, "teacher": str(teacher), "validation_pictures": 1}
    straight = train_autoencoder(autoencoder_settings(pictures, tmp_path / "a", max_steps=4, **common))
    train_autoencoder(autoencoder_settings(pictures, tmp_path / "b", max_steps=2, **common))
    resumed = train_autoencoder(autoencoder_settings(pictures, tmp_path / "b", max_steps=4, **common))
    one, other = weights(straight), weights(resumed)
    assert all(torch.equal(one[name], other[name]) for name in one)
    AutoencoderKL(**VAE).save_pretrained(teacher / "vae")  # others' weights in the same place
    with pytest.raises(ValueError, match="teacher"):
        train_autoencoder(autoencoder_settings(pictures, tmp_path / "b", max_steps=6, **common))


def test_the_loss_is_of_the_teachers_scaled_latents(pictures: Path, teacher: Path, tmp_path: Path) -> None:
    """And the decoder is given these, not what the encoder makes."""
    torch.manual_seed(0)
    settings = autoencoder_settings(pictures, tmp_path, **TINY, teacher=str(teacher), latents_weight=2.0, l1_weight=0.0)
    codec = Codec(AutoencoderKL.from_pretrained(teacher / "vae"))
    model = build_autoencoder(settings)
    objective = TinyObjective(model, settings, None, codec)
    assert not any("teacher" in name for name, _ in objective.named_parameters())
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    result = objective(PixelBatch(pixels, (4, 5)))
    posterior = codec.posterior(pixels)
    noise = torch.cat([torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (4, 5)])
    drawn = (posterior.mean + posterior.std * noise) * codec.scale
    pixel_loss = (model.decode(drawn).sample - pixels).square().mean()
    latent_loss = (model.encode(pixels).latents - posterior.mean * codec.scale).square().mean()
    torch.testing.assert_close(result.loss, pixel_loss + 2.0 * latent_loss)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": None}, "kind=tiny needs a teacher, the folder of an autoencoder"),
        ({"kind": "kl"}, "kind=tiny needs a teacher, the folder of an autoencoder; no other kind has one"),
        ({"block_out_channels": (8, 16)}, "all of its block_out_channels are the same"),
        ({"attention_levels": (True, True)}, "kind=tiny has no attention_levels"),
        (
            {"latent_channels": 3},
            r"teacher: the teacher's latents have 4 channels.* or give 4, and give 2 levels",
        ),
        ({"block_out_channels": (8, 8, 8)}, r"2 pixels to each .* such as block_out_channels=\[8, 8\]"),
        ({"teacher": "nowhere"}, "nowhere: no autoencoder found"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    changes: dict[str, Any], message: str, pictures: Path, teacher: Path, tmp_path: Path
) -> None:
    values = {**TINY, "teacher": str(teacher), **changes}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train_autoencoder(autoencoder_settings(pictures, tmp_path / "out", **values))
    assert not (tmp_path / "out").exists()


def test_latents_are_the_teachers_where_nothing_else_is_said(teacher: Path, tmp_path: Path) -> None:
    settings = AutoencoderSettings(data="pictures", output=str(tmp_path), kind="tiny", teacher=str(teacher))
    assert load_teacher(settings)[1].block_out_channels == (64, 64)
    found, fitted = load_teacher(settings.model_copy(update={"teacher": "emoji"}))  # a packaged model's name
    assert found is not None
    assert (fitted.latent_channels, fitted.block_out_channels) == (8, (64, 64, 64, 64))


def test_it_is_as_large_as_taesd_where_nothing_else_is_said(tmp_path: Path) -> None:
    settings = AutoencoderSettings(data=str(tmp_path), output=str(tmp_path), kind="tiny", teacher="emoji")
    assert settings.factor == 8
    with torch.device("meta"):
        ours, theirs = build_autoencoder(settings), AutoencoderTiny()
    assert {name: w.shape for name, w in ours.state_dict().items()} == {
        name: w.shape for name, w in theirs.state_dict().items()
    }
