"""``AutoencoderTiny`` is diffusers': one file for both, equal outputs and gradients."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from latentdiff import models
from latentdiff.cli import application

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


def taesd_files(model: Any, folder: Path) -> tuple[Path, Path]:
    """The two files of TAESD's own repository: sequences; the decoder's begins with a layer without weights."""
    files = []
    for part, first in (("encoder", 0), ("decoder", 1)):
        state = {}
        for key, tensor in getattr(model, part).layers.state_dict().items():
            number, _, rest = key.partition(".")
            state[f"{int(number) + first}.{rest}"] = tensor.clone()
        files.append(folder / f"taesd_{part}.safetensors")
        save_file(state, files[-1])
    return files[0], files[1]


@pytest.mark.parametrize("name", ["taesd", "three levels"])
def test_taesds_own_files_are_read(name: str, tmp_path: Path) -> None:
    theirs = diffusers.AutoencoderTiny(**CONFIGS[name])
    encoder, decoder = taesd_files(theirs, tmp_path)
    ours = models.AutoencoderTiny.from_single_file(encoder, decoder=decoder)
    assert known(ours) == known(theirs)
    assert all(torch.equal(ours.state_dict()[key], weight) for key, weight in theirs.state_dict().items())
    ours.save_single_file(tmp_path / "both.safetensors")
    with safe_open(tmp_path / "both.safetensors", "pt") as stream:
        assert {"taesd_encoder.0.weight", "taesd_decoder.1.weight"} <= set(stream.keys())
    again = models.AutoencoderTiny.from_single_file(tmp_path / "both.safetensors", dtype=torch.float16)
    assert again.dtype == torch.float16
    assert known(again) == known(ours)


def test_other_files_are_refused(tmp_path: Path) -> None:
    theirs = diffusers.AutoencoderTiny(**TINY)
    encoder, decoder = taesd_files(theirs, tmp_path)
    read = models.AutoencoderTiny.from_single_file
    with pytest.raises(ValueError, match=r"taesd_encoder.safetensors: there is no decoder of a TAESD in it"):
        read(encoder)
    state = load_file(encoder)
    save_file({key: w for key, w in state.items() if key != "1.conv.2.bias"}, tmp_path / "less.safetensors")
    with pytest.raises(ValueError, match=r"less.safetensors: the weight encoder.layers.1.conv.2.bias is missing"):
        read(tmp_path / "less.safetensors", decoder=decoder)
    save_file({**state, "3.conv.0.weight": torch.zeros(9, 8, 3, 3)}, tmp_path / "wide.safetensors")
    with pytest.raises(ValueError, match=r"wide.safetensors: encoder.layers.3.conv.0.weight should have the shape"):
        read(tmp_path / "wide.safetensors", decoder=decoder)
    save_file({**state, "1.conv.6.weight": torch.zeros(8, 8, 3, 3)}, tmp_path / "more.safetensors")
    with pytest.raises(ValueError, match=r"encoder.layers.1.conv.6.weight has no place in a TAESD"):
        read(tmp_path / "more.safetensors", decoder=decoder)
    with pytest.raises(TypeError, match="unknown argument 'scaling_factor'"):
        read(encoder, decoder=decoder, scaling_factor=2.0)


def test_one_file_keeps_what_weights_do_not_tell(tmp_path: Path) -> None:
    model = models.AutoencoderTiny(**TINY, act_fn="silu", latent_magnitude=2)
    model.save_single_file(tmp_path / "tiny.safetensors")
    again = models.AutoencoderTiny.from_single_file(tmp_path / "tiny.safetensors")
    assert (again.config.act_fn, again.config.latent_magnitude) == ("silu", 2)
    with pytest.raises(ValueError, match=r"tiny.safetensors holds a TAESD; load it with AutoencoderTiny"):
        models.AutoencoderKL.from_single_file(tmp_path / "tiny.safetensors")


def test_convert_knows_taesds_files(tmp_path: Path) -> None:
    model = models.AutoencoderTiny(**TINY)
    model.save_pretrained(tmp_path / "folder")
    places = [str(tmp_path / name) for name in ("folder", "tiny.safetensors", "back")]
    for source, target in pairwise(places):
        assert CliRunner().invoke(application(), ["convert", source, target]).exit_code == 0
    peer = diffusers.AutoencoderTiny.from_pretrained(tmp_path / "back")
    assert all(torch.equal(peer.state_dict()[key], weight) for key, weight in model.state_dict().items())
