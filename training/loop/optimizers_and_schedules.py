"""How weights change: the optimizers and the learning-rate schedule."""

import importlib
import io
import math
from contextlib import redirect_stdout
from typing import Any

import torch
from torch import nn

from latentdiff.extras import how_to_install
from latentdiff.training.settings import RunSettings

LEAST_OF_POLYNOMIAL = 1e-7  # where diffusers' polynomial schedule ends


def build_optimizer(settings: RunSettings, module: nn.Module, learning_rate: float | None = None) -> Any:
    """The optimizer that the settings name, for the parameters of `module` that require a gradient.

    ``adamw`` is torch's fused AdamW; ``adamw8bit`` needs the package bitsandbytes; ``adafactor`` is that of
    transformers with the learning rate given; ``muon`` is torch's for the matrices of linear layers, with AdamW for the
    rest; ``prodigy`` and ``schedulefree`` need the packages prodigyopt and schedulefree.

    Raises:
        ValueError: there is nothing to train, or a package is needed and not installed.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError("there is nothing to train: no parameter requires a gradient")
    rate, decay = learning_rate or settings.learning_rate, settings.weight_decay
    betas = (settings.adam_beta1, settings.adam_beta2)
    common: dict[str, Any] = {"lr": rate, "betas": betas, "weight_decay": decay}
    match settings.optimizer:
        case "adamw8bit":
            try:
                from bitsandbytes.optim import AdamW8bit
            except ImportError as error:
                raise ValueError("optimizer=adamw8bit needs bitsandbytes: pip install bitsandbytes") from error
            return AdamW8bit(parameters, **common)
        case "adafactor":
            from transformers import Adafactor

            return Adafactor(parameters, lr=rate, weight_decay=decay, scale_parameter=False, relative_step=False)
        case "sgd":
            return torch.optim.SGD(parameters, lr=rate, weight_decay=decay, momentum=settings.adam_beta1, fused=True)
        case "muon":
            return muon(module, common)
        case "prodigy":
            prodigy = needed("prodigyopt", "prodigy").Prodigy
            with redirect_stdout(io.StringIO()):  # it prints that weights decay
                return prodigy(parameters, **common, use_bias_correction=True, safeguard_warmup=True)
        case "schedulefree":
            free = needed("schedulefree", "schedulefree").AdamWScheduleFree(parameters, **common)
            free.train()  # for good: `ScheduleFreeAverage` has the weights to draw with
            return free
    return torch.optim.AdamW(parameters, **common, fused=True)


def needed(package: str, optimizer: str) -> Any:
    """A package that an optimizer needs. Raises ValueError if it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(f"optimizer={optimizer} needs {package}: {how_to_install('optimizers')}") from error


def muon(module: nn.Module, common: dict[str, Any]) -> "Joined":
    """Muon (Jordan et al. 2024) for the matrices of linear layers, AdamW for the rest.

    Muon's steps are scaled to the size of AdamW's (Liu et al. 2025, Sec. 2.2), so that both take one learning rate.
    """
    linear = {id(layer.weight) for layer in module.modules() if isinstance(layer, nn.Linear)}
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in parameters if id(parameter) in linear and parameter.ndim == 2]
    rest = [parameter for parameter in parameters if not any(parameter is matrix for matrix in matrices)]
    parts: list[torch.optim.Optimizer] = []
    if matrices:
        given = {"lr": common["lr"], "weight_decay": common["weight_decay"]}
        parts.append(torch.optim.Muon(matrices, **given, adjust_lr_fn="match_rms_adamw"))
    if rest:
        parts.append(torch.optim.AdamW(rest, **common, fused=True))
    return Joined(*parts)


class Joined(torch.optim.Optimizer):
    """Several optimizers as one, which has the groups and the state of all; each has parameters of its own."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let every part work on its groups here, and on the one state."""
        first = 0
        for part in self.parts:
            last = first + len(part.param_groups)
            part.param_groups, part.state = self.param_groups[first:last], self.state
            first = last

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As every optimizer; groups and state are then others."""
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of each part."""
        for part in self.parts:
            part.step()


def learning_rate_at(settings: RunSettings, step: int) -> float:
    """Linear warm-up, then what `lr_scheduler` says; without one constant, and a fall over the last `decay_steps`.

    step: optimizer steps, from 0.
    """
    warmup = min(1.0, (step + 1) / max(settings.warmup_steps, 1))
    if settings.lr_scheduler is not None:
        return settings.learning_rate * (warmup if step < settings.warmup_steps else share_after_warmup(settings, step))
    left = min(1.0, max(0.0, (settings.max_steps - step) / settings.decay_steps)) if settings.decay_steps else 1.0
    decay = left if settings.decay_shape == "linear" else 0.5 - 0.5 * math.cos(math.pi * left)
    return settings.learning_rate * warmup * decay


def share_after_warmup(settings: RunSettings, step: int) -> float:
    """The share of the learning rate by the schedule of diffusers' ``get_scheduler`` of that name."""
    whole = settings.max_steps - settings.warmup_steps
    progress = min(1.0, (step - settings.warmup_steps) / max(whole, 1))
    match settings.lr_scheduler:
        case "linear":
            return 1 - progress
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        case "cosine_with_restarts":
            return 0.5 * (1 + math.cos(math.pi * (settings.lr_num_cycles * progress % 1))) if progress < 1 else 0.0
        case "polynomial":
            least = LEAST_OF_POLYNOMIAL / settings.learning_rate
            return least + (1 - least) * (1 - progress) ** settings.lr_power
    return 1.0  # constant, constant_with_warmup
