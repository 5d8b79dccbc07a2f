"""What a training pass learns from, as typed batches of tensors."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from latentdiff.conditioning import Conditioning
from latentdiff.diffusion.process import Process


class NamedBatch(Protocol):
    """A batch that knows its pictures' names, for messages."""

    @property
    def names(self) -> Sequence[str]: ...


@dataclass(frozen=True)
class Tokens:
    """Captions as a text encoder reads them, where the encoder is trained.

    Args:
        input_ids: (B, L) long.
        attention_mask: (B, L) long, where the encoder uses one.
    """

    input_ids: Tensor
    attention_mask: Tensor | None = None

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        masks = [part.attention_mask for part in parts if part.attention_mask is not None]
        return cls(torch.cat([part.input_ids for part in parts]), torch.cat(masks) if masks else None)

    def to(self, device: torch.device) -> Self:
        mask = None if self.attention_mask is None else self.attention_mask.to(device)
        return replace(self, input_ids=self.input_ids.to(device), attention_mask=mask)


@dataclass(frozen=True)
class Captions:
    """Captions themselves, which a frozen text encoder reads batch by batch where there is no cache."""

    texts: tuple[str, ...]

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        return cls(tuple(text for part in parts for text in part.texts))


ReadCaptions = Conditioning | Tokens | Captions
"""What a data loader's worker makes of captions."""


@dataclass(frozen=True)
class DiffusionSample:
    """A picture's turn in training, as a data loader's worker reads it.

    Args:
        picture: what the source of latents reads: (S, C, h, w) moments, or (3, H, W) pixels.
        caption: what the source of conditioning reads, a batch of one.
        posterior_noise, noise: (C, h, w); from the first the latents are drawn, the second is mixed into them.
        draw: uniform in [0, 1), from which the process or a sampler takes the timestep.
        loss_weight: of this picture.
    """

    picture: Tensor
    caption: ReadCaptions
    posterior_noise: Tensor
    noise: Tensor
    draw: float
    loss_weight: float
    name: str


@dataclass(frozen=True)
class SampleBatch:
    """Samples with a batch dimension B; the fields are those of `DiffusionSample`, draws float64."""

    pictures: Tensor
    captions: ReadCaptions
    posterior_noise: Tensor
    noise: Tensor
    draws: Tensor
    loss_weight: Tensor
    names: tuple[str, ...]

    @classmethod
    def stack(cls, samples: Sequence[DiffusionSample]) -> Self:
        kind: Any = type(samples[0].caption)
        return cls(
            torch.stack([sample.picture for sample in samples]),
            kind.cat([sample.caption for sample in samples]),
            torch.stack([sample.posterior_noise for sample in samples]),
            torch.stack([sample.noise for sample in samples]),
            torch.tensor([sample.draw for sample in samples], dtype=torch.float64),
            torch.tensor([sample.loss_weight for sample in samples]),
            tuple(sample.name for sample in samples),
        )

    def pin_memory(self) -> Self:
        """In memory from which a GPU copies faster; a data loader calls it."""
        return replace(
            self,
            pictures=self.pictures.pin_memory(),
            posterior_noise=self.posterior_noise.pin_memory(),
            noise=self.noise.pin_memory(),
            loss_weight=self.loss_weight.pin_memory(),
        )


@dataclass(frozen=True)
class DiffusionBatch:
    """What the objectives of denoisers and classifiers take.

    Args:
        latents, noise: (B, C, h, w) float32, on the device; clean scaled latents, and what is mixed into them.
        draws: (B,) float64, on the CPU; uniform in [0, 1), from which the process takes times.
        condition: what the network is given of the captions, or their tokens.
        loss_weight: (B,) float32, on the device.
        names: of the pictures.
    """

    latents: Tensor
    noise: Tensor
    draws: Tensor
    condition: Conditioning | Tokens
    loss_weight: Tensor
    names: tuple[str, ...] = ()

    def times(self, process: Process) -> Tensor:
        """The process's times for the draws, (B,), on the device of the latents."""
        times = process.times(self.draws)
        return times.to(self.latents.device, torch.float32 if times.is_floating_point() else None)


@dataclass(frozen=True)
class PixelBatch:
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

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """Several of one step as one batch."""
        pixels = torch.cat([part.pixels for part in parts])
        seeds = tuple(seed for part in parts for seed in part.seeds)
        return cls(pixels, seeds, parts[0].step, tuple(name for part in parts for name in part.names))

    def generators(self) -> list[torch.Generator] | None:
        """New generators, one for each picture."""
        return [torch.Generator().manual_seed(seed) for seed in self.seeds] or None

    def to(self, device: torch.device) -> Self:
        return replace(self, pixels=self.pixels.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        """In memory from which a GPU copies faster; a data loader calls it."""
        return replace(self, pixels=self.pixels.pin_memory())
