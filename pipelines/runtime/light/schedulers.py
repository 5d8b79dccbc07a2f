"""DDIM, LCM and Euler in numpy, with the names, configs and results of diffusers' schedulers."""

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

Noise = Callable[[], np.ndarray]
"""Standard normal noise like the latents."""

PROCESS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
    "prediction_type": "epsilon",
    "steps_offset": 0,
}
"""What the schedulers' configs have in common, with the values where a config says nothing."""

CLIPPING: dict[str, Any] = {
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "set_alpha_to_one": True,
    "timestep_spacing": "leading",
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
}

BETAS = ("linear", "scaled_linear")
PREDICTIONS = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "trailing", "linspace")


class Scheduler:
    """A plan of S steps, and the step from one noise level to the next.

    Args:
        config: as diffusers has it.
        steps: S.

    Raises:
        NotImplementedError: an option that is not known here.
    """

    usual: ClassVar[dict[str, Any]]
    """The options of the config."""
    only: ClassVar[dict[str, tuple[Any, ...]]] = {}
    """The values that are known of some."""

    timesteps: np.ndarray
    """(S,), from the noisiest on."""
    scale: Any = np.float32(1)
    """Of the noise to start from."""

    def __init__(self, config: Mapping[str, Any], steps: int) -> None:
        given = {name: value for name, value in config.items() if not name.startswith("_")}
        self.config, self.steps = {**self.usual, **given}, steps
        known = {"beta_schedule": BETAS, "prediction_type": PREDICTIONS, "timestep_spacing": SPACINGS, **self.only}
        for name, value in self.config.items():
            if name not in self.usual or value not in known.get(name, (value,)):
                raise NotImplementedError(f"{type(self).__name__}: {name}={value}")
        self.total = int(self.config["num_train_timesteps"])
        self.alphas = alphas_cumprod(self.config)
        if not 1 <= steps <= self.total:
            raise NotImplementedError(f"{steps} steps")
        self.plan()
        if not (self.timesteps.min() >= 0 and self.timesteps.max() < self.total and len(self.timesteps) == steps):
            raise NotImplementedError(f"{type(self).__name__}: {steps} steps of {self.total}")

    def plan(self) -> None:
        """Sets `timesteps`."""
        raise NotImplementedError

    def scaled(self, latents: np.ndarray, i: int) -> np.ndarray:
        """Latents as the network sees them at step i."""
        return latents

    def step(self, prediction: np.ndarray, i: int, latents: np.ndarray, noise: Noise) -> np.ndarray:
        """The latents after step i."""
        raise NotImplementedError

    def spaced(self, dtype: type) -> np.ndarray:
        """(S,) timesteps by ``timestep_spacing``; Lin et al. 2024, Tab. 2."""
        spacing, total = self.config["timestep_spacing"], self.total
        if spacing == "linspace":
            spread = np.linspace(0, total - 1, self.steps, dtype=np.float32 if dtype is np.float32 else np.float64)
            return (spread if dtype is np.float32 else spread.round())[::-1].astype(dtype)
        if spacing == "leading":
            return (np.arange(self.steps) * (total // self.steps))[::-1].astype(dtype) + dtype(
                self.config["steps_offset"]
            )
        return np.round(np.arange(total, 0, -total / self.steps)).astype(dtype) - dtype(1)

    def clean(self, prediction: np.ndarray, alpha: np.float32, latents: np.ndarray) -> np.ndarray:
        """The latents without noise that a prediction stands for, where alpha is the product of alphas."""
        kind = self.config["prediction_type"]
        if kind == "sample":
            clean = prediction
        elif kind == "epsilon":  # DDIM (Song et al. 2021), Eq. 9
            clean = (latents - (1 - alpha) ** 0.5 * prediction) / alpha**0.5
        else:  # Salimans & Ho 2022, App. D
            clean = alpha**0.5 * latents - (1 - alpha) ** 0.5 * prediction
        if self.config.get("clip_sample"):
            limit = np.float32(self.config["clip_sample_range"])
            clean = clean.clip(-limit, limit)
        return clean

    def alpha_at(self, timestep: int) -> np.float32:
        """The product of alphas; before the first timestep that of the end."""
        if timestep >= 0:
            return self.alphas[timestep]
        return np.float32(1) if self.config["set_alpha_to_one"] else self.alphas[0]


class DDIMScheduler(Scheduler):
    """DDIM (Song et al. 2021), Eq. 12, without added noise."""

    usual = PROCESS | CLIPPING
    only: ClassVar = {"thresholding": (False,)}

    def plan(self) -> None:
        self.timesteps = self.spaced(np.int64)

    def step(self, prediction: np.ndarray, i: int, latents: np.ndarray, noise: Noise) -> np.ndarray:
        timestep = int(self.timesteps[i])
        alpha, after = self.alpha_at(timestep), self.alpha_at(timestep - self.total // self.steps)
        clean = self.clean(prediction, alpha, latents)
        kind = self.config["prediction_type"]
        if kind == "epsilon":
            direction = prediction
        elif kind == "sample":
            direction = (latents - alpha**0.5 * prediction) / (1 - alpha) ** 0.5
        else:
            direction = alpha**0.5 * prediction + (1 - alpha) ** 0.5 * latents
        return after**0.5 * clean + (1 - after) ** 0.5 * direction


class LCMScheduler(Scheduler):
    """Multistep sampling of latent consistency models (Luo et al. 2023), Alg. 3."""

    usual: ClassVar = {
        **PROCESS,
        **CLIPPING,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "original_inference_steps": 50,
        "timestep_scaling": 10.0,
    }
    only: ClassVar = {"thresholding": (False,)}

    def plan(self) -> None:
        learned = self.config["original_inference_steps"]
        if not self.steps <= learned <= self.total:
            raise NotImplementedError(f"{self.steps} steps of {learned}")
        places = np.floor(np.linspace(0, learned, self.steps, endpoint=False)).astype(np.int64)
        self.timesteps = (learned - places) * (self.total // learned) - 1

    def step(self, prediction: np.ndarray, i: int, latents: np.ndarray, noise: Noise) -> np.ndarray:
        timestep = int(self.timesteps[i])
        time = timestep * self.config["timestep_scaling"]
        kept = 0.25 / (time**2 + 0.25)  # c_skip and c_out, Eq. 5, for data of a standard deviation of 0.5
        taken = time / (time**2 + 0.25) ** 0.5
        clean = self.clean(prediction, self.alpha_at(timestep), latents)
        latents = taken * clean + kept * latents
        if i + 1 == self.steps:
            return latents
        after = self.alpha_at(int(self.timesteps[i + 1]))
        return after**0.5 * latents + (1 - after) ** 0.5 * noise()


class EulerDiscreteScheduler(Scheduler):
    """Euler's method (Karras et al. 2022, Alg. 2) without added noise."""

    usual: ClassVar = {
        **PROCESS,
        "timestep_spacing": "linspace",
        "interpolation_type": "linear",
        "use_karras_sigmas": False,
        "use_exponential_sigmas": False,
        "use_beta_sigmas": False,
        "sigma_min": None,
        "sigma_max": None,
        "timestep_type": "discrete",
        "final_sigmas_type": "zero",
    }
    only: ClassVar = {
        "interpolation_type": ("linear",),
        "timestep_type": ("discrete",),
        "final_sigmas_type": ("zero",),
        "rescale_betas_zero_snr": (False,),  # the first sigma would hang on the last bits
        **{name: (False, None) for name in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")},
        "prediction_type": ("epsilon", "v_prediction"),
    }

    def plan(self) -> None:
        self.timesteps = self.spaced(np.float32)
        sigmas = ((1 - self.alphas) / self.alphas) ** 0.5
        planned = np.interp(self.timesteps, np.arange(len(sigmas)), sigmas)
        self.sigmas = np.append(planned, 0).astype(np.float32)
        most = self.sigmas.max()
        self.scale = (most**2 + 1) ** 0.5 if self.config["timestep_spacing"] == "leading" else most

    def scaled(self, latents: np.ndarray, i: int) -> np.ndarray:
        return latents / (self.sigmas[i] ** 2 + 1) ** 0.5

    def step(self, prediction: np.ndarray, i: int, latents: np.ndarray, noise: Noise) -> np.ndarray:
        sigma, after = self.sigmas[i : i + 2]
        if self.config["prediction_type"] == "epsilon":
            clean = latents - sigma * prediction
        else:
            clean = prediction * (-sigma / (sigma**2 + 1) ** 0.5) + latents / (sigma**2 + 1)
        return latents + (latents - clean) / sigma * (after - sigma)


KNOWN: dict[str, type[Scheduler]] = {one.__name__: one for one in (DDIMScheduler, LCMScheduler, EulerDiscreteScheduler)}


def alphas_cumprod(config: Mapping[str, Any]) -> np.ndarray:
    """(T,) float32, rounded where diffusers rounds."""
    total, first, last = config["num_train_timesteps"], config["beta_start"], config["beta_end"]
    if config["trained_betas"] is not None:
        betas = np.asarray(config["trained_betas"], dtype=np.float32)
    elif config["beta_schedule"] == "linear":
        betas = linspace(first, last, total)
    else:
        betas = linspace(math.sqrt(first), math.sqrt(last), total) ** 2
    if config["rescale_betas_zero_snr"]:  # Lin et al. 2024, Alg. 1
        roots = np.sqrt(cumulative_product(1 - betas))
        end = roots[-1].copy()
        roots = (roots - end) * (roots[0] / (roots[0] - end))
        squares = roots**2
        betas = 1 - np.concatenate([squares[:1], squares[1:] / squares[:-1]])
    return cumulative_product(1 - betas)


def linspace(first: float, last: float, count: int) -> np.ndarray:
    """As torch's in float32: from both ends to the middle."""
    step = np.float32((np.float32(last) - np.float32(first)) / np.float32(max(count - 1, 1)))
    places = np.arange(count) * np.float64(step)  # not rounded before it is added
    spread = np.where(np.arange(count) < count // 2, np.float32(first) + places, np.float32(last) - places[::-1])
    return spread.astype(np.float32)


def cumulative_product(factors: np.ndarray) -> np.ndarray:
    """In float32, multiplied in float64 as torch does."""
    return np.cumprod(factors.astype(np.float64)).astype(np.float32)
