"""``IdentityAutoencoder``: no compression, factor 1, so that pipelines and trainers work on pixels.

LDM-1 in Latent Diffusion (Rombach et al. 2022), Sec. 4.1.
"""

from typing import Any

import torch
from diffusers import ModelMixin  # noqa: F401  diffusers' loader of pipelines looks for it beside the class
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from latentdiff.models.autoencoder import AutoencoderOutput
from latentdiff.models.bottlenecks import BottleneckOutput, DiagonalGaussianDistribution, Generators
from latentdiff.models.network import Network


class PixelDistribution(DiagonalGaussianDistribution):
    """A distribution without spread: a sample is the mean, whatever the generator.

    Args:
        pixels: (B, C, H, W).
    """

    def __init__(self, pixels: Tensor) -> None:
        super().__init__(torch.cat([pixels, torch.full_like(pixels, -30.0)], dim=1))

    @property
    def std(self) -> Tensor:
        return torch.zeros_like(self.mean)

    @property
    def var(self) -> Tensor:
        return torch.zeros_like(self.mean)

    def sample(self, generator: Generators = None) -> Tensor:
        return self.mean

    def kl(self, other: DiagonalGaussianDistribution | None = None) -> Tensor:
        """(B,) zeros, as for diffusers' deterministic distributions."""
        return self.mean.new_zeros(len(self.mean))

    def nll(self, sample: Tensor, dims: tuple[int, ...] = (1, 2, 3)) -> Tensor:
        """Zeros, as `kl`."""
        return torch.zeros_like(sample).sum(dim=dims)


class IdentityAutoencoder(Network):
    """Pixels as latents, with the methods of `AutoencoderKL`: a denoiser on it is a diffusion model of pixels.

    It has nothing to learn. Its one parameter is unused; it gives the model a file, a device and a dtype. diffusers has
    no such class: a pipeline folder with it names ours.

    Args:
        in_channels, out_channels, latent_channels: channels of the pictures, all the same.
        block_out_channels: of one level, from whose number the factor 2^(levels - 1) = 1 is computed.
        scaling_factor: latents are multiplied by it; with 1, pixels in [-1, 1] are noised unscaled.
        sample_size: unused; diffusers' pipelines read it.

    Raises:
        ValueError: a key is unknown, the numbers of channels differ, or there is more than one level.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        latent_channels: int = 3,
        block_out_channels: tuple[int, ...] = (1,),
        sample_size: int = 32,
        scaling_factor: float = 1.0,
        shift_factor: float | None = None,
        force_upcast: bool = False,
        **others: Any,
    ) -> None:
        super().__init__()
        self.accept_neutral(others)
        self.per_level("in_channels")
        if not in_channels == out_channels == latent_channels:
            raise ValueError(
                f"IdentityAutoencoder: in_channels={in_channels}, out_channels={out_channels} and "
                f"latent_channels={latent_channels} must be the same, since nothing is changed."
            )
        self.per_level("block_out_channels")
        self.one = nn.Parameter(torch.ones(1), requires_grad=False)

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[PixelDistribution]:
        """(B, C, H, W), values in [-1, 1] -> a distribution without spread, as ``.latent_dist``."""
        posterior = PixelDistribution(x)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    def decode(
        self, z: Tensor, return_dict: bool = True, generator: Generators = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Unscaled latents (B, C, H, W) -> the same as ``.sample``."""
        return DecoderOutput(sample=z) if return_dict else (z,)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: Generators = None,
    ) -> AutoencoderOutput | tuple[Tensor]:
        """(B, C, H, W) -> the same as ``.sample`` and as the latents of ``.bottleneck``, which has no losses."""
        bottleneck = BottleneckOutput(sample, {}, {})
        return AutoencoderOutput(sample, bottleneck=bottleneck) if return_dict else (sample,)

    def enable_slicing(self) -> None:
        """Has no effect, like `enable_tiling`: there is no memory to save."""

    def disable_slicing(self) -> None: ...

    def enable_tiling(self, use_tiling: bool = True) -> None: ...

    def disable_tiling(self) -> None: ...
