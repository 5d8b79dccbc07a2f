"""``AutoencoderTiny`` is diffusers': one file for both, equal outputs and gradients."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from latentdiff import models

TINY: dict[str, Any] = {
    "encoder_block_out_channels": (8, 8, 8),
    "decoder_block_out_channels": (8, 8, 8),
    "num_encoder_blocks": (1, 2, 1),
    "num_decoder_blocks": (2, 1, 1),
}
CONFIGS: dict[str, dict[str, Any]] = {
    "taesd": {},
    "three levels": TINY,
    "one level": {
        "encoder_block_out_channels": (8,),
        "decoder_block_out_channels": (12,),
        "num_encoder_blocks": (2,),
        "num_decoder_blocks": (0,),
    },
    "grey, silu, 16 channels": {**TINY, "in_channels": 1, "out_channels": 1, "act_fn": "silu", "latent_channels": 16},
    "other magnitude": {**TINY, "latent_magnitude": 2, "latent_shift": 0.4},
}


def known(model: Any) -> dict[str, Any]:
    return {key: value for key, value in model.config.items() if not key.startswith("_")}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("ours_first", [True, False])
def test_files_go_both_ways_with_equal_outputs(name: str, ours_first: bool, tmp_path: Path) -> None:
    first, second = (models.AutoencoderTiny, diffusers.AutoencoderTiny)[:: 1 if ours_first else -1]
    first(**CONFIGS[name]).save_pretrained(tmp_path)
    one, other = (kind.from_pretrained(tmp_path).eval() for kind in (first, second))
    assert {k: v for k, v in one.config.items() if k[0] != "_"} == {
        k: v for k, v in other.config.items() if k[0] != "_"
    }
    pixels = torch.rand(2, one.config.in_channels, 20, 28) * 2 - 1
    with torch.no_grad():
        latents = one.encode(pixels).latents
        assert torch.equal(latents, other.encode(pixels, return_dict=False)[0])
        assert torch.equal(one.decode(latents * 3).sample, other.decode(latents * 3, return_dict=False)[0])
        assert torch.equal(one(pixels).sample, other(pixels, return_dict=False)[0])
        for model in (one, other):
            model.enable_slicing()
        assert torch.equal(one.decode(latents).sample, other.decode(latents).sample)


def test_gradients_are_diffusers(pair: Any, same_gradients: Any) -> None:
    ours, theirs = pair("AutoencoderTiny", **TINY)
    ours.enable_gradient_checkpointing()
    pixels = torch.rand(2, 3, 8, 8) * 2 - 1
    for model in (ours, theirs):
        latents = model.encode(pixels).latents
        (model.decode(latents).sample.square().mean() + latents.abs().mean()).backward()
    same_gradients(ours, theirs)


def test_gradients_pass_the_rounding_within_its_range() -> None:
    model = models.AutoencoderTiny(**TINY)
    h = torch.tensor([-9.0, -1.0, 0.3, 2.0, 9.0]).view(1, 1, 1, 5).requires_grad_()
    latents = model.bottleneck(h).latents
    torch.testing.assert_close(latents.flatten(), torch.tensor([-3.0, -1.0, 0.3, 2.0, 3.0]), atol=0.0121, rtol=0)
    latents.sum().backward()
    assert h.grad is not None
    assert h.grad.flatten().tolist() == pytest.approx([0.0, 1.0, 1.0, 1.0, 0.0])


def test_large_pictures_in_tiles_differ_at_borders_only() -> None:
    model = models.AutoencoderTiny(**TINY).eval()
    latents = torch.randn(1, 4, 40, 24)
    with torch.no_grad():
        whole = model.decode(latents).sample
        model.enable_tiling(tile_sample_min_size=96, tile_overlap_factor=0.5)
        tiled = model.decode(latents).sample
    assert tiled.shape == whole.shape == (1, 3, 160, 96)
    torch.testing.assert_close(tiled[:, :, :48, :48], whole[:, :, :48, :48], atol=1e-5, rtol=0)
    assert 0 < (tiled - whole).abs().max() < 0.5 * whole.std()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"encoder_block_out_channels": (8, 8, 16)},
            r"encoder_block_out_channels=\(8, 8, 16\) is not supported",
        ),
        ({"num_decoder_blocks": (1, 1)}, r"num_decoder_blocks=\(1, 1\) has 2 entries for 3 levels"),
        ({"encoder_block_out_channels": (8, 8), "num_encoder_blocks": (1, 1)}, r"has 2 entries for 3 levels"),
        ({"upsampling_scaling_factor": 4}, r"upsampling_scaling_factor=4 is not supported; .* set it to 2"),
        ({"upsample_fn": "bilinear"}, r"upsample_fn='bilinear' is not supported"),
        ({"act_fn": "tanh"}, r"act_fn='tanh' is not supported; use one of 'relu'"),
        ({"block_out_channels": (4, 4, 4)}, r"block_out_channels=\(4, 4, 4\) differs from decoder_block_out_channels"),
        ({"latent_chanels": 4}, r"unknown config key 'latent_chanels'; did you mean 'latent_channels'"),
        ({"scaling_factor": 0}, r"scaling_factor=0 is not supported"),
    ],
    ids=str,
)
def test_a_wrong_config_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.AutoencoderTiny(**{**TINY, **config})


def test_wrong_pictures_are_refused() -> None:
    model = models.AutoencoderTiny(**TINY)
    with pytest.raises(ValueError, match=r"pictures must be \(B, 3, H, W\), of 3 channels; these are \(1, 4, 8, 8\)"):
        model.encode(torch.zeros(1, 4, 8, 8))
    with pytest.raises(ValueError, match=r"3x8 pixels are too few for an autoencoder with a factor of 4"):
        model.encode(torch.zeros(1, 3, 8, 3))
