"""The contract of a diffusion process: what a network is asked for, how noise is mixed in; and which ones there are.

Trainers, pipelines, previews, guidance and likelihoods ask the process; none of them asks what is predicted. A process
of your own is a subclass in a file of its own, made known by `register_process`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

Coefficient = Any
"""A number, or a tensor (B, 1, ...)."""

SMALLEST_SIGNAL = 1e-4  # below it x_t is noise alone and says nothing of x_0; dividing by less would give infinity


def per_picture(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean of everything but the batch, (B,).

    Args:
        x: (B, ...).
        mask: (B, 1, ...) in [0, 1], the weight of each place in the mean, sum(mask x) / sum(mask); where it is 0
            everywhere, that is 0. None: all places alike.
    """
    if mask is None:
        return x.flatten(1).mean(1)
    weights = mask.to(x).expand_as(x).flatten(1)
    return (x.flatten(1) * weights).sum(1) / weights.sum(1).clamp(min=torch.finfo(x.dtype).tiny)


class Target(ABC):
    """What a network predicts from x_t = signal x_0 + sigma eps: a linear combination of x_0 and eps.

    One such prediction gives the others. Tensors are (B, C, ...); signal and sigma are numbers or broadcast to them.
    """

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


class Clock(ABC):
    """The times that training draws, and on which scale they are counted."""

    name: ClassVar[str]
    """For settings and messages."""
    num_timesteps: int
    """T, the length of the scale that times are counted on."""

    @abstractmethod
    def times(self, uniform: Tensor) -> Tensor:
        """Training times for uniform numbers in [0, 1), (B,) -> (B,)."""

    def held_out_times(self, uniform: Tensor) -> Tensor:
        """The times at which a held-out loss is measured, (B,) -> (B,)."""
        return self.times(uniform)

    def model_time(self, times: Tensor) -> Tensor:
        """The timesteps that the network receives for these times, (B,) -> (B,)."""
        return times


