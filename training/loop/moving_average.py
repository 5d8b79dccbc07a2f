"""The moving average of weights, beside the trained ones."""

from collections.abc import Sequence

from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

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


def exchange(a: Tensor, b: Tensor) -> None:
    """Exchange the contents of two tensors."""
    kept = a.clone()
    a.copy_(b)
    b.copy_(kept)
