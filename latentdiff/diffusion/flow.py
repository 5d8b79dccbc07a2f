"""Rectified flow: the process of flow matching along straight lines, with its velocity, its times and its samplers."""

import math
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from latentdiff.diffusion.process import (
    SMALLEST_SIGNAL,
    Coefficient,
    Process,
    Target,
    process_class,
    register_process,
)

TIMES = ("uniform", "logit_normal", "mode")
WEIGHTINGS = ("none", "sigma_sqrt", "cosmap")
OWN = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")
"""diffusers' schedulers of flows alone; its ``StableDiffusionPipeline`` cannot draw with them."""
IN_SIGMAS = ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler")
"""Those of noise levels that sample from a flow by ``use_flow_sigmas``; every pipeline of diffusers draws with them."""
SAME = {"EulerDiscreteScheduler": OWN[0], "HeunDiscreteScheduler": OWN[1], "LCMScheduler": OWN[2]}
"""By the scheduler of noise levels, the same solver for a flow."""


class StraightVelocity(Target):
    """u = eps - x_0, the velocity along the line from the picture to the noise. Lipman et al. 2022; Liu et al. 2022."""

    name = "flow_prediction"

    def of(self, clean: Tensor, noise: Tensor, signal: Coefficient, sigma: Coefficient) -> Tensor:
        return noise - clean

    def clean(self, noisy: Tensor, prediction: Tensor, signal: Coefficient, sigma: Coefficient) -> Tensor:
        return (noisy - sigma * prediction) / (signal + sigma)  # signal + sigma is 1 on the line

    def noise(self, noisy: Tensor, prediction: Tensor, signal: Coefficient, sigma: Coefficient) -> Tensor:
        return (noisy + signal * prediction) / (signal + sigma)

    def error_ratio(self, snr: Tensor) -> Tensor | float:
        return (1 + snr.sqrt()) ** 2

    def per_noise(self, signal: float, sigma: float) -> float:
        return (signal + sigma) / signal if signal >= SMALLEST_SIGNAL else 0.0


