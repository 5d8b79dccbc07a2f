"""The time embedding of a UNet: of the timestep, and with it of a class, a noise level or a guidance scale."""

from typing import Any

import torch
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from latentdiff.models.layers import TimestepEmbedding, Timesteps
from latentdiff.models.network import Network


class TimeConditioned(Network):
    """A network whose resnet blocks receive the embedding of a timestep."""

    def build_time(self) -> int:
        """Make the layers that the config asks for. Returns the width of `embed_time`'s result."""
        config = self.config
        width = config.block_out_channels[0]
        dim = config.time_embedding_dim or width * 4
        self.time_proj = Timesteps(width, config.flip_sin_to_cos, config.freq_shift)
        self.time_embedding = TimestepEmbedding(width, dim, config.get("time_cond_proj_dim"))
        self.class_embedding = class_embedding(config, dim)
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
        return torch.cat([time, label], dim=-1) if self.config.get("class_embeddings_concat") else time + label

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


def class_embedding(config: Any, dim: int) -> nn.Module | None:
    """The layer that turns ``class_labels`` into embeddings of width `dim`, if the config asks for one."""
    kind, given = config.get("class_embed_type"), config.get("projection_class_embeddings_input_dim")
    if kind is None:
        number = config.get("num_class_embeds")
        return None if number is None else nn.Embedding(number, dim)
    if kind == "timestep":
        return TimestepEmbedding(config.block_out_channels[0], dim)
    if kind == "projection":
        return TimestepEmbedding(given, dim)
    if kind == "simple_projection":
        return nn.Linear(given, dim)
    return nn.Identity()
