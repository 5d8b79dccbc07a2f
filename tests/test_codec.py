"""Pixels to scaled latents and back, with every kind of autoencoder, wherever its weights are."""

from typing import Any

import accelerate
import diffusers
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from tiny import VAE
from torch import Tensor, nn

from latentdiff import AutoencoderKL, VQModel
from latentdiff.codec import Codec, Posterior, execution_device
from latentdiff.models import FSQModel, GumbelVQModel, IdentityAutoencoder


def autoencoder(kind: str = "kl", **config: Any) -> Any:
    torch.manual_seed(0)
    made = {
        "kl": lambda: AutoencoderKL(**VAE | config),
        "theirs": lambda: diffusers.AutoencoderKL(**VAE | config),
        "vq": lambda: VQModel(**VAE | config, num_vq_embeddings=16),
        "gumbel": lambda: GumbelVQModel(**VAE | config, num_vq_embeddings=16),
        "fsq": lambda: FSQModel(**VAE | config, levels=(4, 4, 3, 3)),
        "identity": lambda: IdentityAutoencoder(scaling_factor=0.5),
    }
    return made[kind]().eval().requires_grad_(False)


def pixels(count: int = 2) -> Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("shift", [None, 0.75])
def test_latents_are_shifted_and_scaled_both_ways(shift: float | None) -> None:
    vae = autoencoder("theirs", scaling_factor=2.0, shift_factor=shift)
    codec, taken = Codec(vae), shift or 0.0
    drawn = vae.encode(pixels(1)).latent_dist.sample(torch.Generator().manual_seed(3))
    for generator in (torch.Generator().manual_seed(3), [torch.Generator().manual_seed(3)]):
        scaled = codec.encode(pixels(1), generator)
        torch.testing.assert_close(scaled, (drawn - taken) * 2.0)
    torch.testing.assert_close(codec.decode(scaled), vae.decode(drawn).sample, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(codec.unscaled(codec.scaled(drawn)), drawn)


@pytest.mark.parametrize("kind", ["kl", "theirs", "vq", "gumbel", "fsq", "identity"])
def test_every_kind_goes_both_ways(kind: str) -> None:
    codec = Codec(autoencoder(kind))
    latents = codec.encode(pixels(), torch.Generator().manual_seed(0))
    assert latents.shape == (2, codec.channels, 16 // codec.factor, 16 // codec.factor)
    assert codec.decode(latents).shape == (2, 3, 16, 16)
    posterior = codec.posterior(pixels())
    assert (posterior.std is None) == (kind in ("vq", "gumbel", "fsq"))
    noise = torch.ones_like(posterior.mean)
    torch.testing.assert_close(codec.encode_with(pixels(), noise), codec.scaled(posterior.sample(noise)))
    if kind == "identity":
        torch.testing.assert_close(latents, pixels() * 0.5)


def test_channels_have_a_mean_and_a_deviation_of_their_own() -> None:
    mean, std = [1.0, -2.0, 0.5, 0.0], [2.0, 0.5, 1.0, 4.0]
    for kind in ("kl", "theirs"):
        codec = Codec(autoencoder(kind, scaling_factor=0.5, latents_mean=mean, latents_std=std))
        latents = torch.randn(2, 4, 8, 8)
        scaled = codec.scaled(latents)
        torch.testing.assert_close(scaled[:, 1], (latents[:, 1] + 2.0) / 0.5 * 0.5)
        torch.testing.assert_close(codec.unscaled(scaled), latents)
    for wrong in ([1.0, 1.0], [1.0, 1.0, 1.0, 0.0], ["a"] * 4, 1.0):
        with pytest.raises(ValueError, match="a number for each of 4 channels, and deviations above 0"):
            Codec(autoencoder(latents_mean=mean, latents_std=wrong)).scaled(latents)


def test_pictures_are_repeated_in_a_row() -> None:
    codec = Codec(autoencoder())
    shared = codec.encode(pixels(), torch.Generator().manual_seed(3), 4)
    assert torch.equal(shared[0], shared[1])
    assert not torch.equal(shared[1], shared[2])
    own = codec.encode(pixels(), [torch.Generator().manual_seed(i) for i in range(4)], 4)
    assert not torch.equal(own[0], own[1])
    torch.testing.assert_close(own[3:], codec.encode(pixels()[1:], [torch.Generator().manual_seed(3)]))
    codes = Codec(autoencoder("vq")).encode(pixels(), None, 4)
    assert torch.equal(codes[0], codes[1])


def test_only_pixels_as_they_are_count_as_pixels() -> None:
    assert Codec(IdentityAutoencoder()).is_identity
    assert not Codec(autoencoder("identity")).is_identity
    assert not Codec(autoencoder()).is_identity


def test_a_posterior_repeats_its_spread() -> None:
    posterior = Posterior(torch.arange(2.0).view(2, 1, 1, 1), torch.ones(2, 1, 1, 1)).repeat(2)
    assert posterior.sample(torch.ones(4, 1, 1, 1)).flatten().tolist() == [1, 1, 2, 2]


class Elsewhere(ModelHook):
    """Model offload without a GPU: the weights rest on "meta", where nothing is computed, and work on the CPU."""

    execution_device = torch.device("cpu")

    def __init__(self, module: nn.Module) -> None:
        self.weights = {name: weight.clone() for name, weight in module.state_dict().items()}

    def init_hook(self, module: nn.Module) -> nn.Module:
        return module.to("meta")

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        module.to_empty(device="cpu").load_state_dict(self.weights)
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        module.to("meta")
        return output


@pytest.mark.parametrize("kind", ["kl", "theirs", "vq"])
@pytest.mark.parametrize("offload", ["model", "sequential"])
def test_pixels_go_where_the_network_computes(kind: str, offload: str) -> None:
    vae = autoencoder(kind)
    codec = Codec(vae)
    wanted = codec.encode(pixels(), torch.Generator().manual_seed(0))
    picture = codec.decode(wanted)
    if offload == "model":
        add_hook_to_module(vae, Elsewhere(vae))
    else:
        accelerate.cpu_offload(vae, "cpu", offload_buffers=True)
    assert vae.device.type == "meta"
    assert execution_device(vae) == torch.device("cpu")
    found = codec.encode(pixels(), torch.Generator().manual_seed(0))
    torch.testing.assert_close(found, wanted)
    if offload == "model":  # diffusers leaves a whole model where it works until the next one runs
        vae.to("meta")
    assert vae.device.type == "meta"
    torch.testing.assert_close(codec.decode(found), picture)


def test_without_hooks_weights_say_where() -> None:
    vae = autoencoder()
    assert execution_device(vae).type == "cpu"
    assert execution_device(vae.to("meta")).type == "meta"
    assert execution_device(nn.Identity()).type == "cpu"


def test_noise_may_be_drawn_in_another_precision_than_the_network_computes() -> None:
    """torch may draw other numbers in another one, and a seed is to mean the same picture in all."""
    codec = Codec(autoencoder().to(torch.bfloat16))
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    drawn = codec.encode(pixels(1), [torch.Generator().manual_seed(3)], noise_dtype=torch.float32)
    assert drawn.dtype == torch.bfloat16
    assert torch.equal(drawn, codec.encode_with(pixels(1), noise))
