"""The time embedding of a UNet: of the timestep, and with it of a class, a noise level or a guidance scale."""

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from latentdiff.models.network import Network


def timestep_features(timesteps: Tensor, dim: int, flip_sin_to_cos: bool, freq_shift: float) -> Tensor:
    """Sinusoids of a timestep: (B,) -> (B, dim), float32. Attention Is All You Need (Vaswani et al. 2017), Sec. 3.5.

    Frequency i is 10000^(-i / (dim/2 - freq_shift)). The order is [sin, cos], or [cos, sin] with ``flip_sin_to_cos``.
    """
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) / (half - freq_shift)
    angles = timesteps[:, None].float() * torch.exp(-math.log(10000) * exponents)  # (B, dim/2)
    waves = (angles.cos(), angles.sin()) if flip_sin_to_cos else (angles.sin(), angles.cos())
    return F.pad(torch.cat(waves, dim=-1), (0, dim % 2))


class Timesteps(nn.Module):
    """`timestep_features` as a module without parameters, which diffusers' classes look for in a UNet."""

    def __init__(self, dim: int, flip_sin_to_cos: bool, freq_shift: float) -> None:
        super().__init__()
        self.dim, self.flip_sin_to_cos, self.freq_shift = dim, flip_sin_to_cos, freq_shift

    def forward(self, timesteps: Tensor) -> Tensor:
        """(B,) -> (B, dim), float32."""
        return timestep_features(timesteps, self.dim, self.flip_sin_to_cos, self.freq_shift)


class TimestepEmbedding(nn.Module):
    """Two linear layers that turn sinusoids into the embedding every resnet block of the UNet receives.

    ``condition_dim``: width of a condition that is added to the time's features, such as an embedded guidance scale.
    """

    def __init__(self, in_dim: int, dim: int, condition_dim: int | None = None) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, dim)
        self.cond_proj = None if condition_dim is None else nn.Linear(condition_dim, in_dim, bias=False)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, features: Tensor, condition: Tensor | None = None) -> Tensor:
        """(B, in_dim), maybe (B, condition_dim) -> (B, dim)."""
        if condition is not None:
            assert self.cond_proj is not None
            features = features + self.cond_proj(condition)
        return self.linear_2(F.silu(self.linear_1(features)))


