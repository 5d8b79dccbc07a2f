"""How codes are learned and drawn: in raster order, or hidden and shown again. Tensors in, tensors out.

MaskGIT: Masked Generative Image Transformer (Chang et al. 2022); DALL-E (Ramesh et al. 2021).
"""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from latentdiff.diffusion.process import Clock


class TokenOrder(Clock):
    """The order in which codes are learned and drawn; it stands where diffusion has a scheduler."""

    config: ClassVar[Mapping[str, Any]] = MappingProxyType({})


class RasterOrder(TokenOrder):
    """Each code from those before it: there is one time, and nothing is hidden."""

    name = "raster"
    num_timesteps = 1

    def times(self, uniform: Tensor) -> Tensor:
        return torch.zeros_like(uniform)


class MaskedOrder(TokenOrder):
    """Hidden codes from the others. A time from 0 to 1 says how many are hidden; bands count it in hundredths."""

    name = "masked"
    num_timesteps = 100

    def times(self, uniform: Tensor) -> Tensor:
        return uniform

    def model_time(self, times: Tensor) -> Tensor:
        return times * self.num_timesteps

    def hidden(self, noise: Tensor, times: Tensor) -> Tensor:
        """Which codes are hidden at `times` (B,): (B, ...) bool; those of the largest `noise`, at least one."""
        flat = noise.flatten(1)
        count = (hidden_share(times) * flat.shape[1]).ceil().clamp(1, flat.shape[1])  # MaskGIT, Sec. 3.1
        rank = flat.argsort(dim=1, descending=True).argsort(dim=1)
        return (rank < count[:, None].to(rank.device)).view_as(noise)


ORDERS: dict[str, type[TokenOrder]] = {"raster": RasterOrder, "masked": MaskedOrder}


def hidden_share(times: Any) -> Any:
    """The share of codes that is hidden at a time from 0 (none) to 1 (all). MaskGIT, Sec. 3.3, with r = 1 - t."""
    return torch.sin(times * (math.pi / 2)) if isinstance(times, Tensor) else math.sin(times * math.pi / 2)


def probabilities(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Logits (..., K) -> what codes are drawn from, (..., K) float32.

    Args:
        temperature: divides the logits; 0: the likeliest code alone.
        top_k: only this many of the likeliest. Hierarchical Neural Story Generation (Fan et al. 2018), Sec. 5.4.
        top_p: only the likeliest whose probabilities together reach this. Holtzman et al. 2020, Sec. 3.1.
    """
    logits = logits.float()
    if temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    shares = logits.softmax(-1)
    if top_p is not None and top_p < 1:
        ordered, places = shares.sort(dim=-1, descending=True, stable=True)
        beyond = ordered.cumsum(-1) - ordered >= top_p  # reached without it
        shares = shares.masked_fill(torch.zeros_like(beyond).scatter(-1, places, beyond), 0.0)
        shares = shares / shares.sum(-1, keepdim=True)
    return shares


def choose(shares: Tensor, uniform: Tensor) -> Tensor:
    """A code for each row of probabilities (..., K), by a uniform number in [0, 1) (...): (...) long."""
    sums = shares.cpu().double().cumsum(-1) if shares.device.type == "mps" else shares.double().cumsum(-1)
    wanted = uniform.to(sums.device).double()[..., None] * sums[..., -1:]
    found = torch.searchsorted(sums, wanted, right=True)[..., 0]
    return found.clamp_(max=shares.shape[-1] - 1).to(shares.device)


def hidden_after(step: int, steps: int, hidden_before: Tensor, hidden_at_first: Tensor) -> Tensor:
    """How many codes (B,) are still hidden after a step (from 0) of `steps`: fewer than before it, and none at the end.

    MaskGIT, Sec. 3.2, step 3.
    """
    if step + 1 >= steps:
        return torch.zeros_like(hidden_before)
    wanted = (hidden_at_first * hidden_share(1 - (step + 1) / steps)).floor().long()
    return torch.minimum(wanted, hidden_before - 1).clamp(min=0)


def still_hidden(chosen_share: Tensor, hidden: Tensor, left: Tensor, noise: Tensor) -> Tensor:
    """Which codes stay hidden, (B, L) bool: the `left` (B,) of which the model is the least sure. MaskGIT, Sec. 3.2.

    Args:
        chosen_share: (B, L), the probability of the code that was chosen.
        hidden: (B, L), before the step.
        noise: (B, L), added to the logarithms.
    """
    sureness = (chosen_share.log() + noise).masked_fill(~hidden, math.inf)
    rank = sureness.argsort(dim=1, stable=True).argsort(dim=1)
    return hidden & (rank < left[:, None])
