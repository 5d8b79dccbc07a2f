"""The networks of DDPM's, Improved DDPM's and ADM's released checkpoints, whose layout they share."""

import re
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentdiff.interchange.single_file.configs import Config, numbers
from latentdiff.interchange.single_file.files import Checkpoint, main_dtype
from latentdiff.interchange.single_file.names import RESNET, UNET, UNET_ENDS
from latentdiff.interchange.single_file.parts import built, fill

Place = tuple[str, int | None]
"""An original name, and which third of its tensor; None for the whole."""

THIRDS = {"to_q": 0, "to_k": 1, "to_v": 2}
ATTENTION: dict[str, Place] = {
    "group_norm": ("norm", None),
    "to_out.0": ("proj_out", None),
    **{name: ("qkv", third) for name, third in THIRDS.items()},
}
POOL: dict[str, Place] = {"to_out": ("c_proj", None), **{name: ("qkv_proj", third) for name, third in THIRDS.items()}}


class AdmCheckpoint(Checkpoint):
    """A checkpoint whose attention weights are converted to the newer of the two orders in the released code.

    Args:
        head_channels, heads: the width of an attention's head, or the number of heads; weights do not contain it.
        heads_first: queries, keys and values are grouped by head, as in all released files.
    """

    def __init__(
        self, file: Path, allow_pickle: bool, head_channels: int | None, heads: int, heads_first: bool
    ) -> None:
        super().__init__(file, allow_pickle)
        self.head_channels, self.heads, self.heads_first = head_channels, heads, heads_first

    def heads_of(self, channels: int) -> int:
        """The number of heads. Raises ValueError if it does not divide the channels."""
        each = channels // self.heads if self.head_channels is None else self.head_channels
        if each < 1 or channels % each or (self.head_channels is None and channels % self.heads):
            asked = f"heads={self.heads}" if self.head_channels is None else f"head_channels={self.head_channels}"
            raise ValueError(f"{self.file}: an attention has {channels} channels, which {asked} does not divide")
        return channels // each

    def __getitem__(self, name: str) -> Tensor:
        tensor = super().__getitem__(name)
        if name.endswith("positional_embedding"):
            return tensor.t()
        if tensor.ndim == 3 and tensor.shape[2] == 1:  # the original attention consists of 1-wide convolutions
            tensor = tensor[..., 0]
        if not self.heads_first or ".qkv." not in name or tensor.ndim == 0 or tensor.shape[0] % 3:
            return tensor
        heads = self.heads_of(tensor.shape[0] // 3)
        return tensor.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)

    def shape(self, name: str) -> tuple[int, ...]:
        shape = super().shape(name)
        return shape[::-1] if name.endswith("positional_embedding") else shape


def read_adm(weights: AdmCheckpoint, kind: Any, dtype: torch.dtype | None, changes: Config) -> Any:
    """The UNet, or the classifier, in a checkpoint.

    Args:
        kind: the class: `UNet2DModel` or `NoisyClassifier`.
        dtype: of the weights; None keeps the file's.
        changes: to the config that is inferred from the shapes.

    Raises:
        ValueError: the file has none, or one that is not supported; see `fill`.
    """
    classifies = kind.__name__ == "NoisyClassifier"
    if not weights.has_unet:
        raise ValueError(f"{weights.file} has no weights of the names of DDPM's and ADM's networks")
    if any(name.startswith(f"{UNET}output_blocks.") for name in weights) == classifies:
        held = "a UNet (UNet2DModel)" if classifies else "a classifier (NoisyClassifier)"
        raise ValueError(f"{weights.file} holds {held}; load it with that class")
    config = {**(classifier_config(weights) if classifies else unet2d_config(weights)), **changes}
    with torch.device("meta"):
        network = built(lambda: kind.from_config(config), weights)
    what = "classifier" if classifies else "UNet"
    fill(network, weights, lambda key: adm_name(key, network.config), what, dtype or main_dtype(weights, UNET), [UNET])
    return network


def unet2d_config(weights: AdmCheckpoint) -> Config:
    """`UNet2DModel`'s config, without its ``sample_size``.

    Raises:
        ValueError: the network is not supported.
    """
    try:
        return unchecked_config(weights)
    except (KeyError, IndexError, ZeroDivisionError) as error:
        raise ValueError(f"{weights.file}: the network is none of DDPM's or ADM's: {error}") from None


def unchecked_config(weights: AdmCheckpoint) -> Config:
    out = numbers(weights, re.escape(UNET) + r"output_blocks\.(\d+)\.")
    doubled = [name for name in weights if re.search(r"output_blocks\.\d+\.[12]\.(conv|in_layers\.0)\.weight$", name)]
    levels = len(doubled) + 1
    layers = len(out) // levels - 1
    config = way_down(weights, levels, layers)
    upward = [f"{UNET}output_blocks.{i * (layers + 1)}.1.qkv.weight" in weights for i in range(levels)]
    is_resnet = any("in_layers" in name for name in doubled)
    plain = "ResnetUpsampleBlock2D" if is_resnet else "UpBlock2D"
    config |= {
        "up_block_types": ["AttnUpBlock2D" if attends else plain for attends in upward],
        "upsample_type": "resnet" if is_resnet else "conv",
        "out_channels": weights.shape(f"{UNET}out.2.weight")[0],
    }
    if f"{UNET}label_emb.weight" in weights:
        config["num_class_embeds"] = weights.shape(f"{UNET}label_emb.weight")[0]
    return config


