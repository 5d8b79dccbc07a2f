"""Autoencoders of every shape that Latent Diffusion has, against diffusers' with the same weights, through files.

Latent Diffusion (Rombach et al. 2022), Table 8: factors 1 to 32, latents of 2 to 64 channels, attention at some
resolutions or none, VQ or KL. Widths are small here; the levels and the rest are the released models'.
"""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from latentdiff import models


def shape(widths: list[int], attention: tuple[int, ...] = (), **config: Any) -> dict[str, Any]:
    """A config with `widths` times 4 channels on the levels, and attention on some of these, counted from 0."""
    levels = range(len(widths))
    return {
        "block_out_channels": [4 * width for width in widths],
        "down_block_types": [f"{'Attn' if i in attention else ''}DownEncoderBlock2D" for i in levels],
        "up_block_types": [f"{'Attn' if i in attention else ''}UpDecoderBlock2D" for i in reversed(levels)],
        "layers_per_block": 2,
        "norm_num_groups": 4,
        "sample_size": 32,
        **config,
    }


KL = {  # the released ones by their names; ch_mult, and the levels of attn_resolutions at 256 pixels
    "f1": shape([2], latent_channels=3),
    "f2": shape([1, 2], latent_channels=2),
    "kl-f4": shape([1, 2, 4], latent_channels=3),
    "kl-f8": shape([1, 2, 4, 4], latent_channels=4),
    "kl-f16": shape([1, 1, 2, 2, 4], (4,), latent_channels=16),
    "kl-f32": shape([1, 1, 2, 2, 4, 4], (4, 5), latent_channels=64),
    "attention everywhere": shape([1, 2, 2], (0, 1, 2), latent_channels=5, layers_per_block=1),
    "attention above": shape([1, 2], (0,), latent_channels=1, mid_block_add_attention=False),
    "no attention": shape([2, 1, 3], latent_channels=8, mid_block_add_attention=False),
    "no quant_conv": shape([1, 2], latent_channels=16, use_quant_conv=False, use_post_quant_conv=False),
    "quant_conv alone": shape([1, 2], latent_channels=4, use_post_quant_conv=False),
    "post_quant_conv alone": shape([1, 2], latent_channels=4, use_quant_conv=False),
    "grey": shape([1, 2], latent_channels=4, in_channels=1, out_channels=1),
}
VQ = {
    "f1": shape([2], latent_channels=3, num_vq_embeddings=16),
    "f2": shape([1, 2], latent_channels=2, num_vq_embeddings=64),
    "vq-f4": shape([1, 2, 4], latent_channels=3, num_vq_embeddings=128),
    "vq-f4-noattn": shape([1, 2, 4], latent_channels=3, num_vq_embeddings=128, mid_block_add_attention=False),
    "vq-f8": shape([1, 2, 2, 4], (3,), latent_channels=4, num_vq_embeddings=128),
    "vq-f8-n256": shape([1, 2, 2, 4], (3,), latent_channels=4, num_vq_embeddings=256),
    "vq-f16": shape([1, 1, 2, 2, 4], (4,), latent_channels=8, num_vq_embeddings=128),
    "f32": shape([1, 1, 2, 2, 4, 4], (5,), latent_channels=16, num_vq_embeddings=32),
    "embed_dim below z_channels": shape([1, 2, 2], (2,), latent_channels=16, vq_embed_dim=4, num_vq_embeddings=32),
    "embed_dim above z_channels": shape([1, 2], latent_channels=3, vq_embed_dim=8, num_vq_embeddings=32),
    "one code": shape([1, 2], latent_channels=3, num_vq_embeddings=1),
}
BOTH = [("AutoencoderKL", name) for name in KL] + [("VQModel", name) for name in VQ]


def config_of(kind: str, name: str) -> dict[str, Any]:
    return (KL if kind == "AutoencoderKL" else VQ)[name]


def factor_of(config: dict[str, Any]) -> int:
    return 2 ** (len(config["block_out_channels"]) - 1)


def pixels_of(config: dict[str, Any], height: int, width: int) -> Tensor:
    return torch.rand(2, config.get("in_channels", 3), height, width) * 2 - 1


