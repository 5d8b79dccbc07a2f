"""What conditions a network besides latents and time, as one object, and what makes it of prompts.

Text states, a pooled embedding, class labels, further input channels: all have a batch dimension, so that selecting,
repeating and joining batches is written once, here, and callers pass it on without knowing its content.
"""

import difflib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

LISTED = 20  # classes in a message


@dataclass(frozen=True)
class Conditioning:
    """The conditions of B images; None where the network takes none of the kind."""

    states: Tensor | None = None
    """(B, L, D), of a text encoder, or of whatever else cross-attention reads."""
    mask: Tensor | None = None
    """(B, L), true or 1 where a state counts."""
    pooled: Tensor | None = None
    """(B, D'), one vector for the whole prompt."""
    time_ids: Tensor | None = None
    """(B, N), numbers embedded as timesteps are: SDXL's sizes and crops."""
    sizes: Tensor | None = None
    """(B, 3), height and width in pixels and their ratio, for PixArt."""
    labels: Tensor | None = None
    """(B,) long, classes; or (B,) or (B, D) for networks that embed other labels, such as a noise level."""
    guidance: Tensor | None = None
    """(B, D), an embedded guidance scale, for networks that were distilled from guided ones (LCM)."""
    channels: Tensor | None = None
    """(B, C', h, w), input channels after the latents': a mask, a small picture."""

    @property
    def batch_size(self) -> int | None:
        """B; None if there are no conditions."""
        return next((len(tensor) for _, tensor in self.items()), None)

    def items(self) -> list[tuple[str, Tensor]]:
        """The conditions that there are, by name."""
        named = [(field.name, getattr(self, field.name)) for field in fields(self)]
        return [(name, tensor) for name, tensor in named if tensor is not None]

    def replace(self, **changes: Tensor | None) -> Self:
        """A copy with other conditions in place of some."""
        return replace(self, **changes)

    def select(self, index: slice | Tensor) -> Self:
        """The entries at `index`: a slice, or a tensor of whole numbers or of truth values."""
        return self._map(lambda tensor: tensor[index])

    def repeat(self, times: int) -> Self:
        """Every entry `times` times in a row, for several images of one prompt."""
        return self._map(lambda tensor: tensor.repeat_interleave(times, dim=0))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None, **options: Any) -> Self:
        """On another device, and what is of floating point in another precision; ``options`` are ``Tensor.to``'s."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, dtype if tensor.is_floating_point() else None, **options)

        return self._map(move)

    @classmethod
    def cat(cls, parts: Sequence["Conditioning"]) -> "Conditioning":
        """One batch after the other. Without a mask every state counts.

        Raises:
            ValueError: a condition is in one of them and not in another, or two differ in more than the batch.
        """
        if any(part.mask is not None for part in parts):
            parts = [part._with_mask() for part in parts]
        joined: dict[str, Tensor] = {}
        for name in dict.fromkeys(name for part in parts for name, _ in part.items()):
            tensors = [getattr(part, name) for part in parts]
            if any(tensor is None for tensor in tensors):
                raise ValueError(f"conditions cannot be joined: only some of them have {name}")
            shapes = [tuple(tensor.shape[1:]) for tensor in tensors]
            if len(set(shapes)) > 1:
                raise ValueError(f"conditions cannot be joined: their {name} have the shapes {shapes} for each entry")
            joined[name] = torch.cat(tensors)
        return cls(**joined)

    def arguments(self) -> dict[str, Any]:
        """As arguments of diffusers' UNets, but for `channels`, which belong to the sample."""
        names = {
            "states": "encoder_hidden_states",
            "mask": "encoder_attention_mask",
            "labels": "class_labels",
            "guidance": "timestep_cond",
        }
        arguments: dict[str, Any] = {names[name]: tensor for name, tensor in self.items() if name in names}
        added = {"text_embeds": self.pooled, "time_ids": self.time_ids}
        if self.sizes is not None:
            added |= {"resolution": self.sizes[:, :2], "aspect_ratio": self.sizes[:, 2:]}
        added = {name: tensor for name, tensor in added.items() if tensor is not None}
        return {**arguments, "added_cond_kwargs": added} if added else arguments

    def _map(self, change: Callable[[Tensor], Tensor]) -> Self:
        return type(self)(**{name: change(tensor) for name, tensor in self.items()})

    def _with_mask(self) -> "Conditioning":
        if self.mask is not None or self.states is None:
            return self
        return self.replace(mask=torch.ones(self.states.shape[:2], dtype=torch.bool, device=self.states.device))


@dataclass(frozen=True)
class GuidedConditioning:
    """What to draw and, with classifier-free guidance, what to keep away from. Here both are joined and split."""

    positive: Conditioning
    negative: Conditioning | None = None
    """Of as many images."""

    @property
    def joint(self) -> Conditioning:
        """Both in one batch, the negative one first; without guidance the positive one alone."""
        return self.positive if self.negative is None else Conditioning.cat([self.negative, self.positive])

    def split(self, joint: Tensor) -> tuple[Tensor | None, Tensor]:
        """Negative and positive part of a tensor as `joint` has it, or of one that has the positive part alone."""
        count = self.positive.batch_size
        if self.negative is None or len(joint) == count:
            return None, joint
        negative, positive = joint.chunk(2)
        return negative, positive

    def with_joint_states(self, states: Tensor) -> "GuidedConditioning":
        """With other text states, of both parts (2B, L, D) or, to go on without guidance, of the positive one."""
        negative, positive = self.split(states)
        rest = None if negative is None or self.negative is None else self.negative.replace(states=negative)
        return GuidedConditioning(self.positive.replace(states=positive), rest)

    def replace(self, **changes: Tensor | None) -> "GuidedConditioning":
        """With the same conditions (B, ...) in both parts in place of some."""
        return self._map(lambda part: part.replace(**changes))

    def repeat(self, times: int) -> "GuidedConditioning":
        """Every entry `times` times in a row."""
        return self._map(lambda part: part.repeat(times))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "GuidedConditioning":
        """See `Conditioning.to`."""
        return self._map(lambda part: part.to(device, dtype))

    def _map(self, change: Callable[[Conditioning], Conditioning]) -> "GuidedConditioning":
        return GuidedConditioning(change(self.positive), None if self.negative is None else change(self.negative))


class NoConditioner:
    """For networks without conditions."""

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        return Conditioning()


def other_classes(wanted: str, names: Collection[str]) -> str:
    """What to say of the classes there are where `wanted` is none: the nearest, and all if they are few.

    names: a class may have several, with commas between them.
    """
    single = {name.strip().lower(): name.strip() for own in names for name in own.split(",")}
    near = difflib.get_close_matches(wanted.lower()[:100], single, n=1 if len(names) <= LISTED else 3)
    hint = f"did you mean {' or '.join(repr(single[name]) for name in near)}? There are" if near else "there are"
    if len(names) <= LISTED:
        return f"{hint} {', '.join(sorted(names))}"
    return f"{hint} {len(names):,} classes" + ("" if near else f", such as {', '.join(sorted(names)[:3])}")


@dataclass(frozen=True)
class ClassConditioner:
    """Class names as labels. The empty name is no class.

    Args:
        none: the number of no class; by default that after the last.
    """

    numbers: Mapping[str, int]
    none: int | None = None

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        for prompt in prompts:
            if prompt and prompt not in self.numbers:
                raise ValueError(f"there is no class {prompt!r}; {other_classes(prompt, self.numbers)}")
        none = len(self.numbers) if self.none is None else self.none
        return Conditioning(labels=torch.tensor([self.numbers.get(one, none) for one in prompts]))
