"""A prompt as the UNet's cross-attentions receive it: as text states, or as keys and values made of them beforehand."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

KeyValue = tuple[Tensor, Tensor]
"""Keys and values of one attention, (B, N, L, D/N) each: N heads, L text tokens."""
TextInput = KeyValue | Tensor
"""What one cross-attention takes: keys and values made beforehand, or text states (B, L, D) to make them of."""


class TextStates(NamedTuple):
    """Text states, of which every cross-attention makes its keys and values when it runs."""

    states: Tensor
    """(B, L, D)"""
    mask: Tensor | None = None
    """(B, 1, 1, L), added to the attention scores; None if every token counts."""

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
        if all(context.mask is None for context in contexts):
            return cls(keys_values)
        return cls(keys_values, torch.cat([context._dense_mask() for context in contexts]))

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
        return TextContext(keys_values, None if self.mask is None else change(self.mask))

    def _dense_mask(self) -> Tensor:
        if self.mask is not None:
            return self.mask
        keys = self.keys_values[0][0]
        return keys.new_zeros(keys.shape[0], 1, 1, keys.shape[2])


Text = TextStates | TextContext
"""What the blocks of a UNet with cross-attention pass on."""
