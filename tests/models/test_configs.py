"""Configs: Stable Diffusion's own, and every way in which one can be wrong."""

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from latentdiff import models

UNET_BLOCKS = {
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
OLD_UNET = UNET_BLOCKS | {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "center_input_sample": False,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
}
STABLE_DIFFUSION_15 = OLD_UNET | {"attention_head_dim": 8, "cross_attention_dim": 768}
STABLE_DIFFUSION_21 = OLD_UNET | {
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "dual_cross_attention": False,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "resnet_time_scale_shift": "default",
    "sample_size": 96,
    "upcast_attention": True,
    "use_linear_projection": True,
}
PUBLISHED = {
    "sd15": ("UNet2DConditionModel", STABLE_DIFFUSION_15),
    "sd15_inpainting": ("UNet2DConditionModel", STABLE_DIFFUSION_15 | {"in_channels": 9}),
    "sd21": ("UNet2DConditionModel", STABLE_DIFFUSION_21),
    "sd_vae": (
        "AutoencoderKL",
        {
            "_class_name": "AutoencoderKL",
            "_diffusers_version": "0.6.0",
            "act_fn": "silu",
            "block_out_channels": [128, 256, 512, 512],
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "in_channels": 3,
            "latent_channels": 4,
            "layers_per_block": 2,
            "norm_num_groups": 32,
            "out_channels": 3,
            "sample_size": 512,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
        },
    ),
    "ldm_vq": (
        "VQModel",
        {
            "_class_name": "VQModel",
            "_diffusers_version": "0.1.2",
            "act_fn": "silu",
            "block_out_channels": [128, 256, 512],
            "down_block_types": ["DownEncoderBlock2D"] * 3,
            "in_channels": 3,
            "latent_channels": 3,
            "layers_per_block": 2,
            "num_vq_embeddings": 8192,
            "out_channels": 3,
            "sample_size": 256,
            "up_block_types": ["UpDecoderBlock2D"] * 3,
            "vq_embed_dim": 3,
        },
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_give_the_parameters_of_diffusers(name: str) -> None:
    kind, config = PUBLISHED[name]
    with torch.device("meta"):
        ours = getattr(models, kind).from_config(config)
        theirs = getattr(diffusers, kind).from_config(config)
    shapes = {key: weight.shape for key, weight in ours.state_dict().items()}
    assert shapes == {key: weight.shape for key, weight in theirs.state_dict().items()}


@pytest.mark.parametrize("kind", ["UNet2DConditionModel", "AutoencoderKL", "VQModel"])
def test_config_files_go_both_ways_key_by_key(kind: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        ours, theirs = getattr(models, kind)(), getattr(diffusers, kind)()
        ours.save_config(tmp_path / "ours")
        theirs.save_config(tmp_path / "theirs")
        written, wanted = (json.loads((tmp_path / d / "config.json").read_text()) for d in ("ours", "theirs"))
        assert written == wanted  # all of diffusers' keys, and the same class name
        getattr(models, kind).from_config(getattr(models, kind).load_config(tmp_path / "theirs"))
        again = getattr(diffusers, kind).from_config(getattr(diffusers, kind).load_config(tmp_path / "ours"))
    assert again.state_dict().keys() == theirs.state_dict().keys()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("center_input_sample", True),
        ("downsample_padding", 0),
        ("mid_block_scale_factor", 2),
        ("encoder_hid_dim_type", "text_proj"),
        ("num_attention_heads", 8),
        ("dual_cross_attention", True),
        ("class_embed_type", "fourier"),
        ("addition_embed_type", "text_image"),
        ("resnet_skip_time_act", True),
        ("time_embedding_type", "learned"),
        ("conv_in_kernel", 2),
        ("attention_type", "gated"),
        ("cross_attention_norm", "group_norm"),
    ],
)
def test_keys_that_ask_for_what_is_not_there(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"UNet2DConditionModel: {key}=") as refusal:
        models.UNet2DConditionModel.from_config(STABLE_DIFFUSION_15 | {key: value})
    assert repr(value) in str(refusal.value)
    with pytest.raises(ValueError, match=f"{key}=.* is not supported"):
        models.UNet2DConditionModel(**{key: value})


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({}, "addition_embed_type='text_time' needs addition_time_embed_dim"),
        ({"addition_time_embed_dim": 256}, "addition_embed_type='text_time' needs projection_class_embeddings_input"),
        ({"addition_time_embed_dim": -1, "projection_class_embeddings_input_dim": 9}, "addition_time_embed_dim=-1"),
    ],
)
def test_embedded_sizes_need_their_widths(config: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=f"UNet2DConditionModel: {why}"):
        models.UNet2DConditionModel.from_config(STABLE_DIFFUSION_15 | {"addition_embed_type": "text_time"} | config)


def test_only_cross_attention_is_one_truth_value_or_one_for_each_level() -> None:
    with pytest.raises(ValueError, match=r"only_cross_attention='yes' is not supported; use one of False, True"):
        models.UNet2DConditionModel(only_cross_attention=["yes"] * 4)
    with pytest.raises(ValueError, match=r"only_cross_attention=\[True\] has 1 entries for 4 levels"):
        models.UNet2DConditionModel(only_cross_attention=[True])


