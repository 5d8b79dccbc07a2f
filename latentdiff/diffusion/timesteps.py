"""Which timesteps are trained on, all alike or by their losses, and which are kept for sampling in fewer steps."""

from collections.abc import Sequence
from itertools import accumulate

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


def space_timesteps(num_timesteps: int, sections: int | str | Sequence[int]) -> list[int]:
    """Timesteps to keep of 0, ..., T - 1, in rising order. Improved DDPM (Nichol & Dhariwal 2021), Sec. 4.

    Args:
        num_timesteps: T.
        sections: how many to keep, evenly spread with both ends; or several counts, one for each of as many sections
            of equal length, such as ``[10, 10, 5]`` or ``"10,10,5"``; or ``"ddim50"``, 50 at a fixed stride from 0
            (DDIM, Song et al. 2021).

    Raises:
        ValueError: there are fewer timesteps, or `sections` is none of these.
    """
    if isinstance(sections, str) and sections.startswith("ddim"):
        return strided(num_timesteps, whole_numbers(sections[4:])[0])
    counts = whole_numbers(sections) if isinstance(sections, str) else sections
    counts = [counts] if isinstance(counts, int) else list(counts)
    if not 1 <= len(counts) <= num_timesteps:
        raise ValueError(f"{num_timesteps} timesteps cannot be divided into {len(counts)} sections")
    length, longer = divmod(num_timesteps, len(counts))
    kept: list[int] = []
    start = 0
    for i, count in enumerate(counts):
        size = length + (i < longer)
        if not 1 <= count <= size:
            raise ValueError(f"{count} timesteps cannot be kept of a section of {size} (of {num_timesteps} in all)")
        stride = (size - 1) / (count - 1) if count > 1 else 0.0
        kept += [start + round(place) for place in accumulate([0.0] + [stride] * (count - 1))]  # as the released code
        start += size
    return kept


def strided(num_timesteps: int, count: int) -> list[int]:
    for stride in range(1, num_timesteps + 1):
        kept = range(0, num_timesteps, stride)
        if len(kept) == count:
            return list(kept)
    raise ValueError(f"there is no stride at which just {count} of {num_timesteps} timesteps lie")


def whole_numbers(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise ValueError(f"{text!r} is not a number of timesteps, or several with commas between them, or 'ddimN'")
    return [int(part) for part in parts]
