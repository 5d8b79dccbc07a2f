"""The Gaussian process of DDPM in closed form: forward, posterior and reverse step. Tensors in, tensors out."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from latentdiff.diffusion.process import Process


class Reverse(NamedTuple):
    """The distribution p(x_{t-1} | x_t) and the x_0 that it comes from; each (B, C, ...), or broadcast to that."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor
    x_start: Tensor


class GaussianProcess(Process):
    """The forward process q, its posterior, and the reverse process p, under the papers' names.

    x_t, noise and predictions are (B, C, ...), timesteps (B,) long; results have the dtype of x_t. Timesteps out of
    range are an error; on a GPU it is the device that finds them. Subclasses call `fill_tables`.
    """

    prediction_type: str
    variance_type: str
    loss_type: str
    # Tables under the papers' names, (T,) float64 on the CPU
    betas: Tensor
    alphas_cumprod: Tensor
    alphas_cumprod_prev: Tensor
    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor
    posterior_variance: Tensor
    posterior_mean_coef1: Tensor
    """The share of x_0 in the posterior's mean."""
    posterior_mean_coef2: Tensor
    """The share of x_t in it."""
    posterior_log_variance_clipped: Tensor
    fixed_large_variance: Tensor

    def fill_tables(self, betas: Tensor, alphas_cumprod: Tensor | None = None) -> None:
        """Make the tables of DDPM (Ho et al. 2020) from betas (T,), and alpha-bar (T,) where it is known better."""
        self.betas, alphas = betas, 1 - betas
        self.num_timesteps = len(betas)
        alpha_bar = alphas.cumprod(0).clamp(0, 1) if alphas_cumprod is None else alphas_cumprod
        before = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
        self.alphas_cumprod, self.alphas_cumprod_prev = alpha_bar, before
        self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        # q(x_{t-1} | x_t, x_0): Eq. 6, 7
        posterior = betas * (1 - before) / (1 - alpha_bar)
        self.posterior_variance = posterior
        self.posterior_mean_coef1 = betas * before.sqrt() / (1 - alpha_bar)
        self.posterior_mean_coef2 = (1 - before) * alphas.sqrt() / (1 - alpha_bar)
        # At t = 0 the posterior has no spread and its logarithm would be infinite; that of t = 1 takes its place.
        self.posterior_log_variance_clipped = torch.cat([posterior[1:2], posterior[1:]]).log()
        # fixed_large: beta, but at t = 0, where beta is far too large for the likelihood, as the posterior above
        self.fixed_large_variance = torch.cat([posterior[1:2], betas[1:]])
        self._snr, self._log_betas = alpha_bar / (1 - alpha_bar), betas.log()
        self._noise_variance, self._log_noise_variance = 1 - alpha_bar, (1 - alpha_bar).log()
        self._log_fixed_large = self.fixed_large_variance.log()
        self._copies: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    def table(self, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The table of that name, (T,): copied once to each device and dtype it is used in."""
        if torch.compiler.is_compiling():  # a compiled graph keeps nothing outside itself
            return getattr(self, name).to(device, dtype)
        if (name, device, dtype) not in self._copies:
            with torch.inference_mode(False):  # so that what is made here can be used in training later
                self._copies[name, device, dtype] = getattr(self, name).to(device, dtype)
        return self._copies[name, device, dtype]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_copies": {}}

    @property
    def learns_variance(self) -> bool:
        """Whether the network gives 2C channels."""
        return self.variance_type == "learned_range"

    def prediction_channels(self, channels: int) -> int:
        return 2 * channels if self.learns_variance else channels

    # The forward process

    def coefficients(self, times: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(alpha-bar_t) and sqrt(1 - alpha-bar_t), each (B, 1, ...) in the dtype and on the device of `like`."""
        return self._at("sqrt_alphas_cumprod", times, like), self._at("sqrt_one_minus_alphas_cumprod", times, like)

    def snr(self, times: Tensor) -> Tensor:
        """Signal-to-noise ratio alpha-bar / (1 - alpha-bar) of each timestep, (B,) float64."""
        self._check(times)
        exact = torch.float32 if times.device.type == "mps" else torch.float64
        return self.table("_snr", times.device, exact)[times]

    def q_mean_variance(self, x_start: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log-variance of q(x_t | x_0) (DDPM, Eq. 4); the latter two are (B, 1, ...)."""
        return (
            self._at("sqrt_alphas_cumprod", timesteps, x_start) * x_start,
            self._at("_noise_variance", timesteps, x_start),
            self._at("_log_noise_variance", timesteps, x_start),
        )

    def q_sample(self, x_start: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        """A sample of q(x_t | x_0) (DDPM, Eq. 4): `mix`. x_start, noise: (B, ...); timesteps: (B,) long."""
        return self.mix(x_start, noise, timesteps)

    def q_posterior_mean_variance(
        self, x_start: Tensor, x_t: Tensor, timesteps: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and clipped log-variance of q(x_{t-1} | x_t, x_0) (DDPM, Eq. 6, 7).

        The latter two are (B, 1, ...). The clipped log-variance is that of t = 1 also at t = 0.
        """
        mean = self._at("posterior_mean_coef1", timesteps, x_t) * x_start
        mean = mean + self._at("posterior_mean_coef2", timesteps, x_t) * x_t
        return (
            mean,
            self._at("posterior_variance", timesteps, x_t),
            self._at("posterior_log_variance_clipped", timesteps, x_t),
        )

    # What the network predicts

    def predict_start(self, prediction: Tensor, timesteps: Tensor, x_t: Tensor) -> Tensor:
        """x_0 from the network's prediction. (B, ...)"""
        return self.predicts.clean(x_t, prediction, *self.coefficients(timesteps, x_t))

    def predict_noise(self, prediction: Tensor, timesteps: Tensor, x_t: Tensor) -> Tensor:
        """eps from the network's prediction. (B, ...)"""
        return self.predicts.noise(x_t, prediction, *self.coefficients(timesteps, x_t))

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

    # The reverse process

    def p_mean_variance(
        self, prediction: Tensor, x_t: Tensor, timesteps: Tensor, clip_denoised: bool = False
    ) -> Reverse:
        """The reverse step p(x_{t-1} | x_t) that a prediction makes (DDPM, Eq. 11).

        Args:
            prediction: (B, C, ...), or (B, 2C, ...) with learned variances.
            clip_denoised: keep x_0 in [-1, 1], for pixels.

        Raises:
            ValueError: the prediction has not as many channels as x_t, or twice as many.
        """
        wanted = self.prediction_channels(x_t.shape[1])
        if prediction.shape[1] != wanted:
            raise ValueError(
                f"with variance_type={self.variance_type!r} a prediction for {x_t.shape[1]} channels has {wanted}, "
                f"not {prediction.shape[1]}"
            )
        prediction, learned = self.split_variance(prediction)
        if learned is not None:
            small = self._at("posterior_log_variance_clipped", timesteps, x_t)
            log_variance = interpolated(learned, small, self._at("_log_betas", timesteps, x_t))
            variance = log_variance.exp()
        elif self.variance_type == "fixed_large":
            variance = self._at("fixed_large_variance", timesteps, x_t)
            log_variance = self._at("_log_fixed_large", timesteps, x_t)
        else:
            variance = self._at("posterior_variance", timesteps, x_t)
            log_variance = self._at("posterior_log_variance_clipped", timesteps, x_t)
        x_start = self.predict_start(prediction, timesteps, x_t)
        if clip_denoised:
            x_start = x_start.clamp(-1, 1)
        mean = self.q_posterior_mean_variance(x_start, x_t, timesteps)[0]
        return Reverse(mean, variance, log_variance, x_start)

    def step_variance(self, timestep: int, before: int, prediction: Tensor) -> Tensor:
        """The variance of a step from `timestep` to `before`, which may lie further back than the timestep before.

        DDPM (Ho et al. 2020), Eq. 7; Improved DDPM (Nichol & Dhariwal 2021), Eq. 15.

        Args:
            before: below 0 for a step to the clean picture.
            prediction: the network's, (B, 2C, ...) with learned variances.

        Returns:
            A scalar, or (B, C, ...) where variances are learned; float32.
        """
        alpha_bar = self.alphas_cumprod[timestep]
        bar_before = self.alphas_cumprod[before] if before >= 0 else torch.ones_like(alpha_bar)
        beta = 1 - alpha_bar / bar_before
        small = ((1 - bar_before) / (1 - alpha_bar) * beta).clamp(min=1e-20)
        learned = self.split_variance(prediction)[1]
        if learned is not None:
            return interpolated(learned.float(), *torch.stack([small, beta]).log().tolist()).exp()
        variance = beta if self.variance_type == "fixed_large" else small
        return variance.to(prediction.device, torch.float32)

    def _at(self, table: str, timesteps: Tensor, like: Tensor) -> Tensor:
        """Each timestep's entry of a table, (B, 1, ...) in the dtype and on the device of `like`."""
        self._check(timesteps)
        return self.table(table, like.device, like.dtype)[timesteps].view(-1, *[1] * (like.ndim - 1))

    def _check(self, timesteps: Tensor) -> None:
        # On a GPU reading the values would make the host wait at every step; compiled, it would split the graph.
        if timesteps.device.type != "cpu" or torch.compiler.is_compiling():
            return
        if timesteps.min() < 0 or timesteps.max() >= self.num_timesteps:
            raise ValueError(
                f"timesteps must lie in [0, {self.num_timesteps - 1}], "
                f"not [{int(timesteps.min())}, {int(timesteps.max())}]"
            )


def interpolated(learned: Tensor, small: Tensor | float, large: Tensor | float) -> Tensor:
    """The log-variance at a network's place in [-1, 1] between two. Improved DDPM, Eq. 15, with v in [0, 1] there."""
    share = (learned + 1) / 2
    return share * large + (1 - share) * small
