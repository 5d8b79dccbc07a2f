"""How weights change: the optimizers, the learning-rate schedule, and the moving average."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from latentdiff.training.loop.checkpoints import local
from latentdiff.training.settings import RunSettings


def build_optimizer(
    settings: RunSettings, parameters: Sequence[nn.Parameter], learning_rate: float | None = None
) -> Any:
    """The optimizer that the settings name, for `parameters`.

    ``adamw`` is torch's fused AdamW; ``adamw8bit`` needs the package bitsandbytes; ``adafactor`` is that of
    transformers with the learning rate given.

    Raises:
        ValueError: there is nothing to train, or bitsandbytes is needed and not installed.
    """
    if not parameters:
        raise ValueError("there is nothing to train: no parameter requires a gradient")
    rate, decay = learning_rate or settings.learning_rate, settings.weight_decay
    betas = (settings.adam_beta1, settings.adam_beta2)
    match settings.optimizer:
        case "adamw8bit":
            try:
                from bitsandbytes.optim import AdamW8bit
            except ImportError as error:
                raise ValueError("optimizer=adamw8bit needs bitsandbytes: pip install bitsandbytes") from error
            return AdamW8bit(parameters, lr=rate, betas=betas, weight_decay=decay)
        case "adafactor":
            from transformers import Adafactor

            return Adafactor(parameters, lr=rate, weight_decay=decay, scale_parameter=False, relative_step=False)
        case "sgd":
            return torch.optim.SGD(parameters, lr=rate, weight_decay=decay, momentum=settings.adam_beta1, fused=True)
    return torch.optim.AdamW(parameters, lr=rate, betas=betas, weight_decay=decay, fused=True)


def learning_rate_at(settings: RunSettings, step: int) -> float:
    """Linear warm-up, constant, then a fall to zero over the last `decay_steps`. step: optimizer steps, from 0."""
    warmup = min(1.0, (step + 1) / max(settings.warmup_steps, 1))
    left = min(1.0, max(0.0, (settings.max_steps - step) / settings.decay_steps)) if settings.decay_steps else 1.0
    decay = left if settings.decay_shape == "linear" else 0.5 - 0.5 * math.cos(math.pi * left)
    return settings.learning_rate * warmup * decay


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
