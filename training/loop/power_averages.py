"""Averages of the weights over a run, of any length chosen afterwards. Karras et al. 2024 (EDM2), Sec. 3 and App. C.

A power-function average of the weights theta(1), ..., theta(t) weighs them by a profile p(tau) in proportion to
tau^gamma, so it keeps the same share of a run however long that gets. Averages of two lengths, kept now and then while
training, are enough to put one of any other length together.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

LENGTHS = (0.05, 0.10)
"""Of the averages that training keeps, as shares of the run (the paper's sigma_rel)."""
LONGEST = 12**-0.5
"""The length at which all weights so far count alike, gamma = 0."""
AVERAGES = "averages"
"""The folder with them in a run's ``training/``."""
UPDATES, LENGTH = "updates", "length"
"""What the header of a file of averages says."""


def exponent(length: float) -> float:
    """gamma of the profile whose standard deviation is this share of the run. EDM2, Sec. 3.1.

    Raises:
        ValueError: there is none.
    """
    if not 0 < length <= LONGEST:
        raise ValueError(
            f"a length of {length:g} cannot be: it is a share of the run above 0, and at most {LONGEST:.3g}"
        )
    # length^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3))
    wide = length**-2
    return float(max(np.roots([1, 7, 16 - wide, 12 - wide]).real.max(), 0.0))


def overlap(first: tuple[float, float], second: tuple[float, float]) -> float:
    """The integral of the product of two profiles, each (gamma, t).

    p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1) on [0, t].
    """
    (one, end), (two, other) = first, second
    power, least = one + two + 1, min(end, other)
    ends = (one + 1) * math.log(least / end) + (two + 1) * math.log(least / other)
    return (one + 1) * (two + 1) / power / least * math.exp(ends)


def mixture(kept: Sequence[tuple[float, float]], wanted: tuple[float, float]) -> tuple[NDArray[np.float64], float]:
    """By how much to take averages so that their profiles come closest to another one. EDM2, Sec. 3.2.

    Args:
        kept: (gamma, t) of each average.
        wanted: the other one's.

    Returns:
        The factors (N,), which add up to 1, and how far their profile is off, as a share of the norm of the wanted one.
    """
    products = np.array([[overlap(one, two) for two in kept] for one in kept])
    aims = np.array([overlap(one, wanted) for one in kept])
    scale = np.sqrt(np.diag(products))  # so that no length weighs more than another in the rounding
    system = np.zeros((len(kept) + 1, len(kept) + 1))
    system[:-1, :-1] = products / np.outer(scale, scale)
    system[-1, :-1] = system[:-1, -1] = 1 / scale  # their sum, with Lagrange's multiplier
    factors = np.linalg.lstsq(system, np.append(aims / scale, 1.0), rcond=1e-12)[0][:-1] / scale
    norm = overlap(wanted, wanted)
    missed = norm - 2 * factors @ aims + factors @ products @ factors
    return factors, math.sqrt(max(missed, 0.0) / norm)


class PowerAverages:
    """Power-function averages of the lengths `LENGTHS`, in float32, which follow the trained weights.

    Args:
        parameters: by their names, on their device.
    """

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        self.parameters, self.updates = parameters, 0
        first = [parameter.detach().float().clone() for parameter in parameters.values()]
        self.averages = [[one.clone() for one in first] for _ in LENGTHS]

    @property
    def weights(self) -> list[Tensor]:
        """All averages, those of one length after those of the other."""
        return [tensor for one in self.averages for tensor in one]

    @torch.no_grad()
    def update(self) -> None:
        """Follow the trained weights after they have changed: beta = (1 - 1/t)^(gamma + 1). EDM2, Sec. 3.1."""
        self.updates += 1
        now = [parameter.detach().float() for parameter in self.parameters.values()]
        for length, averages in zip(LENGTHS, self.averages, strict=True):
            share = 1 - (1 - 1 / self.updates) ** (exponent(length) + 1)
            torch._foreach_lerp_(averages, now, share)

    def restore(self, weights: Sequence[Tensor], updates: int) -> None:
        """Go on from the averages of a checkpoint."""
        self.updates = updates
        for mine, saved in zip(self.weights, weights, strict=True):
            mine.copy_(saved)

    def files(self) -> list[tuple[dict[str, Tensor], dict[str, str]]]:
        """Content and header of a file for each length."""
        said: list[dict[str, str]] = [{UPDATES: str(self.updates), LENGTH: repr(length)} for length in LENGTHS]
        named = (dict(zip(self.parameters, one, strict=True)) for one in self.averages)
        return list(zip(named, said, strict=True))


def power_averages_of(objective: nn.Module, settings: Any) -> PowerAverages | None:
    """The averages that the settings ask for, of what an objective trains."""
    if not settings.ema_snapshots:
        return None
    return PowerAverages({name: one for name, one in objective.named_parameters() if one.requires_grad})
