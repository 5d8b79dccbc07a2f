"""Which timesteps are trained on: all alike, or more of those with large losses."""

import torch
from torch import Tensor, nn


class LossSecondMoment(nn.Module):
    """Timesteps drawn by the size of their recent losses, which lowers the variance of the bound's estimate.

    Improved DDPM (Nichol & Dhariwal 2021), Sec. 3.3: with probability proportional to the root of the mean square of
    the last losses. Each loss is weighted by one over T times its probability, so the expectation stays that of
    uniform timesteps. Until every timestep has a full history, timesteps are uniform.

    It learns by `update`, not by gradient; its buffers belong into a checkpoint.

    Args:
        num_timesteps: T.
        history: how many losses of each timestep are remembered.
        uniform: share of the draws that stays uniform.
    """

    history: Tensor
    counts: Tensor

    def __init__(self, num_timesteps: int, history: int = 10, uniform: float = 0.001) -> None:
        super().__init__()
        if num_timesteps < 1 or history < 1 or not 0 <= uniform <= 1:
            raise ValueError(
                f"num_timesteps={num_timesteps} and history={history} must be 1 or more, uniform={uniform} from 0 to 1"
            )
        self.uniform = uniform
        self.register_buffer("history", torch.zeros(num_timesteps, history, dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(num_timesteps, dtype=torch.long))

    def probabilities(self) -> Tensor:
        """(T,) float64, of sum 1."""
        timesteps, length = self.history.shape
        if bool((self.counts < length).any()):
            return self.history.new_full((timesteps,), 1 / timesteps)
        size = self.history.square().mean(1).sqrt()
        if not size.sum() > 0:
            return torch.full_like(size, 1 / timesteps)
        return (1 - self.uniform) * size / size.sum() + self.uniform / timesteps

    def draw(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Timesteps for uniform draws from [0, 1), which may be spread evenly, and the weights of their losses.

        (B,) -> (B,) long and (B,) float32
        """
        probabilities = self.probabilities()
        ends = probabilities.cumsum(0)
        place = uniform.to(ends) * ends[-1]
        timesteps = torch.searchsorted(ends, place, right=True).clamp(max=len(ends) - 1)
        return timesteps, (1 / (len(ends) * probabilities[timesteps])).float()

    def update(self, timesteps: Tensor, losses: Tensor) -> None:
        """Remember losses, the oldest of a timestep giving way. Both (B,), in the order in which they are to count.

        On several processes all must give the same, those of all of them. Losses that are not finite are passed over.
        """
        length = self.history.shape[1]
        for t, loss in zip(timesteps.tolist(), losses.detach().to(self.history).unbind(), strict=True):
            if not bool(loss.isfinite()):
                continue
            if self.counts[t] == length:
                self.history[t] = self.history[t].roll(-1)
                self.history[t, -1] = loss
            else:
                self.history[t, self.counts[t]] = loss
                self.counts[t] += 1