def spread(model: Any) -> Any:
    """Codes as far apart as the vectors are, so that rounding cannot change the nearest; biases that do something."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    if hasattr(model, "quantize"):
        torch.nn.init.normal_(model.quantize.embedding.weight)
    return model.eval()


def agree(ours: Any, theirs: Any, pixels: Tensor) -> None:
    """Compares what both encode to, decode to and make of the way through; in shape too.

    In float64: six levels of random weights round by 3e-5 in float32, ours and diffusers' alike.
    """
    ours, theirs, pixels = ours.double(), theirs.double(), pixels.double()
    encoded = [model.encode(pixels) for model in (ours, theirs)]
    gaussian = hasattr(encoded[0], "latent_dist")
    found, wanted = (each.latent_dist.parameters if gaussian else each.latents for each in encoded)
    torch.testing.assert_close(found, wanted, atol=1e-9, rtol=1e-9)
    latents = encoded[1].latent_dist.mode() if gaussian else wanted
    torch.testing.assert_close(ours.decode(latents).sample, theirs.decode(latents).sample, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(ours(pixels).sample, theirs(pixels).sample, atol=1e-9, rtol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize(("kind", "name"), BOTH)
def test_files_go_both_ways_and_mean_the_same(kind: str, name: str, tmp_path: Path) -> None:
    config = config_of(kind, name)
    factor = factor_of(config)
    pixels = pixels_of(config, 2 * factor, 3 * factor)
    ours = spread(getattr(models, kind)(**config))
    ours.save_pretrained(tmp_path / "ours")
    agree(ours, getattr(diffusers, kind).from_pretrained(tmp_path / "ours"), pixels)
    theirs = spread(getattr(diffusers, kind)(**config))
    theirs.save_pretrained(tmp_path / "theirs")
    agree(getattr(models, kind).from_pretrained(tmp_path / "theirs"), theirs, pixels)
    latents = ours.encode(pixels.double())
    size = (latents.latent_dist.mean if kind == "AutoencoderKL" else latents.latents).shape
    channels = config.get("vq_embed_dim") or config["latent_channels"]
    assert size == (2, channels, 2, 3)
    assert ours(pixels.double()).sample.shape == pixels.shape


@torch.no_grad()
@pytest.mark.parametrize(("kind", "name"), [("AutoencoderKL", "kl-f8"), ("VQModel", "vq-f8"), ("VQModel", "f1")])
@pytest.mark.parametrize("size", [(16, 40), (17, 23), (31, 8), (9, 15)])
def test_sides_that_the_factor_does_not_divide(kind: str, name: str, size: tuple[int, int]) -> None:
    """They are rounded down, as in diffusers: the reconstruction is that much smaller."""
    config = config_of(kind, name)
    theirs = spread(getattr(diffusers, kind)(**config))
    ours = getattr(models, kind)(**config)
    ours.load_state_dict(theirs.state_dict())
    pixels = pixels_of(config, *size)
    agree(ours.eval(), theirs, pixels)
    factor = factor_of(config)
    assert ours(pixels.double()).sample.shape[-2:] == tuple(side // factor * factor for side in size)


@torch.no_grad()
@pytest.mark.parametrize(("kind", "name"), [("AutoencoderKL", "kl-f8"), ("VQModel", "vq-f8")])
@pytest.mark.parametrize("size", [(7, 16), (16, 1), (3, 5)])
def test_a_picture_of_less_than_one_latent_is_refused(kind: str, name: str, size: tuple[int, int]) -> None:
    config = config_of(kind, name)
    height, width = size
    with pytest.raises(RuntimeError, match="Kernel size"):
        getattr(diffusers, kind)(**config).encode(pixels_of(config, *size))
    with pytest.raises(ValueError, match=f"{width}x{height} pixels are too few.* at least 8 on each side"):
        getattr(models, kind)(**config).encode(pixels_of(config, *size))
    with pytest.raises(ValueError, match=r"of 3 channels; these are \(1, 1, 16, 16\)"):
        getattr(models, kind)(**config).encode(torch.zeros(1, 1, 16, 16))