@register_process
class RectifiedFlow(Process):
    """x_t = (1 - t) x_0 + t eps, of which the network learns eps - x_0.

    Flow Straight and Fast (Liu et al. 2022), Eq. 1; Flow Matching (Lipman et al. 2022), Sec. 4.1 with sigma_min = 0;
    Scaling Rectified Flow Transformers (Esser et al. 2024), Eq. 13. t is 0 at the picture and 1 at the noise; times are
    T t, as diffusers' schedulers count them, and any number between 0 and T.

    Args:
        shift: above 1, more of the training and of the sampling is at high noise: t becomes
            shift t / (1 + (shift - 1) t). For larger pictures than those for which 1 was right it is the ratio of the
            sides, or the root of that of the areas (Esser et al., Eq. 23); `resolution_shift` gives it.
        times: how training draws t before it is shifted: ``"uniform"``; ``"logit_normal"``, in the middle more than at
            the ends (Esser et al., Eq. 19); ``"mode"`` (Esser et al., Eq. 20).
        logit_mean, logit_std: of logit_normal; a mean above 0 is for more noise. In diffusers' training scripts it has
            the other sign, for there t counts from the noise.
        mode_scale: of mode; above 0 the middle is drawn more than the ends, and at 0 all alike.
        weighting: of the loss: ``"none"``; ``"sigma_sqrt"``, 1 / t^2; ``"cosmap"``, 2 / (pi (1 - 2t + 2t^2)) (Esser et
            al., Sec. 3.1, as in diffusers' training scripts).
        num_timesteps: T, the timestep that the network is told at t = 1.

    Raises:
        ValueError: an unknown name, a shift or deviation that is not above 0, or a scale that would turn times back.
    """

    name = "flow"
    predicts = StraightVelocity()

    def __init__(
        self,
        shift: float = 1.0,
        times: str = "logit_normal",
        logit_mean: float = 0.0,
        logit_std: float = 1.0,
        mode_scale: float = 1.29,
        weighting: str = "none",
        num_timesteps: int = 1000,
    ) -> None:
        for name, value, choices in (("times", times, TIMES), ("weighting", weighting, WEIGHTINGS)):
            if value not in choices:
                raise ValueError(f"unknown {name} {value!r}; choose one of {', '.join(choices)}")
        for name, number in (("shift", shift), ("logit_std", logit_std), ("num_timesteps", num_timesteps)):
            check_positive(name, number)
        check_finite("logit_mean", logit_mean)
        check_finite("mode_scale", mode_scale)
        if not -1 <= mode_scale <= 2 / (math.pi - 2):  # beyond, times are no longer in order (Esser et al., Sec. 3.1)
            raise ValueError(f"mode_scale={mode_scale} must lie in [-1, {2 / (math.pi - 2):.4f}]")
        self.shift, self.num_timesteps = float(shift), int(num_timesteps)
        self.drawn, self.logit_mean, self.logit_std, self.mode_scale = times, logit_mean, logit_std, mode_scale
        self.weighting = weighting

    def times(self, uniform: Tensor) -> Tensor:
        t = uniform.double()
        if self.drawn == "logit_normal":
            t = torch.sigmoid(self.logit_mean + self.logit_std * torch.special.ndtri(t))
        elif self.drawn == "mode":
            t = 1 - t - self.mode_scale * (torch.cos(math.pi / 2 * t) ** 2 - 1 + t)
        return self.num_timesteps * self.shift * t / (1 + (self.shift - 1) * t)

    def held_out_times(self, uniform: Tensor) -> Tensor:
        """All times alike, whatever training draws, so that runs can be compared."""
        return self.num_timesteps * uniform

    def even_times(self, steps: int) -> Tensor:
        """Float32, evenly spaced before they are shifted, to 1 - 1/T, where diffusers' schedulers begin."""
        t = torch.arange(steps + 1) * ((1 - 1 / self.num_timesteps) / steps)
        return self.num_timesteps * self.shift * t / (1 + (self.shift - 1) * t)

    def first_order_scheduler(self) -> Any:
        scheduler = self.scheduler(IN_SIGMAS[0])
        scheduler.register_to_config(solver_order=1)
        return scheduler

    def renoising_scheduler(self, steps: int, among: int) -> Any:
        """With the last of `steps` where an even plan has it; diffusers' own would waste it on nearly no noise."""
        scheduler = self.scheduler(OWN[2])
        if steps > 1:
            scheduler.register_to_config(shift_terminal=self.shift / (steps + self.shift - 1))
        return scheduler

    def coefficients(self, times: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        self._check(times)
        sigma = times.to(like.device).view(-1, *[1] * (like.ndim - 1)) / self.num_timesteps
        return (1 - sigma).to(like), sigma.to(like)

    def level(self, timestep: Any) -> tuple[float, float]:
        sigma = min(max(float(timestep) / self.num_timesteps, 0.0), 1.0)
        return 1 - sigma, sigma

    def loss(
        self,
        prediction: Tensor,
        clean: Tensor,
        noise: Tensor,
        times: Tensor,
        weight: Tensor | float = 1.0,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The squared error of the velocity, with the weight of `weighting`, for each picture, (B,)."""
        return weight * self.time_weight(times) * self.error(prediction, clean, noise, times, mask)

    def time_weight(self, times: Tensor) -> Tensor | float:
        """What `weighting` says of these times, (B,) float32."""
        t = times.float() / self.num_timesteps
        if self.weighting == "sigma_sqrt":  # never infinite; the least t of diffusers' scripts is 1 / T too
            return t.clamp(min=1 / self.num_timesteps) ** -2
        if self.weighting == "cosmap":
            return 2 / (math.pi * (1 - 2 * t + 2 * t**2))
        return 1.0

    def scheduler_config(self) -> dict[str, Any]:
        return {
            "num_train_timesteps": self.num_timesteps,
            "shift": self.shift,
            "use_flow_sigmas": True,
            "flow_shift": self.shift,
            "prediction_type": self.predicts.name,
            "steps_offset": 1,  # changes nothing here, but diffusers' pipelines warn of any other
        }

    def scheduler(self, name: str | None = None) -> Any:
        """The scheduler of that class name, or the same solver for a flow; None: DPM-Solver++.

        Raises:
            ValueError: it cannot sample from a flow.
        """
        import diffusers

        name = SAME.get(name or IN_SIGMAS[0], name or IN_SIGMAS[0])
        if name not in OWN + IN_SIGMAS:
            raise ValueError(
                f"the {name} cannot sample from the flow process, for it steps between noise levels; euler, heun, "
                f"dpm++, unipc and lcm can"
            )
        scheduler_class = getattr(diffusers, name)
        known = scheduler_class._get_init_keys(scheduler_class)
        return scheduler_class(**{key: value for key, value in self.scheduler_config().items() if key in known})

    @classmethod
    def fits(cls, config: Mapping[str, Any]) -> bool:
        return str(config.get("_class_name", "")).startswith("FlowMatch") or bool(config.get("use_flow_sigmas"))

    @classmethod
    def from_scheduler_config(cls, config: Mapping[str, Any]) -> Self:
        """The flow that a diffusers scheduler with this config samples from; times are drawn as by default.

        Raises:
            ValueError: the key with which it samples from another process, or cannot be.
        """
        name = config.get("_class_name") or "this scheduler"
        for key in ("use_dynamic_shifting", "invert_sigmas"):  # with which times are not those of training
            if config.get(key):
                raise ValueError(
                    f"the config of {name} has {key}={config[key]!r}, which is not supported; set it to false"
                )
        if config.get("use_flow_sigmas") and config.get("prediction_type") != cls.predicts.name:
            raise ValueError(
                f"the config of {name} has use_flow_sigmas and prediction_type={config.get('prediction_type')!r}: the "
                f"scheduler of a flow with the network of another process; the one wants {cls.predicts.name!r}, the "
                f"other use_flow_sigmas=false"
            )
        key = "flow_shift" if config.get("use_flow_sigmas") else "shift"
        steps = config.get("num_train_timesteps", 1000)
        try:
            return cls(config.get(key, 1.0), num_timesteps=steps)
        except ValueError as error:
            raise ValueError(f"the config of {name} cannot be: {error} ({key})") from None

    def _check(self, times: Tensor) -> None:
        # On a GPU reading the values would make the host wait at every step; compiled, it would split the graph.
        if times.device.type != "cpu" or torch.compiler.is_compiling():
            return
        least, most = float(times.min()), float(times.max())
        if not 0 <= least <= most <= self.num_timesteps:
            raise ValueError(f"times must lie in [0, {self.num_timesteps}], not [{least:g}, {most:g}]")


def resolution_shift(pixels: float, base_pixels: float) -> float:
    """The shift for pictures of so many pixels where 1 is right for `base_pixels`. Esser et al. 2024, Eq. 23.

    Raises:
        ValueError: one is not above 0.
    """
    check_positive("pixels", pixels)
    check_positive("base_pixels", base_pixels)
    return math.sqrt(pixels / base_pixels)


def check_flow(scheduler: Any) -> None:
    """Raises ValueError for a flow whose scheduler steps between noise levels, or whose times cannot be."""
    config = {"_class_name": type(scheduler).__name__, **scheduler.config}
    kind = process_class(config)
    if kind is RectifiedFlow:
        kind.from_scheduler_config(config)
    elif kind.name == "gaussian" and config.get("prediction_type") == RectifiedFlow.predicts.name:
        raise ValueError(
            f"the {type(scheduler).__name__} steps between noise levels, and by its config the network predicts a flow "
            f"(prediction_type={RectifiedFlow.predicts.name!r}); {', '.join(OWN)} step along it, and "
            f"{', '.join(IN_SIGMAS)} with use_flow_sigmas=True"
        )


def check_finite(name: str, value: Any) -> None:
    """Raises ValueError for what is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name}={value!r} must be a number")


def check_positive(name: str, value: Any) -> None:
    """Raises ValueError for what is no finite number above 0."""
    check_finite(name, value)
    if value <= 0:
        raise ValueError(f"{name}={value!r} must be above 0")
