"""The Gaussian diffusion process and what a network learns of it: tensors in, tensors out, float64 tables."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from latentdiff.diffusion.respacing import space_timesteps
from latentdiff.diffusion.scheduler_configs import process_settings
from latentdiff.diffusion.schedules import check_betas, make_betas, rescale_zero_terminal_snr

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
VARIANCE_TYPES = ("fixed_small", "fixed_large", "learned_range")
LOSS_TYPES = ("simple", "l1", "hybrid", "bound")


class Prediction(NamedTuple):
    """The distribution p(x_{t-1} | x_t) and the x_0 that it comes from; each (B, C, ...), or broadcast to that."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor
    x_start: Tensor


class GaussianDiffusion:
    """The forward process q, its posterior, and the reverse process p that a network's prediction makes.

    x_t, noise and predictions are (B, C, ...), timesteps (B,) long; results have the dtype of x_t. Timesteps out of
    range are an error; on a GPU it is the device that finds them.

    Args:
        schedule: a name in ``latentdiff.diffusion.schedules.SCHEDULES``.
        num_timesteps: T; timesteps run from 0 (almost clean) to T - 1 (almost or wholly noise).
        prediction_type: ``"epsilon"`` (DDPM, Ho et al. 2020), ``"v_prediction"`` (Salimans & Ho 2022) or
            ``"sample"`` (x0 itself).
        zero_terminal_snr: make the last step pure noise (Lin et al. 2024); with it, epsilon tells nothing at the
            last step, so it is refused together with ``prediction_type="epsilon"``.
        variance_type: of the reverse steps. ``"fixed_small"`` is the posterior's beta-tilde, ``"fixed_large"`` is beta
            (both DDPM, Sec. 3.2). With ``"learned_range"`` the network gives C more channels, which say where between
            the two each variance lies (Improved DDPM, Nichol & Dhariwal 2021, Eq. 15).
        loss_type: what `training_losses` minimises: ``"simple"``, the squared error of the prediction (DDPM, Eq. 14);
            ``"l1"``, the absolute one; ``"hybrid"``, the squared error and, for the variances alone, the bound
            (Improved DDPM, Eq. 16); ``"bound"``, all of it (DDPM, Eq. 5). By default hybrid where variances are
            learned, else simple.
        beta_start, beta_end: instead of the schedule's own.
        betas: (T,), instead of a schedule; `num_timesteps` is then their number.

    Raises:
        ValueError: an unknown schedule or type, betas that cannot be, a hybrid loss without learned variances, or
            epsilon with zero terminal SNR.
    """

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
    ) -> None:
        if loss_type is None:
            loss_type = "hybrid" if variance_type == "learned_range" else "simple"
        for name, value, choices in (
            ("prediction_type", prediction_type, PREDICTION_TYPES),
            ("variance_type", variance_type, VARIANCE_TYPES),
            ("loss_type", loss_type, LOSS_TYPES),
        ):
            if value not in choices:
                raise ValueError(f"unknown {name} {value!r}; choose one of {', '.join(choices)}")
        if loss_type == "hybrid" and variance_type != "learned_range":
            raise ValueError(f"loss_type='hybrid' teaches variances, and variance_type={variance_type!r} has none")
        self.schedule, self.prediction_type, self.variance_type = schedule, prediction_type, variance_type
        self.loss_type = loss_type
        self.zero_terminal_snr, self.beta_start, self.beta_end = zero_terminal_snr, beta_start, beta_end
        self.given_betas: Tensor | None = None
        if betas is None:
            self.betas = make_betas(schedule, num_timesteps, zero_terminal_snr, beta_start, beta_end)  # (T,) float64
        else:
            self.given_betas = check_betas(torch.as_tensor(betas, dtype=torch.float64, device="cpu"))
            self.betas = rescale_zero_terminal_snr(self.given_betas) if zero_terminal_snr else self.given_betas
        self.num_timesteps = len(self.betas)
        self.kept: Tensor | None = None  # timesteps of the process that this one takes only some steps of
        self._fill_tables()
        if prediction_type == "epsilon" and self.alphas_cumprod[-1] <= 0:
            raise ValueError(
                "prediction_type='epsilon' cannot be used with zero terminal SNR: the last step is pure noise and "
                "the noise says nothing of the picture; use 'v_prediction'"
            )

    @classmethod
    def from_scheduler_config(cls, config: Mapping[str, Any]) -> Self:
        """The process that a diffusers scheduler with this config samples from.

        config: ``scheduler.config``, or what its ``scheduler_config.json`` holds.

        Raises:
            ValueError: it is of a process that this class cannot be (flow matching, another schedule or prediction).
        """
        return cls(**process_settings(config))

    def respaced(self, sections: int | str | Sequence[int]) -> "GaussianDiffusion":
        """The same process in fewer steps, for few-step sampling and its bound; see `space_timesteps`.

        Its timesteps count from 0; `model_timesteps` gives those that the network knows them by. Improved DDPM
        (Nichol & Dhariwal 2021), Sec. 4, Eq. 19.

        Raises:
            ValueError: there are no such timesteps, or fewer than two.
        """
        kept = torch.tensor(space_timesteps(self.num_timesteps, sections))
        alphas_cumprod = self.alphas_cumprod[kept]
        before = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
        process = GaussianDiffusion(
            betas=1 - alphas_cumprod / before,
            prediction_type=self.prediction_type,
            variance_type=self.variance_type,
            loss_type=self.loss_type,
        )
        process.kept = self.model_timesteps(kept)
        return process

    def model_timesteps(self, timesteps: Tensor) -> Tensor:
        """What a network calls these timesteps, (B,) long: the same, but for a process with fewer steps."""
        return timesteps if self.kept is None else self.kept.to(timesteps.device)[timesteps]

    def _fill_tables(self) -> None:
        """The tables of DDPM (Ho et al. 2020), each (T,) float64."""
        betas, alphas = self.betas, 1 - self.betas
        self.alphas_cumprod = alphas.cumprod(0).clamp(0, 1)
        self.alphas_cumprod_prev = torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod[:-1]])
        self.sqrt_alphas_cumprod = self.alphas_cumprod.sqrt()
        self.sqrt_one_minus_alphas_cumprod = (1 - self.alphas_cumprod).sqrt()
        # q(x_{t-1} | x_t, x_0): Eq. 6, 7
        left = 1 - self.alphas_cumprod
        self.posterior_variance = betas * (1 - self.alphas_cumprod_prev) / left
        self.posterior_mean_coef1 = betas * self.alphas_cumprod_prev.sqrt() / left
        self.posterior_mean_coef2 = (1 - self.alphas_cumprod_prev) * alphas.sqrt() / left
        # At t = 0 the posterior has no spread and its logarithm would be infinite; that of t = 1 takes its place.
        self.posterior_log_variance_clipped = torch.cat(
            [self.posterior_variance[1:2], self.posterior_variance[1:]]
        ).log()
        self.log_betas = betas.log()
        # fixed_large: beta, but at t = 0, where beta is far too large for the likelihood, as the posterior above
        self.fixed_large_variance = torch.cat([self.posterior_variance[1:2], betas[1:]])

    @property
    def learns_variance(self) -> bool:
        """Whether the network gives 2C channels."""
        return self.variance_type == "learned_range"

    # The forward process

    def snr(self, timesteps: Tensor) -> Tensor:
        """Signal-to-noise ratio alpha-bar / (1 - alpha-bar) of each timestep, (B,) float64."""
        self._check(timesteps)
        return self._snr.to(timesteps.device)[timesteps]

    def q_mean_variance(self, x_start: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log-variance of q(x_t | x_0) (DDPM, Eq. 4); the latter two are (B, 1, ...)."""
        variance = 1 - self.alphas_cumprod
        return (
            self._at(self.sqrt_alphas_cumprod, timesteps, x_start) * x_start,
            self._at(variance, timesteps, x_start),
            self._at(variance.log(), timesteps, x_start),
        )

    def q_sample(self, x_start: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        """A sample of q(x_t | x_0) (DDPM, Eq. 4). x_start, noise: (B, ...); timesteps: (B,) long."""
        signal, sigma = self._coefficients(timesteps, x_start)
        return signal * x_start + sigma * noise

    def q_posterior_mean_variance(
        self, x_start: Tensor, x_t: Tensor, timesteps: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and clipped log-variance of q(x_{t-1} | x_t, x_0) (DDPM, Eq. 6, 7).

        The latter two are (B, 1, ...). The clipped log-variance is that of t = 1 also at t = 0.
        """
        mean = self._at(self.posterior_mean_coef1, timesteps, x_t) * x_start
        mean = mean + self._at(self.posterior_mean_coef2, timesteps, x_t) * x_t
        return (
            mean,
            self._at(self.posterior_variance, timesteps, x_t),
            self._at(self.posterior_log_variance_clipped, timesteps, x_t),
        )

    # What the network predicts

    def velocity(self, x_start: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        """v = alpha_t eps - sigma_t x_0 (Salimans & Ho 2022, Sec. 4). Shapes as in `q_sample`."""
        signal, sigma = self._coefficients(timesteps, x_start)
        return signal * noise - sigma * x_start

    def training_target(self, x_start: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        """What the network must predict from x_t, by `prediction_type`. (B, ...)"""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return x_start
        return self.velocity(x_start, timesteps, noise)

    def predict_start(self, prediction: Tensor, timesteps: Tensor, x_t: Tensor) -> Tensor:
        """x_0 from the network's prediction (DDPM Eq. 15 for epsilon; Salimans & Ho 2022 for v). (B, ...)"""
        if self.prediction_type == "epsilon":
            return self.predict_start_from_noise(x_t, timesteps, prediction)
        if self.prediction_type == "sample":
            return prediction
        return self.predict_start_from_velocity(x_t, timesteps, prediction)

    def predict_start_from_noise(self, x_t: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        """x_0 = (x_t - sigma_t eps) / alpha_t (DDPM, Eq. 15). (B, ...)"""
        signal, sigma = self._coefficients(timesteps, x_t)
        return (x_t - sigma * noise) / signal

    def predict_noise_from_start(self, x_t: Tensor, timesteps: Tensor, x_start: Tensor) -> Tensor:
        """eps = (x_t - alpha_t x_0) / sigma_t, the same solved for the noise. (B, ...)"""
        signal, sigma = self._coefficients(timesteps, x_t)
        return (x_t - signal * x_start) / sigma

    def predict_start_from_velocity(self, x_t: Tensor, timesteps: Tensor, velocity: Tensor) -> Tensor:
        """x_0 = alpha_t x_t - sigma_t v (Salimans & Ho 2022, App. D). (B, ...)"""
        signal, sigma = self._coefficients(timesteps, x_t)
        return signal * x_t - sigma * velocity

    def predict_noise_from_velocity(self, x_t: Tensor, timesteps: Tensor, velocity: Tensor) -> Tensor:
        """eps = sigma_t x_t + alpha_t v. (B, ...)"""
        signal, sigma = self._coefficients(timesteps, x_t)
        return sigma * x_t + signal * velocity

    def predict_noise(self, prediction: Tensor, timesteps: Tensor, x_t: Tensor) -> Tensor:
        """eps from the network's prediction, by `prediction_type`. (B, ...)"""
        if self.prediction_type == "epsilon":
            return prediction
        if self.prediction_type == "sample":
            return self.predict_noise_from_start(x_t, timesteps, prediction)
        return self.predict_noise_from_velocity(x_t, timesteps, prediction)

    def split_variance(self, prediction: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the network predicts of the mean, (B, C, ...), and its variance channels, if it learns variances.

        Raises:
            ValueError: it should give both, and the number of channels is odd.
        """
        if not self.learns_variance:
            return prediction, None
        if prediction.shape[1] % 2:
            raise ValueError(f"a network that learns variances gives 2C channels, not {prediction.shape[1]}")
        mean, variance = prediction.chunk(2, dim=1)
        return mean, variance

    def p_mean_variance(
        self, prediction: Tensor, x_t: Tensor, timesteps: Tensor, clip_denoised: bool = False
    ) -> Prediction:
        """The reverse step p(x_{t-1} | x_t) that a prediction makes (DDPM, Eq. 11).

        Args:
            prediction: (B, C, ...), or (B, 2C, ...) with learned variances.
            clip_denoised: keep x_0 in [-1, 1], for pixels.

        Raises:
            ValueError: the prediction has not as many channels as x_t, or twice as many.
        """
        wanted = x_t.shape[1] * (2 if self.learns_variance else 1)
        if prediction.shape[1] != wanted:
            raise ValueError(
                f"with variance_type={self.variance_type!r} a prediction for {x_t.shape[1]} channels has {wanted}, "
                f"not {prediction.shape[1]}"
            )
        prediction, learned = self.split_variance(prediction)
        if learned is not None:  # Improved DDPM, Eq. 15, with v in [-1, 1] instead of [0, 1]
            small = self._at(self.posterior_log_variance_clipped, timesteps, x_t)
            large = self._at(self.log_betas, timesteps, x_t)
            share = (learned + 1) / 2
            log_variance = share * large + (1 - share) * small
            variance = log_variance.exp()
        elif self.variance_type == "fixed_large":
            variance = self._at(self.fixed_large_variance, timesteps, x_t)
            log_variance = self._at(self.fixed_large_variance.log(), timesteps, x_t)
        else:
            variance = self._at(self.posterior_variance, timesteps, x_t)
            log_variance = self._at(self.posterior_log_variance_clipped, timesteps, x_t)
        x_start = self.predict_start(prediction, timesteps, x_t)
        if clip_denoised:
            x_start = x_start.clamp(-1, 1)
        mean = self.q_posterior_mean_variance(x_start, x_t, timesteps)[0]
        return Prediction(mean, variance, log_variance, x_start)

    def min_snr_weight(self, timesteps: Tensor, gamma: float = 5.0) -> Tensor:
        """Min-SNR-gamma loss weights (Hang et al. 2023, Sec. 3.4), (B,) float32.

        The paper weighs the loss of x_0 by min(SNR, gamma).
        """
        return self._loss_weight(self._snr.clamp(max=gamma), timesteps)

    def p2_weight(self, timesteps: Tensor, gamma: float = 1.0, k: float = 1.0) -> Tensor:
        """P2 loss weights (Choi et al. 2022, Eq. 8), (B,) float32.

        The paper weighs the loss of epsilon by 1 / (k + SNR)^gamma, and so that of x_0 by SNR times that.
        """
        return self._loss_weight(self._snr / (k + self._snr) ** gamma, timesteps)

    @property
    def _snr(self) -> Tensor:
        return self.alphas_cumprod / (1 - self.alphas_cumprod)  # (T,)

    def _loss_weight(self, of_start: Tensor, timesteps: Tensor) -> Tensor:
        """Weights of the loss of x_0, (T,), as those of the loss of what is predicted, (B,) float32.

        A squared error of epsilon is SNR times that of x_0, a squared error of v is SNR + 1 times, so those divide by
        it.
        """
        self._check(timesteps)
        weight = of_start
        if self.prediction_type == "epsilon":
            weight = weight / self._snr
        elif self.prediction_type == "v_prediction":
            weight = weight / (self._snr + 1)
        return weight.to(timesteps.device, torch.float32)[timesteps]

    def _coefficients(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(alpha-bar_t) and sqrt(1 - alpha-bar_t), each (B, 1, ...) in the dtype and device of `like`."""
        signal = self._at(self.sqrt_alphas_cumprod, timesteps, like)
        return signal, self._at(self.sqrt_one_minus_alphas_cumprod, timesteps, like)

    def _at(self, table: Tensor, timesteps: Tensor, like: Tensor) -> Tensor:
        """Each timestep's entry of a table, (B, 1, ...) in the dtype and device of `like`."""
        self._check(timesteps)
        values = table.to(like.device, like.dtype)[timesteps]
        return values.view(-1, *[1] * (like.ndim - 1))

    def _check(self, timesteps: Tensor) -> None:
        # On a GPU a look at the values would make the host wait at every step; compiled, it would split the graph.
        if timesteps.device.type != "cpu" or torch.compiler.is_compiling():
            return
        if timesteps.min() < 0 or timesteps.max() >= self.num_timesteps:
            raise ValueError(
                f"timesteps must lie in [0, {self.num_timesteps - 1}], "
                f"not [{int(timesteps.min())}, {int(timesteps.max())}]"
            )
