"""What an autoencoder is trained for, part by part, and that every kind resumes exactly."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import autoencoder_settings

from latentdiff.models.discriminator import PatchDiscriminator
from latentdiff.training.batch.batch_types import PixelBatch
from latentdiff.training.objectives.autoencoder import AutoencoderObjective, DiscriminatorObjective
from latentdiff.training.objectives.objective import RealAndFake
from latentdiff.training.starting_networks import build_autoencoder
from latentdiff.training.trainers.autoencoder import PATIENCE, Alarms, train_autoencoder

KINDS: dict[str, dict[str, Any]] = {
    "kl": {"kind": "kl"},
    "vq": {"kind": "vq", "num_vq_embeddings": 16, "codebook_restart": 2},
    "vq-learned": {"kind": "vq", "num_vq_embeddings": 16, "codebook": "learned", "codebook_start": "data"},
    "vq-cosine": {"kind": "vq", "num_vq_embeddings": 16, "codebook_distance": "cosine"},
    "gumbel": {"kind": "gumbel", "num_vq_embeddings": 16, "gumbel_steps": 5},
    "logit-laplace": {"kind": "gumbel", "num_vq_embeddings": 16, "l1_weight": 0.0, "logit_laplace_weight": 1.0},
    "fsq": {"kind": "fsq", "fsq_levels": (5, 3, 3), "latent_channels": 3},
}
AGAINST: dict[str, Any] = {
    "discriminator_weight": 0.5,
    "discriminator_start": 2,
    "discriminator_channels": 4,
    "discriminator_layers": 1,
}


def settings(tmp_path: Path, **changes: Any) -> Any:
    return autoencoder_settings(tmp_path, tmp_path / "out", **changes)


def rows(output: Path) -> list[dict[str, float]]:
    found = [json.loads(line) for line in (output / "training/metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "pictures_per_second"} for row in found]


@pytest.mark.parametrize(
    ("kind", "against"),
    [(kind, {}) for kind in KINDS]
    + [("kl", AGAINST | {"r1_weight": 0.1}), ("vq", AGAINST | {"discriminator_loss": "vanilla"})],
)
def test_resumes_exactly(kind: str, against: dict[str, Any], pictures: Path, tmp_path: Path) -> None:
    common = {**KINDS[kind], **against, "gradient_accumulation_steps": 2, "log_every": 1, "checkpoint_every": 1}
    straight = train_autoencoder(autoencoder_settings(pictures, tmp_path / "a", max_steps=6, **common))
    train_autoencoder(autoencoder_settings(pictures, tmp_path / "b", max_steps=3, **common))
    resumed = train_autoencoder(autoencoder_settings(pictures, tmp_path / "b", max_steps=6, **common))
    last = "training/checkpoints/step-00000006"
    files = [file.name for file in (straight / last).glob("*.safetensors")]
    assert ("trained-1.safetensors" in files) == bool(against)
    for file in [f"{last}/{name}" for name in files] + ["diffusion_pytorch_model.safetensors"]:
        one, other = load_file(straight / file), load_file(resumed / file)
        assert all(torch.equal(one[name], other[name]) for name in one), file
    if not against:  # otherwise the first run samples at its own end too
        assert [row for row in rows(straight) if "loss" in row] == [row for row in rows(resumed) if "loss" in row]
    if kind.startswith("vq"):
        names = load_file(straight / last / "trained.safetensors")
        assert {"autoencoder.quantize.embedding.weight", "learner.counts", "learner.idle"} <= names.keys()
        saved = load_file(straight / "diffusion_pytorch_model.safetensors")
        assert not any("learner" in name for name in saved)


@pytest.mark.parametrize("kind", ["vq-cosine", "gumbel", "fsq"])
def test_every_kind_learns(kind: str, pictures: Path, tmp_path: Path) -> None:
    more = {"max_steps": 60, "batch_size": 4, "learning_rate": 3e-3, "sample_every": 20, "ema_decay": 0.9}
    output = train_autoencoder(autoencoder_settings(pictures, tmp_path / "out", **KINDS[kind], **more))
    found = [row["psnr"] for row in rows(output) if "psnr" in row]
    assert found[-1] > found[0] + 0.5


def test_the_balance_is_the_ratio_of_the_gradients_at_the_last_layer(tmp_path: Path) -> None:
    chosen = settings(tmp_path, **AGAINST, l1_weight=0.0, l2_weight=1.0)
    autoencoder, discriminator = build_autoencoder(chosen), PatchDiscriminator(channels=4, layers=1)
    objective = AutoencoderObjective(autoencoder, chosen, discriminator)
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    assert objective(PixelBatch(pixels, (0, 1), step=0)).for_adversary is None
    result = objective(PixelBatch(pixels, (0, 1), step=2))
    assert result.for_adversary is not None
    last = autoencoder.decoder.conv_out.weight
    reconstruction = autoencoder(
        pixels, sample_posterior=True, generator=[torch.Generator().manual_seed(i) for i in range(2)]
    ).sample
    torch.testing.assert_close(result.for_adversary.fake, reconstruction.detach())
    likes = torch.autograd.grad((reconstruction - pixels).square().mean(), last, retain_graph=True)[0]
    deceives = torch.autograd.grad(-discriminator(reconstruction).mean(), last, retain_graph=True)[0]
    balance = likes.norm() / deceives.norm()
    torch.testing.assert_close(result.figures["adaptive_weight"], balance, rtol=1e-3, atol=0)
    # Both sides now pull equally strongly there, but for the weight.
    plain = AutoencoderObjective(autoencoder, chosen)(PixelBatch(pixels, (0, 1), step=2)).loss
    torch.testing.assert_close(plain.detach(), result.watched)
    of_generator = torch.autograd.grad(result.loss - plain, last)[0]
    torch.testing.assert_close(of_generator.norm(), 0.5 * likes.norm(), rtol=1e-3, atol=0)


def test_the_balance_has_a_limit(tmp_path: Path) -> None:
    chosen = settings(tmp_path, **AGAINST, adaptive_weight_limit=1e-3)
    objective = AutoencoderObjective(build_autoencoder(chosen), chosen, PatchDiscriminator(channels=4, layers=1))
    result = objective(PixelBatch(torch.rand(2, 3, 16, 16), step=2))
    assert result.figures["adaptive_weight"].item() == pytest.approx(1e-3)


def test_a_discriminator_learns(tmp_path: Path) -> None:
    chosen = settings(tmp_path, **AGAINST)
    objective = DiscriminatorObjective(PatchDiscriminator(channels=8, layers=1, norm="group"), chosen)
    optimizer = torch.optim.Adam(objective.parameters(), 1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        result = objective(RealAndFake(torch.rand(8, 3, 16, 16), -torch.rand(8, 3, 16, 16)))
        result.loss.backward()
        optimizer.step()
    assert result.figures["discriminator_accuracy"] > 0.95


def test_a_bad_batch_leaves_the_codebook_alone(pictures: Path, tmp_path: Path) -> None:
    chosen = settings(tmp_path, **KINDS["vq"])
    objective = AutoencoderObjective(build_autoencoder(chosen), chosen)
    before = objective.autoencoder.quantize.embedding.weight.clone()
    assert not objective(PixelBatch(torch.full((2, 3, 16, 16), torch.nan))).loss.isfinite()
    objective.after_update(False)
    objective.after_update(True)
    assert torch.equal(objective.autoencoder.quantize.embedding.weight, before)


def test_alarms(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    alarms = Alarms()
    for _ in range(PATIENCE - 1):
        alarms.add({"codes_in_use": 0.02, "discriminator_accuracy": 0.99})
    assert not caplog.records
    for _ in range(PATIENCE):
        alarms.add({"codes_in_use": 0.02, "discriminator_accuracy": 0.99})
    assert [record.message.split(":")[0] for record in caplog.records] == [
        "the codebook is collapsing",
        "the discriminator is right about 99.0% of the patches, so the autoencoder learns nothing from it. Lower "
        "discriminator_learning_rate or discriminator_weight, set r1_weight=1, or begin later with discriminator_start",
    ]
    alarms.add({"codes_in_use": 0.02})
    assert len(caplog.records) == 3  # it says so again after a while
    caplog.clear()
    alarms = Alarms()
    for psnr, competing in [(24.0, False), (25.0, False), (23.5, True)]:
        alarms.add_validation({"psnr": psnr}, competing)
    assert not caplog.records
    alarms.add_validation({"psnr": 22.0}, True)
    assert "fell from 25.0 to 22.0 dB" in caplog.text
    for _ in range(3 * PATIENCE):
        alarms.add({"codes_in_use": 0.9, "discriminator_accuracy": 0.7})
    assert len(caplog.records) == 1


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="adaptive_weight=false"):
        settings(tmp_path, **AGAINST, compile=True)
    with pytest.raises(ValueError, match="attention_levels"):
        settings(tmp_path, attention_levels=(True,))
    for wrong in ({"num_vq_embeddings": 0}, {"fsq_levels": (5, 1)}, {"codebook": "averaged"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            settings(tmp_path, **wrong)
