"""The configs of the UNets: their levels, and which values their keys may have."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from latentdiff.models.network import Network

Depths = tuple[tuple[int, ...], ...]
"""For every level: how deep the attention after each resnet block is; () for a level without attention."""


class UNetLevels(NamedTuple):
    """A UNet's config, level by level from the full resolution down; ``up`` alone begins at the lowest resolution."""

    channels: tuple[int, ...]
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    head_widths: tuple[int, ...]
    down: Depths
    middle: tuple[int, ...]
    """How deep the attention in the middle is; () for none."""
    up: Depths
    middle_resnets: int
    text_dims: tuple[int, ...] = ()
    """Widths of the text states, in a UNet with cross-attention."""
    only_cross: tuple[bool, ...] = ()
    """Whether the first attention of the level's transformers is a cross-attention, as the second is."""
    resnets_halve: tuple[bool, ...] = ()
    """Whether a resnet block halves the resolution, not a convolution; () for none of the levels."""
    resnets_double: tuple[bool, ...] = ()


def check_shared(network: Network) -> tuple[int, ...]:
    """What all UNets' configs have in common. Returns the channels of the levels."""
    channels = network.per_level("block_out_channels", len(network.config.block_out_channels))
    network.check_choice("act_fn", ("silu", "swish"))
    network.check_choice("resnet_time_scale_shift", ("default", "scale_shift"))
    network.per_level("in_channels")
    (groups,) = network.per_level("norm_num_groups")
    network.check_multiple("block_out_channels", channels, groups, "norm_num_groups")
    return channels


def check_heads(network: Network, levels: UNetLevels) -> UNetLevels:
    """The same levels. Where there is attention, there must be room for a head."""
    middle = [()] * (len(levels.channels) - 1) + [levels.middle]
    for i, depths in enumerate(zip(levels.down, middle, levels.up[::-1], strict=True)):
        if any(depths) and not (levels.heads[i] and levels.head_widths[i]):
            given = network.config.attention_head_dim
            network.refuse("attention_head_dim", given, f"leaves no room in {levels.channels[i]} channels.")
    return levels


# UNet2DConditionModel

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
    "resnet_skip_time_act": (False,),
    "resnet_out_scale_factor": (1.0,),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
    "attention_type": ("default",),
    "mid_block_only_cross_attention": (None, False),
    "cross_attention_norm": (None,),
    "addition_embed_type_num_heads": (64,),
}