def test_neutral_values_are_taken_and_kept() -> None:
    with torch.device("meta"):
        unet = models.UNet2DConditionModel.from_config(
            STABLE_DIFFUSION_15 | {"only_cross_attention": [False] * 4, "mid_block_only_cross_attention": False}
        )
    assert unet.config.only_cross_attention == [False] * 4
    assert unet.config.mid_block_only_cross_attention is False
    assert unet.config.time_cond_proj_dim is None  # a key that the config did not have and diffusers' pipelines read


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        (
            "UNet2DConditionModel",
            {"cross_attention_dims": 768},
            "'cross_attention_dims'; did you mean 'cross_attention_dim'",
        ),
        ("UNet2DConditionModel", {"zzz": 1}, "unknown config key 'zzz'; the known keys are act_fn"),
        ("UNet2DConditionModel", {"act_fn": "gelu"}, "act_fn='gelu' is not supported; use one of 'silu', 'swish'"),
        ("UNet2DConditionModel", {"mid_block_type": "Middle"}, "mid_block_type='Middle' is not supported"),
        ("UNet2DConditionModel", {"down_block_types": ["AttnDownBlock2D"] * 4}, "down_block_types='AttnDownBlock2D'"),
        ("UNet2DConditionModel", {"up_block_types": ["UpBlock2D"] * 3}, "up_block_types=.* has 3 entries for 4 levels"),
        ("UNet2DConditionModel", {"attention_head_dim": [8, 8]}, r"attention_head_dim=\[8, 8\] has 2 entries for 4"),
        (
            "UNet2DConditionModel",
            {"attention_head_dim": 400},
            "attention_head_dim=400 leaves no room in 320 channels",
        ),
        (
            "UNet2DConditionModel",
            {"attention_head_dim": None},
            "attention_head_dim=None is not supported; give a whole",
        ),
        ("UNet2DConditionModel", {"layers_per_block": [2, 2, 2]}, "layers_per_block=.* has 3 entries"),
        (
            "UNet2DConditionModel",
            {"transformer_layers_per_block": [[1, 1.5], 1, 1, 1], "reverse_transformer_layers_per_block": [1] * 4},
            r"transformer_layers_per_block=\[1, 1.5\] .* give a whole number",
        ),
        (
            "UNet2DConditionModel",
            {"norm_num_groups": 48},
            "block_out_channels=320 is not a multiple of norm_num_groups=48",
        ),
        ("UNet2DConditionModel", {"norm_num_groups": None}, "norm_num_groups=None is not supported"),
        ("UNet2DConditionModel", {"resnet_time_scale_shift": "ada_group"}, "resnet_time_scale_shift='ada_group'"),
        (
            "UNet2DConditionModel",
            {"layers_per_block": 0},
            "layers_per_block=0 is not supported; give a whole number, 1 or",
        ),
        ("AutoencoderKL", {"layers_per_block": 0}, "layers_per_block=0 is not supported"),
        ("AutoencoderKL", {"latent_channel": 4}, "'latent_channel'; did you mean 'latent_channels'"),
        ("AutoencoderKL", {"act_fn": "relu"}, "act_fn='relu' is not supported"),
        ("AutoencoderKL", {"down_block_types": ["DownBlock2D"]}, "down_block_types='DownBlock2D' is not supported"),
        ("AutoencoderKL", {"up_block_types": ["UpDecoderBlock2D"] * 2}, "has 2 entries for 1 levels"),
        (
            "AutoencoderKL",
            {"block_out_channels": [40]},
            "block_out_channels=40 is not a multiple of norm_num_groups=32",
        ),
        ("AutoencoderKL", {"layers_per_block": [1, 2]}, "layers_per_block"),
        (
            "VQModel",
            {"norm_type": "spatial"},
            "norm_type='spatial' is not supported; leave norm_type out or set it to 'group'",
        ),
        ("VQModel", {"num_embeddings": 8}, "'num_embeddings'; did you mean 'num_vq_embeddings'"),
    ],
)
def test_wrong_configs_say_what_is_wrong(kind: str, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        getattr(models, kind)(**config)
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        getattr(models, kind).from_config(config)


def test_a_config_of_another_class_is_refused() -> None:
    with pytest.raises(ValueError, match="This is the config of a AutoencoderTiny; AutoencoderKL cannot"):
        models.AutoencoderKL.from_config({"_class_name": "AutoencoderTiny", "latent_magnitude": 3})


def test_a_subclass_loads_its_parents_config() -> None:
    class Mine(models.AutoencoderKL):
        pass

    assert isinstance(Mine.from_config({"_class_name": "AutoencoderKL"}), Mine)


def test_importing_the_room_loads_nothing_heavy() -> None:
    import subprocess
    import sys

    code = "import sys, latentdiff.models; assert not {'torch', 'diffusers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'AutoencoderLK'"):
        models.AutoencoderLK  # noqa: B018
    assert set(models.__all__) <= set(dir(models))
