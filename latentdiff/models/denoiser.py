"""The contract of a network that denoises, as far as it goes beyond a plain call.

Every denoiser is called as a whole by trainers: ``network(sample, timestep, **conditioning.arguments()).sample``.
Sampling repeats that call with the same conditions and many timesteps, so a denoiser may also offer its parts::

    prepared = network.prepare(conditioning)                        # once per prompt
    for timestep in timesteps:
        time = network.embed_time(timestep, class_labels=..., timestep_cond=...)
        prediction = network.denoise(latents, time, prepared)
"""

from collections.abc import Sequence
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from latentdiff.conditioning import Conditioning


class Prepared(Protocol):
    """What a denoiser makes of conditions; the batch is its entries' first dimension."""

    def select(self, index: slice | Tensor) -> Self: ...


P = TypeVar("P", bound=Prepared)


class Denoiser(Protocol[P]):
    """A network whose parts may be called by themselves. Ours are; diffusers' are called as a whole.

    The config has ``in_channels``, ``out_channels`` and ``sample_size``, the side or the (height, width) of latents in
    training.
    """

    config: Any

    @property
    def downscale_factor(self) -> int:
        """What sides are multiples of where the network rounds nothing. Other sides may be possible."""

    @property
    def works_in_parts(self) -> bool:
        """Whether the parts may be called now; where it is compiled, or offloaded in groups, only the whole network.

        A network wrapped by ``torch.compile`` does not know of it.
        """

    def prepare(self, conditioning: Conditioning) -> P:
        """All that can be computed from the conditions alone."""

    def prepared_by(self) -> Sequence[nn.Module]:
        """The modules whose weights `prepare` uses: if they change, what was prepared is out of date."""

    def embed_time(
        self,
        timesteps: Tensor | float,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
    ) -> Tensor:
        """Timesteps, one number or (B,), with labels and an embedded guidance scale -> (1 or B, D)."""

    def denoise(self, sample: Tensor, time: Tensor, prepared: P) -> Tensor:
        """Noisy latents (B, C, H, W), `embed_time`'s result and `prepare`'s -> the prediction (B, C', H, W)."""