def text_unet_levels(network: Network) -> UNetLevels:
    """The levels of a ``UNet2DConditionModel``. Raises ValueError with key and value for what is not supported."""
    config, count = network.config, len(network.config.block_out_channels)
    network.check_choice("mid_block_type", MID_BLOCKS)
    network.check_choice("class_embed_type", (None, "timestep", "identity", "projection", "simple_projection"))
    network.check_choice("time_embedding_type", ("positional", "fourier"))
    network.check_choice("down_block_types", DOWN_BLOCKS, count)
    network.check_choice("up_block_types", UP_BLOCKS, count)
    network.check_choice("conv_in_kernel", (1, 3, 5, 7))
    network.check_choice("conv_out_kernel", (1, 3, 5, 7))
    network.per_level("out_channels")
    kind, given = config.class_embed_type, config.projection_class_embeddings_input_dim
    if "projection" in str(kind) and given is None:
        network.refuse("class_embed_type", kind, "needs projection_class_embeddings_input_dim.")
    check_added(network)
    channels, layers = check_shared(network), network.per_level("layers_per_block", count)
    heads = network.per_level("attention_head_dim", count)
    is_list = isinstance(config.only_cross_attention, (list, tuple))
    network.check_choice("only_cross_attention", (False, True), count if is_list else None)
    down, middle, up = transformer_depths(network, layers)
    levels = UNetLevels(
        channels,
        layers,
        heads,
        tuple(width // number for width, number in zip(channels, heads, strict=True)),
        down,
        middle,
        up,
        middle_resnets=1 + len(middle),
        text_dims=network.per_level("cross_attention_dim", count),
        only_cross=tuple(each(config.only_cross_attention, count)),
    )
    return check_heads(network, levels)


def check_added(network: Network) -> None:
    """What a pooled embedding and sizes are embedded by, as SDXL's are."""
    config = network.config
    network.check_choice("addition_embed_type", (None, "text_time"))
    if config.addition_embed_type is None:
        return
    for key in ("addition_time_embed_dim", "projection_class_embeddings_input_dim"):
        if config[key] is None:
            network.refuse("addition_embed_type", config.addition_embed_type, f"needs {key}.")
        network.per_level(key)
    if config.class_embeddings_concat:
        network.refuse("class_embeddings_concat", True, "is not possible together with addition_embed_type.")


def transformer_depths(network: Network, layers: Sequence[int]) -> tuple[Depths, tuple[int, ...], Depths]:
    """How deep the transformers are on the way down, in the middle and on the way up; () where there are none.

    ``transformer_layers_per_block`` is one depth for all, or for each level one depth or one for each of its layers.
    The way up mirrors the way down, or follows ``reverse_transformer_layers_per_block``, the lowest level first.
    """
    config, count = network.config, len(layers)
    key, back = "transformer_layers_per_block", "reverse_transformer_layers_per_block"
    wanted = each(config[key], count)
    if config[back] is None and any(isinstance(one, (list, tuple)) for one in wanted):
        network.refuse(key, wanted, f"has depths for single layers, and needs {back} for the way up.")

    def depths(key: str, given: Sequence[Any], layers: Sequence[int], types: Sequence[str]) -> Depths:
        if len(given) != count:
            network.refuse(key, given, f"has {len(given)} entries for {count} levels.")
        found = (network.per_level(key, most, 0, one) for one, most in zip(given, layers, strict=True))
        return tuple(one if "Attn" in kind else () for one, kind in zip(found, types, strict=True))

    down = depths(key, wanted, layers, config.down_block_types)
    back, reverse = (key, wanted[::-1]) if config[back] is None else (back, each(config[back], count))
    up = depths(back, reverse, [number + 1 for number in layers[::-1]], config.up_block_types)
    lowest = network.per_level(key, layers[-1], 0, wanted[-1])
    return down, lowest[:1] if config.mid_block_type == MID_BLOCKS[0] else (), up


def each(value: Any, count: int) -> list[Any]:
    """One value for every level, or a list of one for each."""
    return list(value) if isinstance(value, (list, tuple)) else [value] * count


# UNet2DModel and NoisyClassifier

PLAIN_DOWN_BLOCKS = ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D")
PLAIN_UP_BLOCKS = ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D")


def plain_levels(network: Network) -> UNetLevels:
    """The levels of a UNet without text, or of its way down and its middle, if it has no ``up_block_types``.

    Raises:
        ValueError: with key and value, for what is not supported.
    """
    config, count = network.config, len(network.config.block_out_channels)
    up_types = config.get("up_block_types")
    network.check_choice("downsample_padding", (0, 1))
    network.check_choice("downsample_type", ("conv", "resnet"))
    network.check_choice("down_block_types", PLAIN_DOWN_BLOCKS, count)
    if up_types is not None:
        network.check_choice("up_block_types", PLAIN_UP_BLOCKS, count)
        network.check_choice("mid_block_type", ("UNetMidBlock2D", None))
        network.check_choice("class_embed_type", (None, "timestep", "identity"))
        network.check_choice("time_embedding_type", ("positional", "fourier", "learned"))
        network.check_choice("upsample_type", ("conv", "resnet"))
        network.per_level("out_channels")
    channels, (layers,) = check_shared(network), network.per_level("layers_per_block")
    widths = channels if config.attention_head_dim is None else network.per_level("attention_head_dim", count)
    levels = UNetLevels(
        channels,
        (layers,) * count,
        tuple(channel // width for channel, width in zip(channels, widths, strict=True)),
        widths,
        tuple((1,) * layers if "Attn" in kind else () for kind in config.down_block_types),
        (1,) if config.mid_block_type is not None and config.add_attention else (),
        tuple((1,) * (layers + 1) if "Attn" in kind else () for kind in up_types or [""] * count),
        middle_resnets=2,
        resnets_halve=tuple(by_resnet(kind, config.downsample_type) for kind in config.down_block_types),
        resnets_double=tuple(by_resnet(kind, config.upsample_type) for kind in (up_types or ())[::-1]),
    )
    return check_heads(network, levels)


def by_resnet(block: str, sampling: str) -> bool:
    """Whether a block of that name changes the resolution by a resnet block.

    `sampling`, "conv" or "resnet", concerns blocks with attention; the others are named for theirs.
    """
    return block.startswith("Resnet") or ("Attn" in block and sampling == "resnet")
