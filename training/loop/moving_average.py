"""The moving average of weights, beside the trained ones."""

from collections.abc import Sequence
from typing import Any

from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from latentdiff.training.loop.checkpoints import local
from latentdiff.training.settings import RunSettings


class MovingAverage:
    """Averaged weights beside the trained ones, as the settings ask for; none with ``ema_decay=0``.

    Args:
        parameters: that are trained, on their device.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], settings: RunSettings) -> None:
        self.parameters = list(parameters)
        self._ema: EMAModel | None = None
        if settings.ema_decay > 0:
            least = 0.0 if settings.ema_warmup else settings.ema_decay
            self._ema = EMAModel(self.parameters, decay=settings.ema_decay, min_decay=least, foreach=True)
            self._ema.to(self.parameters[0].device)

    @property
    def weights(self) -> list[Tensor]:
        """The averaged weights, in the order of the parameters; empty without an average."""
        return [] if self._ema is None else self._ema.shadow_params

    @property
    def updates(self) -> int:
        """How often it was updated; a checkpoint keeps it, because the warm-up depends on it."""
        return 0 if self._ema is None else self._ema.optimization_step

    def update(self) -> None:
        """Follow the trained weights, after they have changed."""
        if self._ema is not None:
            self._ema.step(self.parameters)

    def restore(self, weights: Sequence[Tensor], updates: int) -> None:
        """Go on from the averages of a checkpoint; of one without averages, begin with the trained weights."""
        if self._ema is None:
            return
        self._ema.optimization_step = updates
        for mine, saved in zip(self.weights, weights or self.parameters, strict=True):
            if isinstance(mine, DTensor) and not isinstance(saved, DTensor):
                saved = distribute_tensor(saved.to(mine.device), mine.device_mesh, mine.placements)
            local(mine).copy_(local(saved).detach())

    def exchange(self) -> None:
        """Put the averaged weights instead of the trained ones, or back."""
        if self._ema is None:
            return
        for trained, averaged in zip(self.parameters, self.weights, strict=True):
            if isinstance(trained, DTensor):  # FSDP keeps references to the parts
                assert isinstance(averaged, DTensor)
                exchange(trained.to_local().detach(), averaged.to_local())
            else:
                trained.data, averaged.data = averaged.data, trained.data


class ScheduleFreeAverage(MovingAverage):
    """The weights that a schedule-free optimizer averages by itself (Defazio et al. 2024, Eq. 3: x).

    Training computes gradients at y = (1 - beta) z + beta x, and the optimizer keeps y and z. Its own change between y
    and x rounds at every turn; here y is kept and comes back as it was.

    Args:
        optimizer: in training mode, and stays in it.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], settings: RunSettings, optimizer: Any) -> None:
        super().__init__(parameters, settings)
        self.optimizer, self.beta = optimizer, settings.adam_beta1
        self._bases: list[Tensor | None] = []  # z; the optimizer's state is cleared before the model is saved
        self._kept: list[Tensor] | None = None

    def update(self) -> None:
        """Know the optimizer's z."""
        self._bases = [self.optimizer.state.get(parameter, {}).get("z") for parameter in self.parameters]

    def restore(self, weights: Sequence[Tensor], updates: int) -> None:
        """The optimizer was restored with all there is."""
        self.update()

    def exchange(self) -> None:
        """Put x instead of y, or back."""
        if self._kept is not None:
            for parameter, y in zip(self.parameters, self._kept, strict=True):
                local(parameter).detach().copy_(y)
            self._kept = None
            return
        self._kept = [local(parameter).detach().clone() for parameter in self.parameters]
        for parameter, z in zip(self.parameters, self._bases, strict=False):
            if z is not None:
                local(parameter).detach().lerp_(local(z), 1 - 1 / self.beta)


def average_of(parameters: Sequence[nn.Parameter], settings: RunSettings, optimizer: Any) -> MovingAverage:
    """The averaged weights beside those that `optimizer` trains."""
    if settings.optimizer == "schedulefree":
        return ScheduleFreeAverage(parameters, settings, optimizer)
    return MovingAverage(parameters, settings)


def exchange(a: Tensor, b: Tensor) -> None:
    """Exchange the contents of two tensors."""
    kept = a.clone()
    a.copy_(b)
    b.copy_(kept)
