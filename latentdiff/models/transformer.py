"""The UNet's transformer over the positions of a feature map: self-attention, cross-attention to the text, GEGLU.

Latent Diffusion (Rombach et al. 2022), Sec. 3.3 and Appendix E.2.1.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentdiff.models.layers import Checkpointed, merge_heads, split_heads, to_grid, to_tokens
from latentdiff.models.text_context import KeyValue, Text, TextInput


class Attention(nn.Module):
    """Multi-head attention whose keys and values are made by a call of their own, so they can be made beforehand.

    ``scaled_dot_product_attention`` sums and normalises the scores of half-precision inputs in float32. That is what
    the config's ``upcast_attention`` asks for, so the flag changes nothing here.
    """

    def __init__(self, dim: int, heads: int, context_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.heads_at_once: int | None = None
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def keys_values(self, context: Tensor) -> KeyValue:
        """(B, L, context_dim) -> keys and values, (B, N, L, D/N) each."""
        return split_heads(self.to_k(context), self.heads), split_heads(self.to_v(context), self.heads)

    def forward(self, tokens: Tensor, context: TextInput, mask: Tensor | None = None) -> Tensor:
        """(B, L', D) and L keys and values, or the states (B, L, context_dim) to make them of -> (B, L', D).

        ``mask`` (B, 1, 1, L) is added to the scores.
        """
        query = split_heads(self.to_q(tokens), self.heads)  # (B, N, L', D/N)
        keys, values = self.keys_values(context) if isinstance(context, Tensor) else context
        if self.heads_at_once is None:
            attended = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
        else:
            parts = zip(*(x.split(self.heads_at_once, dim=1) for x in (query, keys, values)), strict=True)
            attended = torch.cat([F.scaled_dot_product_attention(q, k, v, attn_mask=mask) for q, k, v in parts], dim=1)
        return self.to_out[0](merge_heads(attended))


class GEGLU(nn.Module):
    """GLU Variants Improve Transformer (Shazeer 2020), Eq. 6."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 2 * out_dim)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    """(B, L, D) -> (B, L, 4D) -> (B, L, D)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        # diffusers has a dropout between the two; the Identity keeps the parameters' names
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward, each beside a shortcut.

    ``only_cross``: the first attention is a cross-attention too, with keys and values of its own.
    """

    def __init__(self, dim: int, heads: int, text_dim: int, only_cross: bool = False) -> None:
        super().__init__()
        self.only_cross = only_cross
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, heads, context_dim=text_dim if only_cross else dim)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, heads, context_dim=text_dim)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    @property
    def cross_attentions(self) -> list[Attention]:
        """In the order in which they run."""
        return [self.attn1, self.attn2] if self.only_cross else [self.attn2]

    def forward(self, x: Tensor, text: Sequence[TextInput], mask: Tensor | None = None) -> Tensor:
        """(B, HW, D) -> (B, HW, D). ``text``: the input of each of `cross_attentions`."""
        h = self.norm1(x)
        x = x + self.attn1(h, text[0] if self.only_cross else h)
        x = x + self.attn2(self.norm2(x), text[-1], mask)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(Checkpointed):
    """Feature map to tokens, ``depth`` transformer blocks, and back, beside a shortcut.

    ``linear`` projects the tokens (Stable Diffusion 2), otherwise 1x1 convolutions project the map (1.x).

    Attributes:
        first: number of its first cross-attention among all of the UNet; the UNet sets it.
    """

    def __init__(
        self, channels: int, *, heads: int, depth: int, text_dim: int, groups: int, linear: bool, only_cross: bool
    ) -> None:
        super().__init__()
        self.linear = linear
        self.first = 0
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(channels, heads, text_dim, only_cross) for _ in range(depth)
        )
        self.proj_out = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)

    @property
    def cross_attentions(self) -> list[Attention]:
        """In the order in which they run."""
        blocks: list[Any] = list(self.transformer_blocks)
        return [attention for block in blocks for attention in block.cross_attentions]

    def forward(self, x: Tensor, text: Text) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        height, width = x.shape[-2:]
        h = self.norm(x)
        tokens = self.proj_in(to_tokens(h)) if self.linear else to_tokens(self.proj_in(h))  # (B, HW, C)
        number = self.first
        for block in self.transformer_blocks:
            count = 2 if block.only_cross else 1
            tokens = self.run(block, tokens, [text.at(number + i) for i in range(count)], text.mask)
            number += count
        if self.linear:
            return x + to_grid(self.proj_out(tokens), height, width)
        return x + self.proj_out(to_grid(tokens, height, width))
