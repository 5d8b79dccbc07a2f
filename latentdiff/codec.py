"""Pixels to scaled latents and back, with any autoencoder: where pipelines and training scale latents.

What a denoiser works on is (latents - shift) * scale, by the autoencoder's ``scaling_factor`` and ``shift_factor`` (the
latter as in Stable Diffusion 3), so that it has about unit variance; where the config has ``latents_mean`` and
``latents_std``, as Playground 2.5's, it is (latents - mean) / std * scale, by channel. `pipelines.storage.onnx`
traces this code into its graphs.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.models.network import downscale_factor

Generators = torch.Generator | list[torch.Generator] | None


@dataclass(frozen=True)
class Posterior:
    """What an encoder says of a picture's latents, unscaled: a normal distribution, or a point."""

    mean: Tensor
    """(B, C, h, w)"""
    std: Tensor | None = None
    """(B, C, h, w); None where there is no spread: codes, before they are quantized."""

    def sample(self, noise: Tensor) -> Tensor:
        """A draw by standard normal noise (B, C, h, w)."""
        return self.mean if self.std is None else self.mean + self.std * noise

    def repeat(self, times: int) -> "Posterior":
        """Every picture's `times` times in a row."""
        std = None if self.std is None else self.std.repeat_interleave(times, dim=0)
        return Posterior(self.mean.repeat_interleave(times, dim=0), std)