class Process(Clock):
    """How noise is mixed into pictures, and what a network learns of it: x_t = signal(t) x_0 + sigma(t) eps.

    Pictures, noise and predictions are (B, C, ...). There are two clocks. Training draws *times* (B,), in the unit of
    the process: whole timesteps for Gaussian diffusion. The network receives, and schedulers count, a *timestep*, which
    is `model_time` of a time; what sampling asks takes one of these.
    """

    predicts: Target
    """What the network predicts."""

    # What a process must say

    @abstractmethod
    def coefficients(self, times: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """signal and sigma at the times (B,), each (B, 1, ...) in the dtype and on the device of `like`."""

    @abstractmethod
    def level(self, timestep: Any) -> tuple[float, float]:
        """signal and sigma at one timestep, also between those that training draws."""

    @abstractmethod
    def scheduler_config(self) -> dict[str, Any]:
        """The settings with which a diffusers scheduler samples from this process."""

    @abstractmethod
    def scheduler(self, name: str | None = None) -> Any:
        """The diffusers scheduler of that class name that samples from this process; None: a good one.

        Raises:
            ValueError: there is no such scheduler, or it cannot sample from this process.
        """

    @classmethod
    @abstractmethod
    def fits(cls, config: Mapping[str, Any]) -> bool:
        """Whether a scheduler with this config samples from a process of this class."""

    @classmethod
    @abstractmethod
    def from_scheduler_config(cls, config: Mapping[str, Any]) -> Self:
        """The process that a diffusers scheduler with this config samples from.

        Raises:
            ValueError: there is none; the message names the key.
        """

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> Self:
        """The process that this diffusers scheduler samples from."""
        return cls.from_scheduler_config(scheduler.config)

    # What a process says that can be distilled

    def even_times(self, steps: int) -> Tensor:
        """The times at which `first_order_scheduler` plans `steps`, (steps + 1,), the first of them the picture's.

        Raises:
            ValueError: this process is not distilled.
        """
        raise ValueError(f"the {self.name} process says no times of a plan (even_times), so it cannot be distilled")

    def first_order_scheduler(self) -> Any:
        """The diffusers scheduler that goes straight to the x_0 of each prediction: DDIM's step, or Euler's of a flow.

        Raises:
            ValueError: this process is not distilled.
        """
        raise ValueError(f"the {self.name} process has no first_order_scheduler, so it cannot be distilled")

    def renoising_scheduler(self, steps: int, among: int) -> Any:
        """The diffusers scheduler that puts new noise into the x_0 of each prediction, as consistency models draw.

        Args:
            steps: that are mostly asked of it.
            among: how many even ones they are chosen from, where times are whole numbers.

        Raises:
            ValueError: there is none.
        """
        raise ValueError(f"the {self.name} process has no renoising_scheduler; take method=trajectory or progressive")

    def consistency_times(self, steps: int) -> Tensor:
        """The times between which a path is cut for consistency, (steps + 1,), from the least."""
        return self.even_times(steps)

    def consistency_scales(self, times: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """c_skip and c_out, with which c_skip x_t + c_out x_0 is x_t itself at the least of `consistency_times`.

        (B,) or numbers. Without noise at that time x_0 is enough.
        """
        return 0.0, 1.0

    # What follows from it; a subclass may replace it

    def mix(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """x_t, the clean picture with noise in it. (B, C, ...)"""
        signal, sigma = self.coefficients(times, clean)
        return signal * clean + sigma * noise

    def target(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """The correct prediction for ``mix(clean, noise, times)``. (B, C, ...)"""
        return self.predicts.of(clean, noise, *self.coefficients(times, clean))

    def prediction_channels(self, channels: int) -> int:
        """How many channels the network must give for pictures or latents of `channels`."""
        return channels

    def error(
        self, prediction: Tensor, clean: Tensor, noise: Tensor, times: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Mean squared error of the prediction, for each picture, (B,). It compares runs: no weights, no bound.

        mask: see `per_picture`.
        """
        wanted = self.target(clean, noise, times)
        return per_picture((prediction[:, : clean.shape[1]] - wanted).square(), mask)

    def loss(
        self,
        prediction: Tensor,
        clean: Tensor,
        noise: Tensor,
        times: Tensor,
        weight: Tensor | float = 1.0,
        mask: Tensor | None = None,
    ) -> Tensor:
        """What training minimises, for each picture, (B,).

        prediction: the network's, for ``mix(clean, noise, times)``; weight: (B,), of the error of the prediction;
        mask: see `per_picture`.
        """
        return weight * self.error(prediction, clean, noise, times, mask)

    def clean(self, noisy: Tensor, prediction: Tensor, timestep: Any) -> Tensor:
        """The picture x_0 that a prediction stands for at one timestep, computed in float32. (B, C, ...)

        prediction: (B, C, ...); channels after the first C are ignored.
        """
        signal, sigma = self.level(timestep)
        wanted = prediction[:, : noisy.shape[1]].float()
        return self.predicts.clean(noisy.float(), wanted, max(signal, SMALLEST_SIGNAL), sigma).to(noisy.dtype)

    def noise_level(self, timestep: Any) -> float:
        """The noise's standard deviation where the picture's is 1, sigma / signal, from 0 to infinity."""
        signal, sigma = self.level(timestep)
        return sigma / signal if signal > 0 else math.inf

    def snr(self, times: Tensor) -> Tensor:
        """Signal-to-noise ratio signal^2 / sigma^2, (B,) float64."""
        exact = torch.float32 if times.device.type == "mps" else torch.float64
        signal, sigma = self.coefficients(times, torch.empty(len(times), dtype=exact, device=times.device))
        return (signal / sigma).square()

    def min_snr_weight(self, times: Tensor, gamma: float = 5.0) -> Tensor:
        """Min-SNR-gamma loss weights (Hang et al. 2023, Sec. 3.4), (B,) float32.

        The paper weighs the loss of x_0 by min(SNR, gamma).
        """
        snr = self.snr(times)
        return (snr.clamp(max=gamma) / self.predicts.error_ratio(snr)).float()

    def p2_weight(self, times: Tensor, gamma: float = 1.0, k: float = 1.0) -> Tensor:
        """P2 loss weights (Choi et al. 2022, Eq. 8), (B,) float32.

        The paper weighs the loss of epsilon by 1 / (k + SNR)^gamma, and so that of x_0 by SNR times that.
        """
        snr = self.snr(times)
        return (snr / (k + snr) ** gamma / self.predicts.error_ratio(snr)).float()

    def step_variance(self, timestep: int, before: int, prediction: Tensor) -> Tensor:
        """The variance with which a sampler draws the step from `timestep` to `before`; a scalar, or (B, C, ...).

        Raises:
            ValueError: steps of this process are not drawn.
        """
        raise ValueError(f"the {self.name} process has no variance of a step")

    def with_gradient(self, prediction: Tensor, noisy: Tensor, timestep: Any, gradient: Tensor) -> Tensor:
        """A prediction moved along a gradient of log p(x_t): the noise less sigma times the gradient.

        ADM (Dhariwal & Nichol 2021), Alg. 2, for any target.

        Args:
            prediction: (B, C, ...); channels after the first C stay.
            gradient: (B, C, ...).
        """
        signal, sigma = self.level(timestep)
        factor = -sigma * self.predicts.per_noise(signal, sigma)
        channels = noisy.shape[1]
        moved = prediction[:, :channels] + (factor * gradient).to(prediction.dtype)
        return torch.cat([moved, prediction[:, channels:]], dim=1)


PROCESSES: list[type[Process]] = []


def register_process(process: type[Process]) -> type[Process]:
    """Make a process known, before those that are known already; also a class decorator."""
    if process not in PROCESSES:
        PROCESSES.insert(0, process)
    return process


def known_processes() -> dict[str, type[Process]]:
    """The processes by their names."""
    return {process.name: process for process in PROCESSES}


def process_from_config(config: Mapping[str, Any]) -> Process:
    """The process that a scheduler with this config samples from, from the config alone.

    Raises:
        ValueError: there is none that is known; the message names the key.
    """
    return process_class(config).from_scheduler_config(config)


def process_of(scheduler: Any) -> Process:
    """The process that a scheduler samples from, with the scheduler's own tables.

    Raises:
        ValueError: there is none that is known.
    """
    config = {"_class_name": type(scheduler).__name__, **scheduler.config}  # in memory a config has no class
    return process_class(config).from_scheduler(scheduler)


def build_scheduler(process: Process, name: str = "DDIMScheduler") -> Any:
    """The diffusers scheduler class `name` for `process`; see `Process.scheduler`."""
    return process.scheduler(name)


def process_class(config: Mapping[str, Any]) -> type[Process]:
    # Where none fits, Gaussian diffusion says what is wrong with the config.
    return next((process for process in PROCESSES if process.fits(config)), known_processes()["gaussian"])
