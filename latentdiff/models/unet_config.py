"""What a UNet config says about each level, and which of diffusers' keys must stay neutral."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from latentdiff.models.config import check_choice, check_multiple, per_level

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


class UNetLevels(NamedTuple):
    """The config, level by level from the full resolution down; ``up`` alone runs from the lowest resolution up."""

    channels: tuple[int, ...]
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    text_dims: tuple[int, ...]
    down: tuple[tuple[int, ...], ...]
    """How deep the transformer after each resnet block of the level is; empty for a level without transformers."""
    middle: tuple[int, ...]
    up: tuple[tuple[int, ...], ...]
    only_cross: tuple[bool, ...]
    """Whether the first attention of the level's transformers looks at the text, as the second does."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "UNetLevels":
        """Raises ValueError with key and value for what the UNet cannot be."""
        count = len(config["block_out_channels"])
        check_choices(config, count)

        def levels(key: str) -> tuple[int, ...]:
            return per_level(NAME, key, config[key], count)

        channels, layers = levels("block_out_channels"), levels("layers_per_block")
        groups = per_level(NAME, "norm_num_groups", config["norm_num_groups"], 1) * count
        check_multiple(NAME, "block_out_channels", channels, "norm_num_groups", groups)
        down, middle, up = transformer_depths(config, layers)
        heads = levels("attention_head_dim")
        there = zip(down, [()] * (count - 1) + [middle], up[::-1], strict=True)
        for width, number, depths in zip(channels, heads, there, strict=True):
            if any(depths):  # elsewhere nothing has heads
                check_multiple(NAME, "block_out_channels", [width], "attention_head_dim", [number])
        return cls(
            channels=channels,
            layers=layers,
            heads=heads,
            text_dims=levels("cross_attention_dim"),
            down=down,
            middle=middle,
            up=up,
            only_cross=truths("only_cross_attention", config["only_cross_attention"], count),
        )


def check_choices(config: Mapping[str, Any], count: int) -> None:
    check_choice(NAME, "act_fn", config["act_fn"], ("silu", "swish"))
    check_choice(NAME, "mid_block_type", config["mid_block_type"], MID_BLOCKS)
    check_choice(NAME, "resnet_time_scale_shift", config["resnet_time_scale_shift"], ("default", "scale_shift"))
    check_choice(NAME, "class_embed_type", config["class_embed_type"], CLASS_EMBEDDINGS)
    check_choice(NAME, "down_block_types", config["down_block_types"], DOWN_BLOCKS)
    check_choice(NAME, "up_block_types", config["up_block_types"], UP_BLOCKS)
    for key in ("down_block_types", "up_block_types"):
        if len(config[key]) != count:
            raise ValueError(f"{NAME}: {key}={config[key]!r} has {len(config[key])} entries for {count} levels.")
    for key in ("in_channels", "out_channels"):
        per_level(NAME, key, config[key], 1)
    kind, given = config["class_embed_type"], config["projection_class_embeddings_input_dim"]
    if "projection" in str(kind) and given is None:
        raise ValueError(f"{NAME}: class_embed_type={kind!r} needs projection_class_embeddings_input_dim.")


Depths = tuple[tuple[int, ...], ...]


def transformer_depths(config: Mapping[str, Any], layers: Sequence[int]) -> tuple[Depths, tuple[int, ...], Depths]:
    """On the way down, in the middle, on the way up: how deep the transformers are, () where there are none.

    ``transformer_layers_per_block`` is one depth for all, or for each level one depth or one for each of its layers.
    The way up mirrors the way down, or is told by ``reverse_transformer_layers_per_block``, the lowest level first.
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
