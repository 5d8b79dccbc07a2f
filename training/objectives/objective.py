"""The contract of what a network is trained for."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Generic, NamedTuple, TypeVar

from torch import Tensor, nn

Batch = TypeVar("Batch")


class RealAndFake(NamedTuple):
    """What an adversary compares: pictures (B, 3, H, W), or features of several layers; `fake` has no gradient."""

    real: Any
    fake: Any


class Result(NamedTuple):
    """What an objective returns of a batch. (A tuple, because FSDP looks for tensors in tuples only.)

    Args:
        loss: scalar float32, to be minimised.
        watched: scalar without gradient: the loss that is recorded, and that must not explode. It differs from `loss`
            where a part of `loss` may pass through zero.
        figures: what else is recorded, by name; scalars, or of held-out batches (B,), one for each picture.
        for_adversary: what the adversary takes; None where there is none, or it does not take part yet.
    """

    loss: Tensor
    watched: Tensor
    figures: Mapping[str, Tensor]
    for_adversary: RealAndFake | None = None


class Objective(nn.Module, ABC, Generic[Batch]):
    """A loss with the networks that minimise it: the module that a `TrainingRun` trains.

    Its parameters that require a gradient are trained, averaged and kept in checkpoints, its buffers kept too.

    Attributes:
        takes_latents: whether it looks at the pictures, and not at their captions alone.
    """

    takes_latents = True

    @property
    def _no_split_modules(self) -> list[str]:
        """Names of the layers in it that FSDP spreads one by one; Accelerate asks for them."""
        inside = list(self.modules())[1:]
        wanted = {name for module in inside for name in getattr(module, "_no_split_modules", None) or ()}
        return sorted(wanted & {type(module).__name__ for module in inside})

    def forward(self, batch: Batch, held_out: bool = False) -> Result:
        """`training_loss`, or with `held_out` `held_out_loss`: wrappers of several processes pass only this on."""
        return self.held_out_loss(batch) if held_out else self.training_loss(batch)

    @abstractmethod
    def training_loss(self, batch: Batch) -> Result:
        """The loss of a batch that is trained on."""

    def held_out_loss(self, batch: Batch) -> Result:
        """Losses by which runs can be compared: figures (B,) of each picture, without any weight of training's."""
        raise NotImplementedError(f"{type(self).__name__} has no held-out loss")

    def batch_of(self, update: int) -> int:
        """Which batch in the order of the data an update learns from: by default each from one of its own."""
        return update

    def relative_time(self, update: int) -> float:
        """How long an update takes, about, in terms of the mean one."""
        return 1.0

    def after_update(self, made: bool) -> None:
        """Called after every update; `made` is False where it was left out because of a bad loss."""

    def recent_figures(self) -> dict[str, float]:
        """Further figures to be recorded, of the updates before."""
        return {}
