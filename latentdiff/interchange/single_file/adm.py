"""The networks of DDPM's, Improved DDPM's and ADM's released checkpoints, whose layout they share."""

import re
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentdiff.interchange.single_file.checkpoint import Checkpoint
from latentdiff.interchange.single_file.names import LAYOUTS, UNET
from latentdiff.interchange.single_file.reading import build
from latentdiff.interchange.single_file.shapes import Config, numbers


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
        ValueError: the file has none, or one that is not supported; see `build`.
    """
    classifies = kind.__name__ == "NoisyClassifier"
    if not weights.has_unet:
        raise ValueError(f"{weights.file} has no weights of the names of DDPM's and ADM's networks")
    if any(name.startswith(f"{UNET}output_blocks.") for name in weights) == classifies:
        held = "a UNet (UNet2DModel)" if classifies else "a classifier (NoisyClassifier)"
        raise ValueError(f"{weights.file} holds {held}; load it with that class")
    config = {**(classifier_config(weights) if classifies else unet2d_config(weights)), **changes}
    return build(weights, LAYOUTS["classifier" if classifies else "unet"], lambda: kind.from_config(config), dtype)


def unet2d_config(weights: AdmCheckpoint) -> Config:
    """`UNet2DModel`'s config, without its ``sample_size``.

    Raises:
        ValueError: the network is not supported.
    """
    out = numbers(weights, f"{UNET}output_blocks.")
    doubled = [name for name in weights if re.search(r"output_blocks\.\d+\.[12]\.(conv|in_layers\.0)\.weight$", name)]
    levels = len(doubled) + 1
    layers = len(out) // levels - 1
    if layers < 1:
        raise ValueError(f"{weights.file}: the network is none of DDPM's or ADM's; its levels have no blocks")
    upward = [f"{UNET}output_blocks.{i * (layers + 1)}.1.qkv.weight" in weights for i in range(levels)]
    is_resnet = any("in_layers" in name for name in doubled)
    plain = "ResnetUpsampleBlock2D" if is_resnet else "UpBlock2D"
    config = way_down(weights, levels, layers) | {
        "up_block_types": ["AttnUpBlock2D" if attends else plain for attends in upward],
        "upsample_type": "resnet" if is_resnet else "conv",
        "out_channels": weights.size(f"{UNET}out.2.weight"),
    }
    if f"{UNET}label_emb.weight" in weights:
        config["num_class_embeds"] = weights.size(f"{UNET}label_emb.weight")
    return config


def classifier_config(weights: AdmCheckpoint) -> Config:
    """`NoisyClassifier`'s config. The number of layers of a level is inferred from its attentions.

    Raises:
        ValueError: the network is not supported.
    """
    blocks = len(numbers(weights, f"{UNET}input_blocks."))
    attends = [f"{UNET}input_blocks.{i}.1.qkv.weight" in weights for i in range(blocks)]
    layers = len(next((list(run) for attention, run in groupby(attends) if attention), []))
    if not layers or blocks % (layers + 1):
        raise ValueError(f"{weights.file}: the network is none of ADM's classifiers")
    levels = blocks // (layers + 1)
    config = way_down(weights, levels, layers)
    position = f"{UNET}out.2.positional_embedding"
    if position not in weights:
        return config | {"pool": "adaptive", "num_classes": weights.size(f"{UNET}out.3.weight")}
    side = round((weights.size(position) - 1) ** 0.5)
    classes = weights.size(f"{UNET}out.2.c_proj.weight")
    return config | {"pool": "attention", "sample_size": side * 2 ** (levels - 1), "num_classes": classes}


def way_down(weights: AdmCheckpoint, levels: int, layers: int) -> Config:
    """The part of both configs that concerns the way down and the middle."""
    starts = [1 + level * (layers + 1) for level in range(levels)]
    blocks = f"{UNET}input_blocks."
    width = weights.size(f"{blocks}0.0.weight")
    if weights.size(f"{UNET}time_embed.0.weight", 1) != width:
        raise ValueError(
            f"{weights.file}: the time's sinusoids are {weights.size(f'{UNET}time_embed.0.weight', 1)} wide and the "
            f"first level {width}; diffusers' classes, and ours, have one number for both"
        )
    channels = [weights.size(f"{blocks}{start}.0.out_layers.3.weight") for start in starts]
    attends = [f"{blocks}{start}.1.qkv.weight" in weights for start in starts]
    is_resnet = levels > 1 and f"{blocks}{starts[1] - 1}.0.op.weight" not in weights
    plain = "ResnetDownsampleBlock2D" if is_resnet else "DownBlock2D"
    shifts = weights.size(f"{blocks}1.0.emb_layers.1.weight") == 2 * channels[0]
    there = {width for width, attention in zip(channels, [*attends[:-1], True], strict=True) if attention}
    heads = {width: width // weights.heads_of(width) for width in there}
    return {
        "in_channels": weights.size(f"{blocks}0.0.weight", 1),
        "down_block_types": ["AttnDownBlock2D" if attention else plain for attention in attends],
        "block_out_channels": channels,
        "layers_per_block": layers,
        "downsample_type": "resnet" if is_resnet else "conv",
        "attention_head_dim": weights.head_channels or [heads.get(width, width) for width in channels],
        "attn_norm_num_groups": 32,
        "resnet_time_scale_shift": "scale_shift" if shifts else "default",
    }
