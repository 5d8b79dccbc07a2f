"""The autoencoder that does nothing, under the contract of `AutoencoderKL`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch.optim import SGD

from latentdiff.models import AutoencoderKL, BottleneckOutput, IdentityAutoencoder


def test_latents_are_the_pixels() -> None:
    model, pixels = IdentityAutoencoder(), torch.rand(2, 3, 5, 7) * 2 - 1
    posterior = model.encode(pixels).latent_dist
    for latents in (posterior.mean, posterior.mode(), posterior.sample(torch.Generator().manual_seed(0))):
        assert torch.equal(latents, pixels)
    assert torch.equal(model.encode(pixels, return_dict=False)[0].mean, pixels)
    assert torch.equal(model.decode(pixels).sample, pixels)
    assert torch.equal(model.decode(pixels, return_dict=False, generator=None)[0], pixels)
    output = model(pixels, sample_posterior=True, generator=torch.Generator())
    assert isinstance(output.bottleneck, BottleneckOutput)
    assert torch.equal(output.sample, pixels)
    assert torch.equal(output.bottleneck.latents, pixels)
    assert output.bottleneck.losses == output.bottleneck.statistics == {}
    assert torch.equal(model(pixels, return_dict=False)[0], pixels)


def test_the_distribution_is_diffusers_deterministic_one() -> None:
    pixels = torch.rand(2, 3, 4, 4)
    ours = IdentityAutoencoder().encode(pixels).latent_dist
    theirs = DiagonalGaussianDistribution(torch.cat([pixels, pixels], dim=1), deterministic=True)
    for name in ("mean", "std", "var"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert torch.equal(ours.sample(), theirs.sample())
    assert float(ours.kl().sum()) == float(theirs.kl().sum()) == 0
    assert float(ours.nll(pixels + 1).sum()) == float(theirs.nll(pixels + 1).sum()) == 0


def test_gradients_pass_and_nothing_is_learned() -> None:
    model, pixels = IdentityAutoencoder(), torch.rand(1, 3, 2, 2, requires_grad=True)
    (model.decode(model.encode(pixels).latent_dist.sample()).sample * 3).sum().backward()
    assert pixels.grad is not None
    assert torch.equal(pixels.grad, torch.full_like(pixels, 3))
    assert [p for p in model.parameters() if p.requires_grad] == []
    with pytest.raises(ValueError, match="optimizer"):
        SGD([p for p in model.parameters() if p.requires_grad], lr=1)


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = IdentityAutoencoder(1, 1, 1, sample_size=64, scaling_factor=0.5).half()
    model.save_pretrained(tmp_path)
    again = IdentityAutoencoder.from_pretrained(tmp_path, dtype=torch.float16)
    assert (again.dtype, again.device.type) == (torch.float16, "cpu")
    assert {k: v for k, v in again.config.items() if k[0] != "_"} == {
        k: list(v) if isinstance(v, tuple) else v for k, v in model.config.items() if k[0] != "_"
    }


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"latent_channels": 4}, "latent_channels=4 must be the same"),
        ({"block_out_channels": (8, 8)}, r"block_out_channels=\(8, 8\) has 2 entries for 1 levels"),
        ({"in_channels": 0, "out_channels": 0, "latent_channels": 0}, "in_channels=0"),
        ({"layers_per_block": 2}, "unknown config key 'layers_per_block'"),
    ],
)
def test_what_it_cannot_be_is_refused(config: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        IdentityAutoencoder(**config)


def test_another_class_is_refused(tmp_path: Path) -> None:
    AutoencoderKL(block_out_channels=(32,)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="config of a AutoencoderKL; IdentityAutoencoder cannot be built"):
        IdentityAutoencoder.from_pretrained(tmp_path)
