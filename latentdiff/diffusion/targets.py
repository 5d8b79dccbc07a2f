"""What a network is trained to predict: the noise, the velocity or the clean picture. Pure formulas.

A noisy picture is x_t = signal x_0 + sigma eps. Every target is a linear combination of x_0 and eps, so one prediction
gives the other two. All tensors are (B, C, ...); signal and sigma are numbers or tensors that broadcast to them.
"""

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

Coefficient = Any
"""A number, or a tensor (B, 1, ...)."""


SMALLEST_SIGNAL = 1e-4  # below it x_t is noise alone and says nothing of x_0; dividing by less would give infinity


class Target(ABC):
    """The quantity that a network predicts from x_t."""

    name: str
    """As diffusers' schedulers call it, ``prediction_type``."""

    @abstractmethod
    def of(self, clean: Tensor, noise: Tensor, signal: Coefficient, sigma: Coefficient) -> Tensor:
        """The correct prediction for x_t = signal clean + sigma noise."""

    @abstractmethod
    def clean(self, noisy: Tensor, prediction: Tensor, signal: Coefficient, sigma: Coefficient) -> Tensor:
        """x_0 from a prediction."""

    @abstractmethod
    def noise(self, noisy: Tensor, prediction: Tensor, signal: Coefficient, sigma: Coefficient) -> Tensor:
        """eps from a prediction."""

    @abstractmethod
    def error_ratio(self, snr: Tensor) -> Tensor | float:
        """The squared error of the prediction for a squared error of 1 in x_0, at a signal-to-noise ratio."""

    @abstractmethod
    def per_noise(self, signal: float, sigma: float) -> float:
        """How much the prediction changes when eps changes by 1 and x_t stays; 0 where x_t is noise alone."""


class NoiseTarget(Target):
    """eps. DDPM (Ho et al. 2020), Eq. 14."""

    name = "epsilon"

    def of(self, clean: Tensor, noise: Tensor, signal: Coefficient, sigma: Coefficient) -> Tensor:
        return noise

    def clean(self, noisy: Tensor, prediction: Tensor, signal: Coefficient, sigma: Coefficient) -> Tensor:
        return (noisy - sigma * prediction) / signal  # DDPM, Eq. 15

    def noise(self, noisy: Tensor, prediction: Tensor, signal: Coefficient, sigma: Coefficient) -> Tensor:
        return prediction

    def error_ratio(self, snr: Tensor) -> Tensor | float:
        return snr

    def per_noise(self, signal: float, sigma: float) -> float:
        return 1.0


class VelocityTarget(Target):
    """v = signal eps - sigma x_0. Progressive Distillation (Salimans & Ho 2022), Sec. 4 and App. D."""

    name = "v_prediction"

    def of(self, clean: Tensor, noise: Tensor, signal: Coefficient, sigma: Coefficient) -> Tensor:
        return signal * noise - sigma * clean

    def clean(self, noisy: Tensor, prediction: Tensor, signal: Coefficient, sigma: Coefficient) -> Tensor:
        return signal * noisy - sigma * prediction

    def noise(self, noisy: Tensor, prediction: Tensor, signal: Coefficient, sigma: Coefficient) -> Tensor:
        return sigma * noisy + signal * prediction

    def error_ratio(self, snr: Tensor) -> Tensor | float:
        return snr + 1

    def per_noise(self, signal: float, sigma: float) -> float:
        return 1 / signal if signal >= SMALLEST_SIGNAL else 0.0


class CleanTarget(Target):
    """x_0 itself."""

    name = "sample"

    def of(self, clean: Tensor, noise: Tensor, signal: Coefficient, sigma: Coefficient) -> Tensor:
        return clean

    def clean(self, noisy: Tensor, prediction: Tensor, signal: Coefficient, sigma: Coefficient) -> Tensor:
        return prediction

    def noise(self, noisy: Tensor, prediction: Tensor, signal: Coefficient, sigma: Coefficient) -> Tensor:
        return (noisy - signal * prediction) / sigma

    def error_ratio(self, snr: Tensor) -> Tensor | float:
        return 1.0

    def per_noise(self, signal: float, sigma: float) -> float:
        return -sigma / signal if signal >= SMALLEST_SIGNAL else 0.0


TARGETS: dict[str, Target] = {one.name: one for one in (NoiseTarget(), VelocityTarget(), CleanTarget())}