@dataclass(frozen=True)
class Codec:
    """An autoencoder, ours or diffusers': Gaussian, with codes, or none at all (pixels as latents).

    Tiles and slices are the autoencoder's own options. Whatever is given is brought to the device and the precision in
    which the autoencoder computes, also while offloading keeps its weights elsewhere.
    """

    autoencoder: Any

    @property
    def factor(self) -> int:
        """Pixels per latent along one side."""

        return downscale_factor(self.autoencoder.config)

    @property
    def channels(self) -> int:
        """C, of the latents."""
        return int(self.autoencoder.config.latent_channels)

    @property
    def scale(self) -> float:
        return float(self.autoencoder.config.scaling_factor)

    @property
    def shift(self) -> float:
        return float(getattr(self.autoencoder.config, "shift_factor", None) or 0.0)

    @cached_property
    def is_identity(self) -> bool:
        """Whether latents are pixels in [-1, 1], with all values of 8 bits among them."""
        from latentdiff.models.identity import IdentityAutoencoder

        return isinstance(self.autoencoder, IdentityAutoencoder) and self.scale == 1

    @property
    def kept_as(self) -> torch.dtype:
        """In what caches keep latents: pixels exactly."""
        return torch.float32 if self.is_identity else torch.float16

    @cached_property
    def spread(self) -> tuple[Tensor, Tensor] | None:
        """Mean and standard deviation of each channel of the autoencoder's latents, (C, 1, 1), where its config says.

        Raises:
            ValueError: they are not one for each channel, or a deviation is not above 0.
        """
        names = ("latents_mean", "latents_std")
        given: list[Any] = [getattr(self.autoencoder.config, name, None) for name in names]
        if given[0] is None or given[1] is None:
            return None
        listed = all(isinstance(values, list | tuple) and len(values) == self.channels for values in given)
        if (
            not listed
            or not all(isinstance(one, int | float) for values in given for one in values)
            or min(given[1]) <= 0
        ):
            raise ValueError(
                f"{type(self.autoencoder).__name__}: latents_mean={given[0]} and latents_std={given[1]} must have "
                f"a number for each of {self.channels} channels, and deviations above 0"
            )
        mean, std = (torch.tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in given)
        return mean, std

    def scaled(self, latents: Tensor) -> Tensor:
        """Latents of the autoencoder -> those of the denoiser. (B, C, h, w)"""
        if self.spread is not None:
            mean, std = (one.to(latents) for one in self.spread)
            return (latents - mean) * self.scale / std
        return (latents - self.shift) * self.scale

    def unscaled(self, latents: Tensor) -> Tensor:
        """Latents of the denoiser -> those of the autoencoder. (B, C, h, w)"""
        if self.spread is not None:
            mean, std = (one.to(latents) for one in self.spread)
            return latents * std / self.scale + mean
        return latents / self.scale + self.shift

    def posterior(self, pixels: Tensor) -> Posterior:
        """Pixels (B, 3, H, W), values in [-1, 1] -> their unscaled latents (B, C, h, w)."""
        encoded = self.autoencoder.encode(self._placed(pixels))
        if hasattr(encoded, "latent_dist"):
            return Posterior(encoded.latent_dist.mean, encoded.latent_dist.std)
        return Posterior(encoded.latents)

    def encode(
        self,
        pixels: Tensor,
        generator: Generators = None,
        count: int | None = None,
        noise_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Pixels (P, 3, H, W), values in [-1, 1] -> scaled latents (count, C, h, w), each picture's in a row.

        A posterior with a spread is sampled: with a list of generators each of the `count` images separately, otherwise
        once for each picture.

        Args:
            count: a multiple of P; by default P.
            noise_dtype: in which noise is drawn: other noise than in another one. By default the autoencoder's.
        """
        from diffusers.utils.torch_utils import randn_tensor  # not with the module: it takes a while

        posterior, repeats = self.posterior(pixels), (count or len(pixels)) // len(pixels)
        if posterior.std is None:
            return self.scaled(posterior.mean.repeat_interleave(repeats, dim=0))
        if isinstance(generator, list):
            posterior, repeats = posterior.repeat(repeats), 1
        mean = posterior.mean
        dtype = noise_dtype or mean.dtype
        noise = randn_tensor(mean.shape, generator=generator, device=mean.device, dtype=dtype).to(mean.dtype)
        return self.scaled(posterior.sample(noise).repeat_interleave(repeats, dim=0))

    def encode_with(self, pixels: Tensor, noise: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) -> scaled latents (B, C, h, w), drawn by standard normal `noise` of their shape."""
        posterior = self.posterior(pixels)
        return self.scaled(posterior.sample(noise.to(posterior.mean)))

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) -> pixels (B, 3, H, W), values about [-1, 1]."""
        return self.autoencoder.decode(self.unscaled(self._placed(latents)), return_dict=False)[0]

    def _placed(self, tensor: Tensor) -> Tensor:
        from_host = tensor.device.type == "cpu"
        return tensor.to(execution_device(self.autoencoder), self.autoencoder.dtype, non_blocking=from_host)


@dataclass(frozen=True)
class TokenCodec(Codec):
    """An autoencoder with codes, whose latents here are the codes' indices: (B, 1, h, w) of whole numbers.

    Raises:
        ValueError: the autoencoder has no codes.
    """

    def __post_init__(self) -> None:
        if not hasattr(self.autoencoder, "decode_from_indices"):
            raise ValueError(
                f"a {type(self.autoencoder).__name__} has no codes; take an autoencoder of kind=vq, fsq or gumbel"
            )

    channels = 1
    scale = 1.0
    shift = 0.0
    spread = None

    @cached_property
    def is_identity(self) -> bool:
        return False

    @property
    def kept_as(self) -> torch.dtype:
        return torch.int16 if self.codes <= 1 << 15 else torch.int32

    @property
    def codes(self) -> int:
        """How many there are."""
        return int(self.autoencoder.codes)

    def posterior(self, pixels: Tensor) -> Posterior:
        """Pixels (B, 3, H, W), values in [-1, 1] -> their codes (B, 1, h, w), float32."""
        return Posterior(self.autoencoder.encode_to_indices(self._placed(pixels))[:, None].float())

    def decode(self, latents: Tensor) -> Tensor:
        """Codes (B, 1, h, w) -> pixels (B, 3, H, W), values about [-1, 1]."""
        return self.autoencoder.decode_from_indices(latents[:, 0].to(execution_device(self.autoencoder)).long())


def execution_device(network: nn.Module) -> torch.device:
    """Where a network computes, which is not where its weights are while they are offloaded.

    Accelerate's and diffusers' offloading leaves hooks on the network or on its layers that say so; methods other than
    ``forward`` have the weights brought there, but not their arguments.
    """
    for module in network.modules():
        hook: Any = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            device = getattr(one, "execution_device", None)
            if device is not None:
                return torch.device(device)
        registry: Any = getattr(module, "_diffusers_hook", None)
        group = None if registry is None else registry.get_hook("group_offloading")
        if group is not None:
            return torch.device(group.config.onload_device)
    weight = next(network.parameters(), None)
    return torch.device("cpu") if weight is None else weight.device
