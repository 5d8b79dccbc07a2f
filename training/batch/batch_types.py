"""What a training pass learns from, as typed batches of tensors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from latentdiff.conditioning import Conditioning
from latentdiff.diffusion.process import Clock


class NamedBatch(Protocol):
    """A batch that knows its pictures' names, for messages."""

    @property
    def names(self) -> Sequence[str]: ...


@dataclass(frozen=True)
class Batch:
    """Fields of B entries each: tensors, tuples, and other batches. Plain values hold for all entries."""

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """Several as one; plain values are the first's."""
        names = [field.name for field in fields(cls)]
        return cls(**{name: joined([getattr(part, name) for part in parts]) for name in names})

    def to(self, device: torch.device) -> Self:
        """With its tensors, also those of batches in it, on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        """In memory from which a GPU copies faster; a data loader calls it."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Self:
        changed: dict[str, Any] = {}
        for field in fields(self):
            match getattr(self, field.name):
                case Tensor() as tensor:
                    changed[field.name] = change(tensor)
                case Batch() | Conditioning() as inner:  # text states are the largest part
                    changed[field.name] = inner._map(change)
        return replace(self, **changed)


def joined(values: Sequence[Any]) -> Any:
    """The values of one field in several batches, as one."""
    match values[0]:
        case Tensor():
            return torch.cat(list(values))
        case tuple():
            return tuple(entry for value in values for entry in value)
        case Batch() | Conditioning():
            return type(values[0]).cat(values)
    return values[0]


@dataclass(frozen=True)
class Tokens(Batch):
    """Captions as a text encoder reads them, where the encoder is trained.

    Args:
        input_ids: (B, L) long.
        attention_mask: (B, L) long, where the encoder uses one.
        second: (B, L) long, as a second encoder reads them.
        empty: (B,) bool, where zeros stand for what the encoders would make of no caption.
        time_ids: (B, 6) float32, see `SampleBatch`.
    """

    input_ids: Tensor
    attention_mask: Tensor | None = None
    second: Tensor | None = None
    empty: Tensor | None = None
    time_ids: Tensor | None = None


@dataclass(frozen=True)
class Captions(Batch):
    """Captions themselves, which a frozen text encoder reads batch by batch where there is no cache."""

    texts: tuple[str, ...]


ReadCaptions = Conditioning | Tokens | Captions
"""What a data loader's worker makes of captions."""


@dataclass(frozen=True)
class SampleBatch(Batch):
    """What a data loader's workers read of pictures, for the training process to make a `DiffusionBatch` of.

    Args:
        pictures: what the source of latents reads: (B, S, C, h, w) moments, or (B, 3, H, W) pixels.
        captions: what the source of conditions reads.
        posterior_noise, noise: (B, C, h, w); from the first the latents are drawn, the second is mixed into them.
        draws: (B,) float64, uniform in [0, 1), from which the process or a sampler takes the timesteps.
        loss_weight: (B,) float32.
        time_ids: (B, 6) float32, what SDXL is told of the pictures' sizes, see `View.told`.
        mask: (B, 1, h, w) in [0, 1], what of each picture the loss looks at; None: at all of it.
    """

    pictures: Tensor
    captions: ReadCaptions
    posterior_noise: Tensor
    noise: Tensor
    draws: Tensor
    loss_weight: Tensor
    names: tuple[str, ...]
    time_ids: Tensor | None = None
    mask: Tensor | None = None


@dataclass(frozen=True)
class DiffusionBatch:
    """What the objectives of denoisers and classifiers take.

    Args:
        latents, noise: (B, C, h, w) float32, on the device; clean scaled latents, and what is mixed into them.
        draws: (B,) float64, on the CPU; uniform in [0, 1), from which the process takes times.
        condition: what the network is given of the captions, or their tokens.
        loss_weight: (B,) float32, on the device.
        names: of the pictures.
        mask: (B, 1, h, w) float32 in [0, 1], on the device: the weight of each place in a picture's loss.
    """

    latents: Tensor
    noise: Tensor
    draws: Tensor
    condition: Conditioning | Tokens
    loss_weight: Tensor
    names: tuple[str, ...] = ()
    mask: Tensor | None = None

    def masked(self) -> dict[str, Tensor]:
        """The mask as an argument of a process's losses, where there is one."""
        return {} if self.mask is None else {"mask": self.mask}

    def times(self, process: Clock, held_out: bool = False) -> Tensor:
        """The process's times for the draws, (B,), on the device of the latents; or those of a held-out loss."""
        times = process.held_out_times(self.draws) if held_out else process.times(self.draws)
        dtype = torch.float32 if times.is_floating_point() else None
        return times.to(self.latents.device, dtype, non_blocking=True)


@dataclass(frozen=True)
class PixelBatch(Batch):
    """What the objective of an autoencoder takes.

    Args:
        pixels: (B, 3, H, W) in [-1, 1].
        seeds: of the noise by which each picture's latents are drawn from the posterior; none: torch's generator.
        step: optimizer steps so far.
        names: of the pictures.
    """

    pixels: Tensor
    seeds: tuple[int, ...] = ()
    step: int = 0
    names: tuple[str, ...] = ()

    def generators(self) -> list[torch.Generator] | None:
        """New generators, one for each picture."""
        return [torch.Generator().manual_seed(seed) for seed in self.seeds] or None
