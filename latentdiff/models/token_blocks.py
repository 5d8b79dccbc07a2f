"""What a ``TokenTransformer`` is built of: blocks, rotations by the place of a code, a cache of keys and values."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentdiff.models.layers import Attention, KeyValue, TextInput, merge_heads


class Rotations(NamedTuple):
    """Cosines and sines, (L, D/N) each, by which queries and keys are turned; two neighbours are a pair.

    The first sine of a pair has the other sign, so that swapped neighbours are all that is needed.
    """

    cosines: Tensor
    sines: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """(..., L, D/N) -> the same shape. RoFormer (Su et al. 2021), Eq. 34."""
        swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        return x * self.cosines + swapped * self.sines

    def at(self, place: int) -> "Rotations":
        return Rotations(self.cosines[place : place + 1], self.sines[place : place + 1])


def rotations(height: int, width: int, dim: int, like: Tensor) -> Rotations:
    """Of a grid in raster order: the first half of `dim` turns with the row, the rest with the column.

    dim: a multiple of 4.
    like: a tensor of the dtype and on the device of the result.
    """
    speeds = 10_000.0 ** -(torch.arange(0, dim // 2, 2, device=like.device).float() / (dim // 2))  # (dim/4,)
    rows = torch.arange(height, device=like.device).repeat_interleave(width)  # (L,)
    columns = torch.arange(width, device=like.device).repeat(height)
    angles = torch.cat([place[:, None] * speeds for place in (rows, columns)], dim=1)  # (L, dim/2)
    cosines, sines = angles.cos(), angles.sin()
    sines = torch.stack([-sines, sines], dim=-1).flatten(1)
    return Rotations(cosines.repeat_interleave(2, dim=1).to(like.dtype), sines.to(like.dtype))


class KeyValueCache:
    """Keys and values of the places so far, for each layer, in memory taken once.

    Args:
        shape: (B, N, L, D/N) of one layer's keys.
        positions: of all places, what `TokenTransformer.positions` gives.
    """

    def __init__(self, layers: int, shape: Sequence[int], like: Tensor, positions: Tensor | Rotations) -> None:
        self.memory = like.new_empty(layers, 2, *shape)
        self.positions = positions
        self.length = 0

    def add(self, layer: int, keys: Tensor, values: Tensor) -> KeyValue:
        """Keys and values (B, N, 1, D/N) of the next place -> those of all places so far, (B, N, length + 1, D/N)."""
        own = self.memory[layer]
        own[0, :, :, self.length], own[1, :, :, self.length] = keys[:, :, 0], values[:, :, 0]
        return own[0, :, :, : self.length + 1], own[1, :, :, : self.length + 1]


class TokenAttention(nn.Module):
    """Self-attention, maybe to the places before alone."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(dim, 3 * dim)
        self.to_out = nn.Linear(dim, dim)

    def forward(
        self, x: Tensor, turn: Rotations | None, causal: bool, cache: KeyValueCache | None = None, layer: int = 0
    ) -> Tensor:
        """(B, L, D) -> (B, L, D); with a cache L is 1, and the places before are in it."""
        qkv = self.to_qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (3, B, N, L, D/N)
        query, keys = qkv[:2] if turn is None else turn(qkv[:2])
        values = qkv[2]
        if cache is not None:
            keys, values, causal = *cache.add(layer, keys, values), False
        return self.to_out(merge_heads(F.scaled_dot_product_attention(query, keys, values, is_causal=causal)))


class TokenBlock(nn.Module):
    """Self-attention, cross-attention to the text if there is any, feed-forward, each beside a shortcut."""

    def __init__(self, dim: int, heads: int, text_dim: int | None) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = TokenAttention(dim, heads)
        self.norm2 = None if text_dim is None else nn.LayerNorm(dim)
        self.attn2 = None if text_dim is None else Attention(dim, heads, text_dim)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(
        self,
        x: Tensor,
        turn: Rotations | None,
        causal: bool,
        text: TextInput | None = None,
        mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        x = x + self.attn1(self.norm1(x), turn, causal, cache, layer)
        if self.attn2 is not None and self.norm2 is not None:
            x = x + self.attn2(self.norm2(x), text, mask)
        return x + self.ff(self.norm3(x))