def classifier_config(weights: AdmCheckpoint) -> Config:
    """`NoisyClassifier`'s config. The number of layers of a level is inferred from its attentions.

    Raises:
        ValueError: the network is not supported.
    """
    blocks = len(numbers(weights, re.escape(UNET) + r"input_blocks\.(\d+)\."))
    attends = [f"{UNET}input_blocks.{i}.1.qkv.weight" in weights for i in range(blocks)]
    layers = len(next((list(run) for attention, run in groupby(attends) if attention), []))
    if not layers or blocks % (layers + 1):
        raise ValueError(f"{weights.file}: the network is none of ADM's classifiers")
    levels = blocks // (layers + 1)
    try:
        config = way_down(weights, levels, layers)
        position = f"{UNET}out.2.positional_embedding"
        if position in weights:
            side = round((weights.shape(position)[0] - 1) ** 0.5)
            classes = weights.shape(f"{UNET}out.2.c_proj.weight")[0]
            return config | {"pool": "attention", "sample_size": side * 2 ** (levels - 1), "num_classes": classes}
        return config | {"pool": "adaptive", "num_classes": weights.shape(f"{UNET}out.3.weight")[0]}
    except (KeyError, IndexError) as error:
        raise ValueError(f"{weights.file}: the network is none of ADM's classifiers: {error}") from None


def way_down(weights: AdmCheckpoint, levels: int, layers: int) -> Config:
    """The part of both configs that concerns the way down and the middle."""
    starts = [1 + level * (layers + 1) for level in range(levels)]
    blocks = f"{UNET}input_blocks."
    width = weights.shape(f"{blocks}0.0.weight")[0]
    if weights.shape(f"{UNET}time_embed.0.weight")[1] != width:
        raise ValueError(
            f"{weights.file}: the time's sinusoids are {weights.shape(f'{UNET}time_embed.0.weight')[1]} wide and the "
            f"first level {width}; diffusers' classes, and ours, have one number for both"
        )
    channels = [weights.shape(f"{blocks}{start}.0.out_layers.3.weight")[0] for start in starts]
    attends = [f"{blocks}{start}.1.qkv.weight" in weights for start in starts]
    is_resnet = levels > 1 and f"{blocks}{starts[1] - 1}.0.op.weight" not in weights
    plain = "ResnetDownsampleBlock2D" if is_resnet else "DownBlock2D"
    shifts = weights.shape(f"{blocks}1.0.emb_layers.1.weight")[0] == 2 * channels[0]
    there = {width for width, attention in zip(channels, [*attends[:-1], True], strict=True) if attention}
    heads = {width: width // weights.heads_of(width) for width in there}
    return {
        "in_channels": weights.shape(f"{blocks}0.0.weight")[1],
        "down_block_types": ["AttnDownBlock2D" if attention else plain for attention in attends],
        "block_out_channels": channels,
        "layers_per_block": layers,
        "downsample_type": "resnet" if is_resnet else "conv",
        "attention_head_dim": weights.head_channels or [heads.get(width, width) for width in channels],
        "attn_norm_num_groups": 32,
        "resnet_time_scale_shift": "scale_shift" if shifts else "default",
    }


def adm_name(key: str, config: Mapping[str, Any]) -> Place:
    """The original name of one of our weights."""
    module, _, leaf = key.rpartition(".")
    if module.startswith("head"):
        return pooled(module, leaf)
    if module in UNET_ENDS:
        return f"{UNET}{UNET_ENDS[module]}.{leaf}", None
    parts = key.split(".")
    if parts[0] == "mid_block":
        kind, rest = parts[1], ".".join(parts[3:-1])
        place = "middle_block.1" if kind == "attentions" else f"middle_block.{2 * int(parts[2])}"
    else:
        level, kind, number, rest = int(parts[1]), parts[2], int(parts[3]), ".".join(parts[4:-1])
        layers = config["layers_per_block"]
        down = parts[0] == "down_blocks"
        block = level * (layers + 1) + down
        if kind in ("downsamplers", "upsamplers"):
            attends = not down and "Attn" in config["up_block_types"][level]
            place = f"{'input' if down else 'output'}_blocks.{block + layers}.{0 if down else 1 + attends}"
            if rest == "conv":
                return f"{UNET}{place}.{'op' if down else 'conv'}.{leaf}", None
        else:
            place = f"{'input' if down else 'output'}_blocks.{block + number}.{int(kind == 'attentions')}"
    if kind == "attentions":
        name, third = ATTENTION[rest]
        return f"{UNET}{place}.{name}.{leaf}", third
    return f"{UNET}{place}.{RESNET[rest]}.{leaf}", None


def pooled(module: str, leaf: str) -> Place:
    """The original names of a classifier's last layers."""
    if module == "head.2":
        return f"{UNET}out.3.{leaf}", None
    if module == "head":
        return f"{UNET}out.2.positional_embedding", None
    name, third = POOL[module.removeprefix("head.")]
    return f"{UNET}out.2.{name}.{leaf}", third
