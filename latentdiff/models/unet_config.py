"""The configs of the UNets: their levels, and which values their keys may have."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from latentdiff.models.config import check_block_types, check_choice, check_multiple, per_level

Depths = tuple[tuple[int, ...], ...]
"""For every level: how deep the attention after each resnet block is; () for a level without attention."""


class UNetLevels(NamedTuple):
    """A UNet's config, level by level from the full resolution down; ``up`` alone begins at the lowest resolution."""

    channels: tuple[int, ...]
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    down: Depths
    middle: tuple[int, ...]
    """How deep the attention in the middle is; () for none."""
    up: Depths
    text_dims: tuple[int, ...] = ()
    """Widths of the text states, in a UNet with cross-attention."""
    only_cross: tuple[bool, ...] = ()
    """Whether the first attention of the level's transformers is a cross-attention, as the second is."""


# UNet2DConditionModel

NAME = "UNet2DConditionModel"

DOWN_BLOCKS = ("CrossAttnDownBlock2D", "DownBlock2D")
UP_BLOCKS = ("CrossAttnUpBlock2D", "UpBlock2D")
MID_BLOCKS = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None)

NEUTRAL_KEYS: Mapping[str, tuple[Any, ...]] = {
    "center_input_sample": (False,),
    "downsample_padding": (1,),
    "mid_block_scale_factor": (1,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "num_attention_heads": (None,),  # diffusers refuses it too; attention_head_dim is the number of heads
    "dual_cross_attention": (False,),
    "addition_embed_type": (None,),
    "addition_time_embed_dim": (None,),
    "resnet_skip_time_act": (False,),
    "resnet_out_scale_factor": (1.0,),
    "time_embedding_type": ("positional",),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "attention_type": ("default",),
    "mid_block_only_cross_attention": (None, False),
    "cross_attention_norm": (None,),
    "addition_embed_type_num_heads": (64,),
}

CLASS_EMBEDDINGS = (None, "timestep", "identity", "projection", "simple_projection")


def text_unet_levels(config: Mapping[str, Any]) -> UNetLevels:
    """The levels of a ``UNet2DConditionModel``. Raises ValueError with key and value for what is not supported."""
    count = len(config["block_out_channels"])
    check_choices(config, count)

    def levels(key: str) -> tuple[int, ...]:
        return per_level(NAME, key, config[key], count)

    channels, layers = levels("block_out_channels"), levels("layers_per_block")
    groups = per_level(NAME, "norm_num_groups", config["norm_num_groups"], 1) * count
    check_multiple(NAME, "block_out_channels", channels, "norm_num_groups", groups)
    down, middle, up = transformer_depths(config, layers)
    heads = levels("attention_head_dim")
    attention = zip(down, [()] * (count - 1) + [middle], up[::-1], strict=True)
    for width, number, depths in zip(channels, heads, attention, strict=True):
        if any(depths):  # a level without attention has no heads
            check_multiple(NAME, "block_out_channels", [width], "attention_head_dim", [number])
    text_dims = levels("cross_attention_dim")
    only_cross = truths("only_cross_attention", config["only_cross_attention"], count)
    return UNetLevels(channels, layers, heads, down, middle, up, text_dims, only_cross)


def check_choices(config: Mapping[str, Any], count: int) -> None:
    check_choice(NAME, "act_fn", config["act_fn"], ("silu", "swish"))
    check_choice(NAME, "mid_block_type", config["mid_block_type"], MID_BLOCKS)
    check_choice(NAME, "resnet_time_scale_shift", config["resnet_time_scale_shift"], ("default", "scale_shift"))
    check_choice(NAME, "class_embed_type", config["class_embed_type"], CLASS_EMBEDDINGS)
    check_block_types(NAME, "down_block_types", config["down_block_types"], DOWN_BLOCKS, count)
    check_block_types(NAME, "up_block_types", config["up_block_types"], UP_BLOCKS, count)
    for key in ("in_channels", "out_channels"):
        per_level(NAME, key, config[key], 1)
    kind, given = config["class_embed_type"], config["projection_class_embeddings_input_dim"]
    if "projection" in str(kind) and given is None:
        raise ValueError(f"{NAME}: class_embed_type={kind!r} needs projection_class_embeddings_input_dim.")


def transformer_depths(config: Mapping[str, Any], layers: Sequence[int]) -> tuple[Depths, tuple[int, ...], Depths]:
    """How deep the transformers are on the way down, in the middle and on the way up; () where there are none.

    ``transformer_layers_per_block`` is one depth for all, or for each level one depth or one for each of its layers.
    The way up mirrors the way down, or follows ``reverse_transformer_layers_per_block``, the lowest level first.
    """
    key, back = "transformer_layers_per_block", "reverse_transformer_layers_per_block"
    wanted, reverse, count = config[key], config[back], len(layers)
    per_layer = isinstance(wanted, (list, tuple)) and any(isinstance(one, (list, tuple)) for one in wanted)
    if per_layer and reverse is None:
        raise ValueError(f"{NAME}: {key}={wanted!r} has depths for single layers, and needs {back} for the way up.")

    def depths(key: str, value: Any, layers: Sequence[int]) -> Depths:
        each = list(value) if isinstance(value, (list, tuple)) else [value] * count
        if len(each) != count:
            raise ValueError(f"{NAME}: {key}={value!r} has {len(each)} entries for {count} levels.")
        return tuple(per_level(NAME, key, one, most, least=0) for one, most in zip(each, layers, strict=True))

    down = depths(key, wanted, layers)
    above = [number + 1 for number in layers[::-1]]
    up = depths(key, wanted[::-1] if isinstance(wanted, (list, tuple)) else wanted, above) if reverse is None else ()
    up = depths(back, reverse, above) if reverse is not None else up
    middle = down[-1][:1] if config["mid_block_type"] == MID_BLOCKS[0] else ()
    return (
        tuple(d if "Attn" in kind else () for d, kind in zip(down, config["down_block_types"], strict=True)),
        middle,
        tuple(d if "Attn" in kind else () for d, kind in zip(up, config["up_block_types"], strict=True)),
    )


def truths(key: str, value: bool | Sequence[bool], count: int) -> tuple[bool, ...]:
    """One truth value for all levels, or one for each. Raises ValueError for anything else."""
    values: tuple[Any, ...] = tuple(value) if isinstance(value, (list, tuple)) else (value,) * count
    check_choice(NAME, key, values, (False, True))
    if len(values) != count:
        raise ValueError(f"{NAME}: {key}={value!r} has {len(values)} entries for {count} levels.")
    return values


# UNet2DModel and NoisyClassifier

PLAIN_DOWN_BLOCKS = ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D")
PLAIN_UP_BLOCKS = ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D")


def check_plain_unet(config: Any) -> None:
    """What of a ``UNet2DModel``'s config `plain_levels` does not check. Raises ValueError with key and value."""
    name = "UNet2DModel"
    check_choice(name, "mid_block_type", config.mid_block_type, ("UNetMidBlock2D", None))
    check_choice(name, "class_embed_type", config.class_embed_type, (None, "timestep", "identity"))
    check_choice(name, "upsample_type", config.upsample_type, ("conv", "resnet"))
    per_level(name, "out_channels", config.out_channels, 1)


def plain_levels(name: str, config: Any) -> UNetLevels:
    """The levels of a UNet without text, or of its way down and its middle, if it has no ``up_block_types``.

    Raises:
        ValueError: with key and value, for what is not supported.
    """
    down_types, up_types = config.down_block_types, config.get("up_block_types")
    levels = len(config.block_out_channels)
    channels = per_level(name, "block_out_channels", config.block_out_channels, levels)
    check_choice(name, "act_fn", config.act_fn, ("silu", "swish"))
    check_choice(name, "resnet_time_scale_shift", config.resnet_time_scale_shift, ("default", "scale_shift"))
    check_choice(name, "downsample_padding", config.downsample_padding, (0, 1))
    check_choice(name, "downsample_type", config.downsample_type, ("conv", "resnet"))
    check_block_types(name, "down_block_types", down_types, PLAIN_DOWN_BLOCKS, levels)
    if up_types is not None:
        check_block_types(name, "up_block_types", up_types, PLAIN_UP_BLOCKS, levels)
    for key in ("in_channels", "layers_per_block", "norm_num_groups"):
        per_level(name, key, config[key], 1)
    check_multiple(name, "block_out_channels", channels, "norm_num_groups", [config.norm_num_groups] * levels)
    layers = config.layers_per_block
    down: Depths = tuple((1,) * layers if "Attn" in kind else () for kind in down_types)
    up: Depths = tuple((1,) * (layers + 1) if "Attn" in kind else () for kind in up_types or [""] * levels)
    middle = (1,) if config.mid_block_type is not None and config.add_attention else ()
    given = config.attention_head_dim
    widths = channels if given is None else per_level(name, "attention_head_dim", given, levels)
    attention = zip(down, [()] * (levels - 1) + [middle], up[::-1], strict=True)
    for channel, width, depths in zip(channels, widths, attention, strict=True):
        if any(depths):
            check_multiple(name, "block_out_channels", [channel], "attention_head_dim", [width])
    heads = tuple(channel // width for channel, width in zip(channels, widths, strict=True))
    return UNetLevels(channels, (layers,) * levels, heads, down, middle, up)
