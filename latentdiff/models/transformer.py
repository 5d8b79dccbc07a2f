"""The UNet's transformer over the positions of a feature map: self-attention, cross-attention to the text, GEGLU.

Latent Diffusion (Rombach et al. 2022), Sec. 3.3 and Appendix E.2.1. A prompt reaches its cross-attentions as text
states, or as keys and values made of them beforehand.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentdiff.models.layers import Attention, Checkpointed, KeyValue, TextInput, to_grid, to_tokens


class TextStates(NamedTuple):
    """Text states, of which every cross-attention makes its keys and values when it runs."""

    states: Tensor
    """(B, L, D)"""
    mask: Tensor | None = None
    """(B, 1, 1, L), added to the attention scores; None if every token counts."""
    added: Tensor | None = None
    """(B, D), to be added to the time embedding: what SDXL makes of the pooled embedding and of the sizes."""

    def at(self, attention: int) -> Tensor:
        """The input of the cross-attention of that number: the same for all."""
        return self.states


class TextContext(NamedTuple):
    """Keys and values of all cross-attentions, in the order in which the UNet runs them, made once per prompt.

    ``UNet2DConditionModel.encode_text`` makes it. Batches are put together and taken apart by the methods.
    """

    keys_values: tuple[KeyValue, ...]
    mask: Tensor | None = None
    """(B, 1, 1, L), added to the attention scores; None if every token counts."""
    added: Tensor | None = None
    """(B, D), to be added to the time embedding: what SDXL makes of the pooled embedding and of the sizes."""

    def at(self, attention: int) -> KeyValue:
        """The input of the cross-attention of that number."""
        return self.keys_values[attention]

    @property
    def batch_size(self) -> int:
        return self.keys_values[0][0].shape[0] if self.keys_values else 0

    @classmethod
    def concatenate(cls, contexts: Sequence["TextContext"]) -> "TextContext":
        """One batch after the other, such as [unconditional, conditional] for guidance; L must be the same."""
        pairs = zip(*(context.keys_values for context in contexts), strict=True)
        keys_values = tuple((torch.cat([k for k, _ in p]), torch.cat([v for _, v in p])) for p in map(list, pairs))
        parts = [context.added for context in contexts if context.added is not None]
        added = torch.cat(parts) if parts else None
        if all(context.mask is None for context in contexts):
            return cls(keys_values, None, added)
        keys = keys_values[0][0]
        zeros = (keys.new_zeros(context.batch_size, 1, 1, keys.shape[2]) for context in contexts)
        masks = [zero if c.mask is None else c.mask for c, zero in zip(contexts, zeros, strict=True)]
        return cls(keys_values, torch.cat(masks), added)

    def select(self, index: slice | Tensor) -> "TextContext":
        """The batch's entries at ``index``: a slice, or a tensor of whole numbers or of truth values."""
        return self._map(lambda tensor: tensor[index])

    def repeat(self, times: int) -> "TextContext":
        """Every entry ``times`` times in a row, for several images of one prompt."""
        return self._map(lambda tensor: tensor.repeat_interleave(times, dim=0))

    def to(self, *args: Any, **kwargs: Any) -> "TextContext":
        """To another device or dtype, as ``Tensor.to``."""
        return self._map(lambda tensor: tensor.to(*args, **kwargs))

    def _map(self, change: Callable[[Tensor], Tensor]) -> "TextContext":
        keys_values = tuple((change(k), change(v)) for k, v in self.keys_values)
        mask, added = (None if tensor is None else change(tensor) for tensor in (self.mask, self.added))
        return TextContext(keys_values, mask, added)


Text = TextStates | TextContext
"""What the blocks of a UNet with cross-attention pass on."""


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
        self.attn1 = Attention(dim, heads, text_dim if only_cross else None)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, heads, text_dim)
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

    Args:
        width: of the tokens, a multiple of `heads`.

    Attributes:
        first: number of its first cross-attention among all of the UNet; the UNet sets it.
    """

    def __init__(
        self,
        channels: int,
        *,
        heads: int,
        width: int,
        depth: int,
        text_dim: int,
        groups: int,
        linear: bool,
        only_cross: bool,
    ) -> None:
        super().__init__()
        self.linear = linear
        self.first = 0
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, width) if linear else nn.Conv2d(channels, width, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(width, heads, text_dim, only_cross) for _ in range(depth)
        )
        self.proj_out = nn.Linear(width, channels) if linear else nn.Conv2d(width, channels, 1)

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
