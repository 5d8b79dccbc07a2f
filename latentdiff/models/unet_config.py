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
    "reverse_transformer_layers_per_block": (None,),
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
    "projection_class_embeddings_input_dim": (None,),
    "attention_type": ("default",),
    "class_embeddings_concat": (False,),
    "mid_block_only_cross_attention": (None, False),
    "cross_attention_norm": (None,),
    "addition_embed_type_num_heads": (64,),
}


class UNetLevels(NamedTuple):
    """The config, level by level from the full resolution down; ``up`` alone runs from the lowest resolution up."""

    channels: tuple[int, ...]
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    depths: tuple[int, ...]
    text_dims: tuple[int, ...]
    down: tuple[bool, ...]
    """Whether the level has transformers on the way down."""
    up: tuple[bool, ...]
    only_cross: tuple[bool, ...]
    """Whether the first attention of the level's transformers looks at the text, as the second does."""

    def transformer(self, level: int) -> dict[str, int]:
        return {"heads": self.heads[level], "depth": self.depths[level], "text_dim": self.text_dims[level]}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "UNetLevels":
        """Raises ValueError with key and value for what the UNet cannot be."""
        count = len(config["block_out_channels"])
        check_choice(NAME, "act_fn", config["act_fn"], ("silu", "swish"))
        check_choice(NAME, "mid_block_type", config["mid_block_type"], MID_BLOCKS)
        check_choice(NAME, "resnet_time_scale_shift", config["resnet_time_scale_shift"], ("default", "scale_shift"))
        check_choice(NAME, "class_embed_type", config["class_embed_type"], (None, "timestep", "identity"))
        check_choice(NAME, "down_block_types", config["down_block_types"], DOWN_BLOCKS)
        check_choice(NAME, "up_block_types", config["up_block_types"], UP_BLOCKS)
        for key in ("down_block_types", "up_block_types"):
            if len(config[key]) != count:
                raise ValueError(f"{NAME}: {key}={config[key]!r} has {len(config[key])} entries for {count} levels.")

        def levels(key: str, least: int = 1) -> tuple[int, ...]:
            return per_level(NAME, key, config[key], count, least)

        for key in ("in_channels", "out_channels"):
            per_level(NAME, key, config[key], 1)
        channels = levels("block_out_channels")
        groups = per_level(NAME, "norm_num_groups", config["norm_num_groups"], 1) * count
        check_multiple(NAME, "block_out_channels", channels, "norm_num_groups", groups)
        down = tuple("Attn" in kind for kind in config["down_block_types"])
        up = tuple("Attn" in kind for kind in config["up_block_types"])
        middle = (False,) * (count - 1) + (config["mid_block_type"] == MID_BLOCKS[0],)
        heads = levels("attention_head_dim")
        for values in zip(channels, heads, down, up[::-1], middle, strict=True):
            if any(values[2:]):  # elsewhere nothing has heads
                check_multiple(NAME, "block_out_channels", values[:1], "attention_head_dim", values[1:2])
        return cls(
            channels=channels,
            layers=levels("layers_per_block"),
            heads=heads,
            depths=levels("transformer_layers_per_block", least=0),
            text_dims=levels("cross_attention_dim"),
            down=down,
            up=up,
            only_cross=truths("only_cross_attention", config["only_cross_attention"], count),
        )


def truths(key: str, value: bool | Sequence[bool], count: int) -> tuple[bool, ...]:
    """One truth value for all levels, or one for each. Raises ValueError for anything else."""
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,) * count
    check_choice(NAME, key, values, (False, True))
    if len(values) != count:
        raise ValueError(f"{NAME}: {key}={value!r} has {len(values)} entries for {count} levels.")
    return values