class FourierFeatures(nn.Module):
    """Sinusoids of a noise level, or its logarithm, at random frequencies. Score SDE (Song et al. 2021), App. C."""

    def __init__(self, dim: int, *, scale: float, log: bool, flip_sin_to_cos: bool) -> None:
        super().__init__()
        self.log, self.flip_sin_to_cos = log, flip_sin_to_cos
        self.weight = nn.Parameter(torch.randn(dim // 2) * scale, requires_grad=False)

    def forward(self, timesteps: Tensor) -> Tensor:
        """(B,) -> (B, dim)."""
        levels = timesteps.log() if self.log else timesteps
        angles = levels[:, None] * self.weight[None] * 2 * math.pi  # (B, dim/2)
        waves = (angles.cos(), angles.sin()) if self.flip_sin_to_cos else (angles.sin(), angles.cos())
        return torch.cat(waves, dim=-1)


class AddedEmbedding(TimestepEmbedding):
    """A pooled embedding and numbers, such as sizes in pixels, as one embedding: SDXL (Podell et al. 2023), Sec. 2.2.

    Args:
        in_dim: width of the pooled embedding and of all sinusoids together.
        features: makes the sinusoids of a number.
    """

    def __init__(self, in_dim: int, dim: int, features: Timesteps) -> None:
        super().__init__(in_dim, dim)
        self.features, self.in_dim = features, in_dim

    def embed(self, pooled: Tensor | None, time_ids: Tensor | None) -> Tensor:
        """(B, D'), (B, N) -> (B, dim).

        Raises:
            ValueError: one of them is missing, or they are not as wide as the UNet was made for.
        """
        if pooled is None or time_ids is None:
            missing = "the pooled embedding (text_embeds)" if pooled is None else "the sizes (time_ids)"
            raise ValueError(
                f"this UNet has addition_embed_type='text_time', as SDXL's, and {missing} of its conditions is missing"
            )
        numbers = self.features(time_ids.reshape(-1)).reshape(len(time_ids), -1).to(pooled.dtype)  # (B, N features)
        if pooled.shape[-1] + numbers.shape[-1] != self.in_dim:
            raise ValueError(
                f"the UNet has projection_class_embeddings_input_dim={self.in_dim}; a pooled embedding "
                f"{pooled.shape[-1]} wide with {time_ids.shape[-1]} numbers makes "
                f"{pooled.shape[-1] + numbers.shape[-1]}: the text encoder is not the one this UNet was made for, or "
                f"the numbers are too few or too many"
            )
        features, layer = torch.cat([pooled, numbers], dim=-1), self.linear_1
        # Hooks of diffusers may keep the weights in another dtype than they compute.
        return self(features if hasattr(layer, "_diffusers_hook") else features.to(layer.weight.dtype))


class TimeConditioned(Network):
    """A network whose resnet blocks receive the embedding of a timestep."""

    of_noise_levels: ClassVar[bool] = False
    """Whether timesteps with Fourier features are noise levels, as score SDE's are."""

    def build_time(self) -> int:
        """Make the layers that the config asks for. Returns the width of `embed_time`'s result."""
        config = self.config
        width, kind = config.block_out_channels[0], config.get("time_embedding_type", "positional")
        dim, features = config.time_embedding_dim or width * 4, width
        if kind == "fourier" and self.of_noise_levels:
            features = 2 * width
            self.time_proj: nn.Module = FourierFeatures(features, scale=16.0, log=True, flip_sin_to_cos=False)
        elif kind == "fourier":
            dim = features = config.time_embedding_dim or width * 2
            if dim % 2:
                self.refuse("time_embedding_dim", dim, "is odd; Fourier features need an even number.")
            self.time_proj = FourierFeatures(dim, scale=1.0, log=False, flip_sin_to_cos=config.flip_sin_to_cos)
        elif kind == "learned":
            self.time_proj = nn.Embedding(self.per_level("num_train_timesteps")[0], width)
        else:
            self.time_proj = Timesteps(width, config.flip_sin_to_cos, config.freq_shift)
        self.time_embedding = TimestepEmbedding(features, dim, config.get("time_cond_proj_dim"))
        self.class_embedding = class_embedding(config, features, dim)
        self.add_embedding = None
        if config.get("addition_embed_type") is not None:
            sinusoids = Timesteps(config.addition_time_embed_dim, config.flip_sin_to_cos, config.freq_shift)
            self.add_embedding = AddedEmbedding(config.projection_class_embeddings_input_dim, dim, sinusoids)
        return dim * 2 if config.get("class_embeddings_concat") else dim

    @apply_forward_hook
    def embed_time(
        self,
        timesteps: Tensor | float,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
    ) -> Tensor:
        """Timesteps, one number or (B,) -> (1 or B, D). Device and dtype of the result are the weights', or given.

        ``class_labels``, for a UNet with class embeddings: (B,) whole numbers below ``num_class_embeds``, (B,) numbers
        like timesteps, (B, D), or (B, ``projection_class_embeddings_input_dim``), by ``class_embed_type``; Stable
        Diffusion's upscaler receives its noise level this way. With ``class_embeddings_concat`` the result is (B, 2D).
        ``timestep_cond``, for a UNet with ``time_cond_proj_dim``: (B, that), the embedding of a guidance scale
        for a UNet that was distilled to give guided predictions (LCM, Luo et al. 2023).

        Raises:
            ValueError: labels are given and the UNet has no class embeddings, or the other way round; a condition is
                given to a UNet that takes none.
        """
        if timestep_cond is not None and self.time_embedding.cond_proj is None:
            raise ValueError(f"{type(self).__name__}: timestep_cond was given, but the UNet has no time_cond_proj_dim.")
        layer, timesteps = self.time_embedding.linear_1, torch.as_tensor(timesteps)
        # Hooks of diffusers may keep the weights elsewhere, or in another dtype, than they compute.
        computing = self if hasattr(layer, "_diffusers_hook") else layer.weight
        if device is not None or not layer.weight.is_meta:  # Accelerate's offloading: the weights are nowhere
            timesteps = timesteps.to(device or computing.device)
        features = self.time_proj(timesteps.reshape(-1)).to(dtype or computing.dtype)  # (B, channels)
        time = self.time_embedding(features, timestep_cond)
        if class_labels is None and self.class_embedding is None:
            return time
        label = self._embed_class(class_labels, features)
        if self.config.get("class_embeddings_concat"):
            return torch.cat(torch.broadcast_tensors(time, label), dim=-1)  # one time may serve all labels
        return time + label

    def _embed_class(self, class_labels: Tensor | None, features: Tensor) -> Tensor:
        """(B,) or (B, D) -> (B, D), on the device and in the dtype of the time's ``features``."""
        if self.class_embedding is None:
            raise ValueError(f"{type(self).__name__}: class_labels were given, but the UNet has no class embeddings.")
        if class_labels is None:
            raise ValueError(f"{type(self).__name__}: class_labels are missing; this UNet has class embeddings.")
        class_labels = class_labels.to(features.device)
        if self.config.class_embed_type == "timestep":
            class_labels = self.time_proj(class_labels.reshape(-1)).to(features.dtype)
        return self.class_embedding(class_labels).to(features.dtype)


def class_embedding(config: Any, features: int, dim: int) -> nn.Module | None:
    """What makes embeddings (B, dim) of ``class_labels``, if the config asks for it. `features`: width of a time's."""
    kind, given = config.get("class_embed_type"), config.get("projection_class_embeddings_input_dim")
    if kind is None:
        number = config.get("num_class_embeds")
        return None if number is None else nn.Embedding(number, dim)
    if kind == "timestep":
        return TimestepEmbedding(features, dim)
    if kind == "projection":
        return TimestepEmbedding(given, dim)
    if kind == "simple_projection":
        return nn.Linear(given, dim)
    return nn.Identity()
