"""Gaussian diffusion: the process of DDPM with its schedule, its target, its variances and its losses."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from latentdiff.diffusion.betas import check_betas, make_betas, rescale_zero_terminal_snr, schedule_ends
from latentdiff.diffusion.ddpm_formulas import GaussianProcess
from latentdiff.diffusion.losses import LogLikelihood, gaussian_log_likelihood, training_losses
from latentdiff.diffusion.process import TARGETS, register_process
from latentdiff.diffusion.schedulers import make_scheduler, process_settings, samples_from_betas, variance_name
from latentdiff.diffusion.timesteps import space_timesteps

VARIANCE_TYPES = ("fixed_small", "fixed_large", "learned_range")
LOSS_TYPES = ("simple", "l1", "hybrid", "bound")
SIGMA_DATA, TIME_SCALING = 0.5, 10.0
"""Of a consistency function, those of diffusers' LCMScheduler."""


@register_process
class GaussianDiffusion(GaussianProcess):
    """The diffusion process of DDPM (Ho et al. 2020) and its relatives.

    Args:
        schedule: a name in ``latentdiff.diffusion.betas.SCHEDULES``.
        num_timesteps: T; timesteps run from 0 (almost clean) to T - 1 (almost or wholly noise).
        prediction_type: ``"epsilon"`` (DDPM, Ho et al. 2020), ``"v_prediction"`` (Salimans & Ho 2022) or
            ``"sample"`` (x0 itself).
        zero_terminal_snr: make the last step pure noise (Lin et al. 2024); with it, epsilon says nothing at the
            last step, so it is refused together with ``prediction_type="epsilon"``.
        variance_type: of the reverse steps. ``"fixed_small"`` is the posterior's beta-tilde, ``"fixed_large"`` is beta
            (both DDPM, Sec. 3.2). With ``"learned_range"`` the network gives C more channels, which say where between
            the two each variance lies (Improved DDPM, Nichol & Dhariwal 2021, Eq. 15).
        loss_type: what `loss` minimises: ``"simple"``, the squared error of the prediction (DDPM, Eq. 14); ``"l1"``,
            the absolute one; ``"hybrid"``, the squared error and, for the variances alone, the bound (Improved DDPM,
            Eq. 16); ``"bound"``, all of it (DDPM, Eq. 5). By default hybrid where variances are learned, else simple.
        beta_start, beta_end: instead of the schedule's own.
        betas: (T,), instead of a schedule; `num_timesteps` is then their number.
        alphas_cumprod: (T,), instead of betas, as a scheduler has it.
        log_likelihood: of the last step of a bound; the default suits latents, pixels want
            `discretized_gaussian_log_likelihood`.

    Raises:
        ValueError: an unknown schedule or type, betas that cannot be, a hybrid loss without learned variances, or
            epsilon with zero terminal SNR.
    """

    name = "gaussian"

    def __init__(
        self,
        schedule: str = "linear",
        num_timesteps: int = 1000,
        prediction_type: str = "epsilon",
        zero_terminal_snr: bool = False,
        *,
        variance_type: str = "fixed_small",
        loss_type: str | None = None,
        beta_start: float | None = None,
        beta_end: float | None = None,
        betas: Tensor | Sequence[float] | None = None,
        alphas_cumprod: Tensor | None = None,
        log_likelihood: LogLikelihood = gaussian_log_likelihood,
    ) -> None:
        if loss_type is None:
            loss_type = "hybrid" if variance_type == "learned_range" else "simple"
        for name, value, choices in (
            ("prediction_type", prediction_type, tuple(TARGETS)),
            ("variance_type", variance_type, VARIANCE_TYPES),
            ("loss_type", loss_type, LOSS_TYPES),
        ):
            if value not in choices:
                raise ValueError(f"unknown {name} {value!r}; choose one of {', '.join(choices)}")
        if loss_type == "hybrid" and variance_type != "learned_range":
            raise ValueError(f"loss_type='hybrid' teaches variances, and variance_type={variance_type!r} has none")
        self.schedule, self.prediction_type, self.variance_type = schedule, prediction_type, variance_type
        self.predicts, self.loss_type, self.log_likelihood = TARGETS[prediction_type], loss_type, log_likelihood
        self.zero_terminal_snr, self.beta_start, self.beta_end = zero_terminal_snr, beta_start, beta_end
        self.given_betas: Tensor | None = None
        self.kept: Tensor | None = None  # of a respaced process: the timesteps of the original one
        if alphas_cumprod is not None:
            alphas_cumprod = alphas_cumprod.to("cpu", torch.float64)
            self.given_betas = betas_of(alphas_cumprod)
            self.fill_tables(self.given_betas, alphas_cumprod)
        elif betas is None:
            self.fill_tables(make_betas(schedule, num_timesteps, zero_terminal_snr, beta_start, beta_end))
        else:
            self.given_betas = check_betas(torch.as_tensor(betas, dtype=torch.float64, device="cpu"))
            self.fill_tables(rescale_zero_terminal_snr(self.given_betas) if zero_terminal_snr else self.given_betas)
        if prediction_type == "epsilon" and self.alphas_cumprod[-1] <= 0:
            raise ValueError(
                "prediction_type='epsilon' cannot be used with zero terminal SNR: the last step is pure noise and "
                "the noise says nothing of the picture; use 'v_prediction'"
            )

    @classmethod
    def fits(cls, config: Mapping[str, Any]) -> bool:
        return samples_from_betas(config) and not config.get("use_flow_sigmas")

    @classmethod
    def from_scheduler_config(cls, config: Mapping[str, Any]) -> Self:
        """The process that a diffusers scheduler with this config samples from.

        config: ``scheduler.config``, or what its ``scheduler_config.json`` holds.

        Raises:
            ValueError: it is of a process that this class cannot be (flow matching, another schedule or prediction).
        """
        return cls(**process_settings(config))

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> Self:
        """The process that this diffusers scheduler samples from, with the scheduler's own alpha-bar.

        Its tables are in float32; with them what is said of a step agrees with the step to the last digit.

        Raises:
            ValueError: the scheduler has no such process, or an unknown prediction or variance.
        """
        table = getattr(scheduler, "alphas_cumprod", None)
        if table is None:
            raise ValueError(f"the {type(scheduler).__name__} has no noise levels of a diffusion process")
        return cls(
            alphas_cumprod=table,
            prediction_type=scheduler.config.get("prediction_type", "epsilon"),
            variance_type=variance_name(scheduler.config),
        )

    def scheduler_config(self) -> dict[str, Any]:
        name = {"cosine": "squaredcos_cap_v2"}.get(self.schedule, self.schedule)
        if self.given_betas is not None:
            betas: dict[str, Any] = {"trained_betas": self.given_betas.tolist()}
        else:
            ends = schedule_ends(name, self.beta_start, self.beta_end)
            betas = dict(zip(("beta_start", "beta_end"), ends, strict=False))
        return {
            "beta_schedule": name,
            **betas,
            "num_train_timesteps": self.num_timesteps,
            "prediction_type": self.prediction_type,
            "variance_type": self.variance_type,
            "rescale_betas_zero_snr": self.zero_terminal_snr,
            # The last training step is where sampling starts; with zero terminal SNR nothing else is right
            # (Lin et al. 2024, Sec. 3.3).
            "timestep_spacing": "trailing",
        }

    def scheduler(self, name: str | None = None) -> Any:
        if name is None:
            name = "DDPMScheduler" if self.learns_variance else "DDIMScheduler"
        return make_scheduler(self.scheduler_config(), name)

    def even_times(self, steps: int) -> Tensor:
        """Long, evenly spaced to the last one; -1 is the picture."""
        return (torch.arange(steps + 1) * (self.num_timesteps / steps)).round().long() - 1

    def first_order_scheduler(self) -> Any:
        return self.scheduler("DDIMScheduler")

    def renoising_scheduler(self, steps: int, among: int) -> Any:
        scheduler = self.scheduler("LCMScheduler")
        scheduler.register_to_config(original_inference_steps=among, timestep_scaling=TIME_SCALING)
        return scheduler

    def consistency_times(self, steps: int) -> Tensor:
        """As diffusers' LCM counts them, for its scheduler's steps are chosen among these."""
        return (torch.arange(steps + 1) * (self.num_timesteps // steps) - 1).clamp(min=0)

    def consistency_scales(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """LCM (Luo et al. 2023), Eq. 9, for at time 0 there is some noise."""
        scaled = self.model_time(times).float() * TIME_SCALING
        c_skip = SIGMA_DATA**2 / (scaled.square() + SIGMA_DATA**2)
        return c_skip, scaled / (scaled.square() + SIGMA_DATA**2).sqrt()

    def times(self, uniform: Tensor) -> Tensor:
        """(B,) in [0, 1) -> (B,) long, all timesteps alike."""
        return (uniform * self.num_timesteps).long().clamp(max=self.num_timesteps - 1)

    def level(self, timestep: Any) -> tuple[float, float]:
        alpha_bar = self.alpha_bar(timestep)
        return float(alpha_bar.sqrt()), float((1 - alpha_bar).sqrt())

    def alpha_bar(self, timestep: Any) -> Tensor:
        """What is left of the picture's variance at one timestep (DDPM, Eq. 4), a float64 scalar.

        Between whole timesteps the noise level is interpolated, as diffusers' Euler schedulers do it.
        """
        table, where = self.alphas_cumprod, float(timestep)
        if self.kept is not None:
            where = float(torch.searchsorted(self.kept, int(timestep)))
        below = min(max(int(where), 0), len(table) - 1)
        share = where - below
        if share <= 0 or below + 1 == len(table):
            return table[below]
        sigmas = ((1 - table[below : below + 2]) / table[below : below + 2]).sqrt()
        return 1 / (1 + torch.lerp(sigmas[0], sigmas[1], share) ** 2)

    def loss(
        self,
        prediction: Tensor,
        clean: Tensor,
        noise: Tensor,
        times: Tensor,
        weight: Tensor | float = 1.0,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The loss that ``loss_type`` names, for each picture, (B,); see `losses.training_losses`."""
        return training_losses(self, prediction, clean, times, noise, weight, self.log_likelihood, mask)

    def respaced(self, sections: int | str | Sequence[int]) -> "GaussianDiffusion":
        """The same process in fewer steps, for few-step sampling and its bound; see `space_timesteps`.

        Its timesteps count from 0; `model_time` gives those that the network knows them by. Improved DDPM
        (Nichol & Dhariwal 2021), Sec. 4, Eq. 19.

        Raises:
            ValueError: there are no such timesteps, or fewer than two.
        """
        kept = torch.tensor(space_timesteps(self.num_timesteps, sections))
        process = GaussianDiffusion(
            betas=betas_of(self.alphas_cumprod[kept]),
            prediction_type=self.prediction_type,
            variance_type=self.variance_type,
            loss_type=self.loss_type,
            log_likelihood=self.log_likelihood,
        )
        process.kept = self.model_time(kept)
        return process

    def model_time(self, times: Tensor) -> Tensor:
        """What a network receives for these timesteps, (B,) long: the same, but for a process with fewer steps."""
        return times if self.kept is None else self.kept.to(times.device)[times]


def betas_of(alphas_cumprod: Tensor) -> Tensor:
    """beta_t = 1 - alpha-bar_t / alpha-bar_{t-1}, (T,) float64."""
    before = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
    return 1 - alphas_cumprod / before
