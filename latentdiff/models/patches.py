"""What the transformer denoisers share: patches with their positions, the feed-forward layer, and the way out.

DiT (Peebles & Xie 2023), Sec. 3.2. Letters in shape comments: p the side of a patch, L = (H/p) (W/p) patches.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers.loaders import PeftAdapterMixin
from torch import Tensor, nn

from latentdiff.models.layers import Checkpointed
from latentdiff.models.network import Network
from latentdiff.models.time_embedding import TimestepEmbedding, Timesteps
from latentdiff.models.transformer import GEGLU

FEATURES = 256
"""Sinusoids of a timestep."""

OLD_CLASS = "Transformer2DModel"
OLD_KEYS: Mapping[str, tuple[Any, ...]] = {
    "double_self_attention": (False,),
    "only_cross_attention": (False,),
    "num_vector_embeds": (None,),
    "use_linear_projection": (False,),
    "attention_type": ("default",),
    "cross_attention_dim": (None,),
    "caption_channels": (None,),
    "interpolation_scale": (None,),
    "use_additional_conditions": (None, False),
}
"""Of released folders, whose configs name diffusers' former class of all transformers; with values without effect."""


def positions(
    dim: int, height: int, width: int, base: int, stretch: float, device: torch.device | None = None
) -> Tensor:
    """Sinusoids of each place of a grid, row by row: (1, height width, dim), float32.

    Half of them are of its column, half of its row, [sin, cos] each. A grid of another side than `base` is spread over
    the same range, 0 to `base` / `stretch`.
    """
    dtype = torch.float32 if device is not None and device.type == "mps" else torch.float64
    frequencies = 10000.0 ** -(torch.arange(dim // 4, dtype=dtype, device=device) / (dim // 4))
    rows, columns = (
        torch.arange(n, dtype=torch.float32, device=device) / (n / base) / stretch for n in (height, width)
    )
    places = torch.meshgrid(rows, columns, indexing="ij")
    angles = [place.reshape(-1, 1).to(dtype) * frequencies for place in reversed(places)]  # (L, dim/4), columns first
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1).float()[None]


class PatchEmbed(nn.Module):
    """Patches as tokens, with their positions: (B, C, H, W) -> (B, L, D)."""

    def __init__(self, side: int, patch: int, channels: int, dim: int, stretch: float = 1.0) -> None:
        super().__init__()
        self.patch, self.base, self.stretch = patch, side // patch, stretch
        self.proj = nn.Conv2d(channels, dim, patch, stride=patch)
        self.make_positions()

    def make_positions(self) -> None:
        """Of a grid of the size in training."""
        made = positions(self.proj.out_channels, self.base, self.base, self.base, self.stretch)
        self.register_buffer("pos_embed", made, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Raises ValueError if a side is no multiple of the patch's."""
        height, width = x.shape[-2:]
        if height % self.patch or width % self.patch:
            raise ValueError(f"latents of {width}x{height} (width x height) cannot be cut into patches of {self.patch}")
        tokens = self.proj(x).flatten(2).transpose(1, 2)  # (B, L, D)
        grid, own = (height // self.patch, width // self.patch), self.pos_embed
        if grid != (self.base, self.base):
            own = positions(tokens.shape[-1], *grid, self.base, self.stretch, tokens.device)
        return (tokens + own).to(tokens.dtype)


class GELU(nn.Module):
    """A linear layer and GELU (Hendrycks & Gimpel 2016)."""

    def __init__(self, dim: int, out_dim: int, approximate: str) -> None:
        super().__init__()
        self.approximate = approximate
        self.proj = nn.Linear(dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate=self.approximate)


class MLP(nn.Module):
    """(B, L, D) -> (B, L, 4D) -> (B, L, D)."""

    def __init__(self, dim: int, activation: str) -> None:
        super().__init__()
        approximate = "tanh" if activation == "gelu-approximate" else "none"
        first = GEGLU(dim, 4 * dim) if activation == "geglu" else GELU(dim, 4 * dim, approximate)
        self.net = nn.Sequential(first, nn.Identity(), nn.Linear(4 * dim, dim))  # as `transformer.FeedForward`'s

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(B, L, D), and (B or 1, 1, D) twice -> (B, L, D)."""
    return x * (1 + scale) + shift


class PatchTransformer(Network, Checkpointed, PeftAdapterMixin):
    """A denoiser that is a transformer over patches."""

    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns: ClassVar[list[str]] = ["pos_embed", "norm", "adaln_single"]
    config: Any
    transformer_blocks: Any

    @classmethod
    def extract_init_dict(
        cls, config_dict: Mapping[str, Any], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if config_dict.get("_class_name") == OLD_CLASS:
            own = cls._get_init_keys(cls)
            useless = {key for key, values in OLD_KEYS.items() if key not in own and config_dict.get(key) in values}
            config_dict = {key: value for key, value in config_dict.items() if key not in useless}
            config_dict["_class_name"] = cls.__name__
        return super().extract_init_dict(config_dict, **kwargs)

    @property
    def width(self) -> int:
        """D"""
        return int(self.config.num_attention_heads * self.config.attention_head_dim)

    def build_ends(self, stretch: float | None = 1.0, freq_shift: float = 0) -> None:
        """Check the config, and make the layers before the blocks and the norm after them.

        stretch: of the positions; None: as PixArt's, by the size in training.
        """
        config = self.config
        for key in ("num_attention_heads", "attention_head_dim", "in_channels", "num_layers", "patch_size"):
            self.per_level(key)
        if config.out_channels is not None:
            self.per_level("out_channels")
        if not isinstance(config.sample_size, int):
            self.refuse("sample_size", config.sample_size, "is not supported; give one side, a whole number.")
        self.check_multiple("sample_size", [config.sample_size], config.patch_size, "patch_size")
        if self.width % 4:
            self.refuse("attention_head_dim", config.attention_head_dim, "makes a width that is no multiple of 4.")
        self.check_choice("activation_fn", ("gelu-approximate", "gelu", "geglu"))
        stretch = max(config.sample_size // 64, 1) if stretch is None else stretch
        self.pos_embed = PatchEmbed(config.sample_size, config.patch_size, config.in_channels, self.width, stretch)
        self.time_features = Timesteps(FEATURES, True, freq_shift)
        self.norm_out = nn.LayerNorm(self.width, 1e-6, elementwise_affine=False)

    @property
    def patch_values(self) -> int:
        """How many numbers the last layer gives for each patch."""
        config = self.config
        return int(config.patch_size**2 * (config.in_channels if config.out_channels is None else config.out_channels))

    def features(
        self, timesteps: Tensor | float, device: torch.device | None, dtype: torch.dtype | None, layer: nn.Linear
    ) -> Tensor:
        """Timesteps, one number or (B,) -> (1 or B, FEATURES), for a layer that takes them.

        Device and dtype of the result are the layer's, or given.
        """
        timesteps = torch.as_tensor(timesteps)
        # Hooks of diffusers may keep the weights elsewhere, or in another dtype, than they compute.
        computing: Any = self if hasattr(layer, "_diffusers_hook") else layer.weight
        if device is not None or not layer.weight.is_meta:  # Accelerate's offloading: the weights are nowhere
            timesteps = timesteps.to(device or computing.device)
        return self.time_features(timesteps.reshape(-1)).to(dtype or computing.dtype)

    def to_picture(self, tokens: Tensor, size: torch.Size) -> Tensor:
        """Patches (B, L, p p C') as a picture (B, C', H, W) of this (H, W)."""
        patch = self.config.patch_size
        grid = (size[0] // patch, size[1] // patch)
        parts = tokens.unflatten(2, (patch, patch, -1)).unflatten(1, grid)  # (B, h, w, p, p, C')
        return parts.permute(0, 5, 1, 3, 2, 4).reshape(tokens.shape[0], -1, *size)  # len() is a constant to a tracer

    def start_from_nothing(self) -> None:
        """Weights to begin training with, from torch's random numbers: DiT's, by which every block at first passes its
        input on (adaLN-Zero, Sec. 3.2) and the prediction is 0.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.xavier_uniform_(self.pos_embed.proj.weight.data.flatten(1))
        nn.init.zeros_(self.pos_embed.proj.bias)  # type: ignore[arg-type]
        for module in self.modules():
            if isinstance(module, TimestepEmbedding):
                nn.init.normal_(module.linear_1.weight, std=0.02)
                nn.init.normal_(module.linear_2.weight, std=0.02)
