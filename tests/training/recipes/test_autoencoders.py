"""The settings of autoencoders that users begin from."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from latentdiff.models.discriminator import PatchDiscriminator
from latentdiff.training.batch.batch_types import PixelBatch
from latentdiff.training.cli import train
from latentdiff.training.objectives.autoencoder import AutoencoderObjective
from latentdiff.training.objectives.perceptual import FeatureNetwork, PerceptualLoss
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


def loss_of_latent_diffusion(
    objective: AutoencoderObjective, discriminator: PatchDiscriminator, pixels: Tensor, kl_weight: float, balance: float
) -> Tensor:
    """Rombach et al. 2022, App. G: beside a KL term, a sum over each picture; beside codes, as VQGAN's, a mean.

    The perceptual distance of a picture is added to each of its values. The discriminator's weight is `balance` times
    the quotient of both gradients at the last layer (VQGAN, Eq. 7), which is held below 10,000.
    """
    generators = [torch.Generator().manual_seed(i) for i in range(len(pixels))]
    output = objective.autoencoder(pixels, sample_posterior=True, generator=generators)
    sample = output.sample
    assert objective.perceptual is not None
    perceptual = [objective.perceptual(sample[i : i + 1], pixels[i : i + 1]) for i in range(len(pixels))]
    distance = (sample - pixels).abs() + torch.stack(perceptual).view(-1, 1, 1, 1)
    if objective.settings.kind == "kl":
        mean, log_variance = objective.autoencoder.encode_moments(pixels).chunk(2, dim=1)
        kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum() / len(pixels)
        likeness, bottleneck = distance.sum() / len(pixels), kl_weight * kl
    else:
        likeness, bottleneck = distance.mean(), (output.encoded - output.bottleneck.latents.detach()).square().mean()
    deceives = -discriminator.judge(sample).mean()
    last = objective.autoencoder.decoder.conv_out.weight
    one, other = (torch.autograd.grad(part, last, retain_graph=True)[0].norm() for part in (likeness, deceives))
    return likeness + bottleneck + balance * (one / other).clamp(max=1e4) * deceives


@pytest.mark.parametrize(
    ("name", "balance"), [("kl-f4", 0.5), ("kl-f8", 0.5), ("kl-f16", 0.5), ("vq-f4", 0.75), ("vq-f8", 0.6)]
)
def test_the_loss_is_latent_diffusions_but_for_a_common_factor(name: str, balance: float) -> None:
    torch.manual_seed(0)
    usual = AutoencoderSettings.load(configurations()[name], {"data": "d", "output": "o"})
    assert usual.kl_weight == 1e-6
    values: dict[str, Any] = {"block_out_channels": [8] * len(usual.block_out_channels), "norm_num_groups": 4}
    values |= {
        "kl_weight": 1e3,
        "perceptual_network": "autoencoder",
        "num_vq_embeddings": 32,
        "data": "d",
        "output": "o",
    }
    settings = AutoencoderSettings.load(configurations()[name], values)
    discriminator = PatchDiscriminator(channels=8, layers=settings.discriminator_layers)
    objective = AutoencoderObjective(build_autoencoder(settings), settings, discriminator)
    network = torch.nn.Conv2d(3, 4, 3, 2)
    objective.perceptual = PerceptualLoss(
        FeatureNetwork("conv", network, lambda x: [network(x)], (0.5,) * 3, (0.5,) * 3)
    )
    pixels = torch.rand(2, 3, 256, 256) * 2 - 1
    ours = objective(PixelBatch(pixels, (0, 1), step=settings.discriminator_start)).loss
    theirs = loss_of_latent_diffusion(objective, discriminator, pixels, 1e3, balance)
    factor = pixels[0].numel() if settings.kind == "kl" else 1
    for part in (objective.autoencoder.encoder, objective.autoencoder.decoder):
        one, other = (gradient(loss, part) for loss in (ours, theirs))
        assert (one * factor - other).norm() < 1e-3 * other.norm()


def gradient(loss: Tensor, module: torch.nn.Module) -> Tensor:
    """Of all weights of a module, one after the other."""
    return torch.cat([x.flatten() for x in torch.autograd.grad(loss, list(module.parameters()), retain_graph=True)])


def test_an_unknown_name_is_answered_with_the_known_ones(tmp_path: Path) -> None:
    arguments = ["autoencoder", "--data", str(tmp_path), "--output", str(tmp_path / "out"), "--config", "kl-f7"]
    result = CliRunner().invoke(train, arguments)
    assert result.exit_code != 0
    assert "kl-f7" in f"{result.output}{result.exception}"
    assert "kl-f8" in f"{result.output}{result.exception}"
