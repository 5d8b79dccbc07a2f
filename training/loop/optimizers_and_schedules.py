"""How weights change: the optimizers and the learning-rate schedule."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

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
