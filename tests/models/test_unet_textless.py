"""The UNet without text against diffusers', at equal weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from latentdiff.models import UNet2DModel
from latentdiff.models.layers import ResnetBlock2D, double

DDPM: dict[str, Any] = {  # as google/ddpm-cifar10-32
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "norm_num_groups": 8,
    "norm_eps": 1e-6,
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
}
ADM: dict[str, Any] = {
    "block_out_channels": (16, 24, 32),
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "norm_num_groups": 8,
    "attention_head_dim": 8,
    "attn_norm_num_groups": 8,
    "resnet_time_scale_shift": "scale_shift",
    "out_channels": 6,
    "num_class_embeds": 11,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "ddpm": DDPM,
    "adm": ADM,
    "no_norm_in_the_middle": ADM | {"attn_norm_num_groups": None},
    "convolutions": ADM | {"downsample_type": "conv", "upsample_type": "conv"},
    "no_attention_in_the_middle": DDPM | {"add_attention": False},
    "no_middle": DDPM | {"mid_block_type": None},
    "latents": DDPM | {"in_channels": 4, "out_channels": 8, "attention_head_dim": 8, "class_embed_type": "timestep"},
    "identity": DDPM | {"class_embed_type": "identity", "time_embedding_dim": 20},
    "noise_levels": DDPM | {"time_embedding_type": "fourier"},
    "noise_levels_as_labels": DDPM | {"time_embedding_type": "fourier", "class_embed_type": "timestep"},
    "learned_times": DDPM | {"time_embedding_type": "learned", "num_train_timesteps": 1000},
    "heads_that_do_not_divide": DDPM | {"attention_head_dim": 7},
}


def inputs(config: dict[str, Any]) -> dict[str, Any]:
    labels: dict[str, Any] = {}
    if "num_class_embeds" in config:
        labels = {"class_labels": torch.tensor([3, 10])}
    elif config.get("class_embed_type") == "timestep":
        labels = {"class_labels": torch.tensor([30, 10])}
    elif config.get("class_embed_type") == "identity":
        labels = {"class_labels": torch.randn(2, 20)}
    sample = torch.randn(2, config.get("in_channels", 3), 16, 8)
    return {"sample": sample, "timestep": torch.tensor([1, 977]), **labels}


@pytest.mark.parametrize("name", CONFIGS)
def test_output_and_gradients_are_diffusers(name: str, pair: Callable, same_gradients: Callable) -> None:
    ours, theirs = pair("UNet2DModel", **CONFIGS[name])
    given = inputs(CONFIGS[name])
    found, wanted = ours(**given).sample, theirs(**given).sample
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    weights = torch.randn_like(found)
    for output in (found, wanted):
        (output * weights).sum().backward()
    same_gradients(ours, theirs)
    with torch.no_grad():
        torch.testing.assert_close(ours(**given, return_dict=False)[0], wanted, atol=1e-5, rtol=1e-5)


def test_a_result_that_is_divided_by_the_noise_level_is_computed_as_a_whole() -> None:
    unet = UNet2DModel(**CONFIGS["noise_levels"])
    assert not unet.works_in_parts
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        found, each = unet(x, 5.0).sample, unet(x, torch.tensor([5.0, 5.0])).sample
    torch.testing.assert_close(found, each)
    assert UNet2DModel(**DDPM).works_in_parts


@pytest.mark.parametrize("name", ["ddpm", "adm"])
def test_folders_go_both_ways(name: str, pair: Callable, tmp_path: Path) -> None:
    ours, theirs = pair("UNet2DModel", **CONFIGS[name])
    given = inputs(CONFIGS[name])
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    for again in (
        UNet2DModel.from_pretrained(tmp_path / "theirs"),
        diffusers.UNet2DModel.from_pretrained(tmp_path / "ours"),
    ):
        torch.testing.assert_close(again(**given).sample, ours(**given).sample, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["ddpm", "adm", "convolutions"])
@pytest.mark.parametrize("size", [(13, 9), (16, 11), (7, 8)])
def test_sizes_that_do_not_divide(name: str, size: tuple[int, int]) -> None:
    unet = UNet2DModel(**CONFIGS[name]).eval()
    given = inputs(CONFIGS[name]) | {"sample": torch.randn(2, 3, *size, requires_grad=True)}
    found = unet(**given).sample
    assert found.shape == (2, unet.config.out_channels, *size)
    found.square().mean().backward()
    assert given["sample"].grad.abs().amin(dim=1).min() > 0  # every pixel counts
    unet.train().enable_gradient_checkpointing()
    torch.testing.assert_close(unet(**given).sample, found)


def test_sizes_that_divide_are_resampled_alike_with_and_without_a_size() -> None:
    resnet = ResnetBlock2D(8, 8, groups=4, resample=double)
    x = torch.randn(1, 8, 3, 5)
    assert torch.equal(resnet(x), resnet(x, size=(6, 10)))
    assert resnet(x, size=(5, 9)).shape == (1, 8, 5, 9)


@pytest.mark.parametrize("name", ["ddpm", "adm"])
def test_sizes_with_too_few_pixels_are_refused(name: str) -> None:
    config = CONFIGS[name]
    with pytest.raises(ValueError, match=r"a feature map of .*x1 .*cannot be halved; give the network a larger input"):
        UNet2DModel(**config)(**inputs(config) | {"sample": torch.randn(2, 3, 1, 8)})


def test_heads_of_a_fixed_number() -> None:
    """Four at every level, which diffusers has no key for: each level by itself is as one of its width."""
    unet = UNet2DModel(**ADM | {"attention_head_dim": [4, 6, 8]})
    assert [block.attentions[0].heads for block in unet.down_blocks[1:]] == [4, 4]
    assert unet.mid_block.attentions[0].heads == 4


def test_gradient_checkpointing_changes_nothing() -> None:
    unet = UNet2DModel(**ADM)
    given = inputs(ADM)
    plain = torch.autograd.grad(unet(**given).sample.square().sum(), list(unet.parameters()))
    unet.enable_gradient_checkpointing()
    again = torch.autograd.grad(unet(**given).sample.square().sum(), list(unet.parameters()))
    for one, other in zip(plain, again, strict=True):
        torch.testing.assert_close(one, other)


def test_it_traces_as_one_graph() -> None:
    torch._dynamo.reset()
    unet = UNet2DModel(**ADM).eval()
    given = inputs(ADM)
    compiled = torch.compile(unet, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**given).sample, unet(**given).sample)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}, "down_block_types='CrossAttnDownBlock2D'"),
        ({"up_block_types": ("UpBlock2D",)}, "up_block_types=.* has 1 entries for 2 levels"),
        ({"attention_head_dim": 33}, "attention_head_dim=33 leaves no room in 32 channels"),
        ({"time_embedding_type": "learned"}, "num_train_timesteps=None is not supported"),
        ({"norm_num_groups": 5}, "norm_num_groups=5"),
        ({"time_embedding_type": "sinus"}, "time_embedding_type='sinus' is not supported"),
        ({"downsample_type": "pool"}, "downsample_type='pool'"),
        ({"cross_attention_dim": 8}, "unknown config key 'cross_attention_dim'"),
        ({"out_channels": 0}, "out_channels=0"),
    ],
)
def test_what_it_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UNet2DModel(**DDPM | changes)


def test_labels_that_are_missing_or_too_many() -> None:
    with pytest.raises(ValueError, match="UNet2DModel: class_labels are missing"):
        UNet2DModel(**ADM)(torch.randn(1, 3, 8, 8), 5)
    with pytest.raises(ValueError, match="UNet2DModel: class_labels were given"):
        UNet2DModel(**DDPM)(torch.randn(1, 3, 8, 8), 5, torch.tensor([1]))
