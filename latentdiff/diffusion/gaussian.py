"""The Gaussian diffusion process and its training objective: tensors in, tensors out, float64 tables."""

import torch
from torch import Tensor

from latentdiff.diffusion.schedules import make_betas

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


class GaussianDiffusion:
    """The forward process q and what a network is asked to predict of it.

    Args:
        schedule: a name in ``latentdiff.diffusion.schedules.SCHEDULES``.
        num_timesteps: T; timesteps run from 0 (almost clean) to T - 1 (almost or wholly noise).
        prediction_type: ``"epsilon"`` (DDPM, Ho et al. 2020), ``"v_prediction"`` (Salimans & Ho 2022) or
            ``"sample"`` (x0 itself).
        zero_terminal_snr: make the last step pure noise (Lin et al. 2024); with it, epsilon tells nothing at the
            last step, so it is refused together with ``prediction_type="epsilon"``.

    Raises:
        ValueError: an unknown schedule or prediction type, or epsilon with zero terminal SNR.
    """

    def __init__(
        self,
        schedule: str = "linear",
        num_timesteps: int = 1000,
        prediction_type: str = "epsilon",
        zero_terminal_snr: bool = False,
    ) -> None:
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                f"unknown prediction_type {prediction_type!r}; choose one of {', '.join(PREDICTION_TYPES)}"
            )
        if zero_terminal_snr and prediction_type == "epsilon":
            raise ValueError(
                "prediction_type='epsilon' cannot be used with zero terminal SNR: the last step is pure noise and "
                "the noise says nothing of the picture; use 'v_prediction'"
            )
        self.schedule = schedule
        self.num_timesteps = num_timesteps
        self.prediction_type = prediction_type
        self.zero_terminal_snr = zero_terminal_snr
        self.betas = make_betas(schedule, num_timesteps, zero_terminal_snr)  # (T,) float64
        self.alphas_cumprod = (1 - self.betas).cumprod(0).clamp(0, 1)  # (T,) float64

    def snr(self, timesteps: Tensor) -> Tensor:
        """Signal-to-noise ratio alpha-bar / (1 - alpha-bar) of each timestep, (B,) float64."""
        alpha_bar = self.alphas_cumprod.to(timesteps.device)[timesteps]
        return alpha_bar / (1 - alpha_bar)

    def q_sample(self, x_start: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        """A sample of q(x_t | x_0) (DDPM, Eq. 4). x_start, noise: (B, ...); timesteps: (B,) long."""
        signal, sigma = self._coefficients(timesteps, x_start)
        return signal * x_start + sigma * noise

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
        signal, sigma = self._coefficients(timesteps, x_t)
        if self.prediction_type == "epsilon":
            return (x_t - sigma * prediction) / signal
        if self.prediction_type == "sample":
            return prediction
        return signal * x_t - sigma * prediction

    def min_snr_weight(self, timesteps: Tensor, gamma: float = 5.0) -> Tensor:
        """Min-SNR-gamma loss weights (Hang et al. 2023, Sec. 3.4), (B,) float32.

        The paper weighs the loss of x_0 by min(SNR, gamma). Written for other targets: a squared error of epsilon is
        SNR times that of x_0, a squared error of v is SNR + 1 times, so those divide by it.
        """
        snr = self.snr(timesteps)
        weight = snr.clamp(max=gamma)
        if self.prediction_type == "epsilon":
            weight = torch.where(snr > 0, weight / snr, torch.ones_like(snr))
        elif self.prediction_type == "v_prediction":
            weight = weight / (snr + 1)
        return weight.float()

    def _coefficients(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(alpha-bar_t) and sqrt(1 - alpha-bar_t), each (B, 1, ...) in the dtype and device of `like`."""
        if timesteps.min() < 0 or timesteps.max() >= self.num_timesteps:
            raise ValueError(
                f"timesteps must lie in [0, {self.num_timesteps - 1}], "
                f"not [{int(timesteps.min())}, {int(timesteps.max())}]"
            )
        alpha_bar = self.alphas_cumprod.to(timesteps.device)[timesteps]
        shape = (-1, *[1] * (like.ndim - 1))
        signal, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        return signal.view(shape).to(like), sigma.view(shape).to(like)
