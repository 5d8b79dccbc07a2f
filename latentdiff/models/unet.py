"""``UNet2DConditionModel``: the denoiser of Stable Diffusion 1.x and 2.x, with diffusers' names, keys and weights.

Latent Diffusion (Rombach et al. 2022), Sec. 3.3; the UNet itself is ADM's (Dhariwal & Nichol 2021), Sec. 3.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from latentdiff.models.config import StrictConfig
from latentdiff.models.layers import ResnetBlock2D, TimestepEmbedding, timestep_features
from latentdiff.models.text_context import TextContext
from latentdiff.models.transformer import Attention, SpatialTransformer
from latentdiff.models.unet_blocks import DownBlock, MidBlock, UpBlock
from latentdiff.models.unet_config import NEUTRAL_KEYS, UNetLevels


class UNet2DConditionModel(ModelMixin, StrictConfig, PeftAdapterMixin):
    """Predicts noise (or v, or the picture) from noisy latents, a timestep and the states of a text encoder.

    The config is that of diffusers' class. ``attention_head_dim`` is, there as here, the *number* of heads, for all
    levels or one for each; ``upcast_attention`` is always given (see ``transformer.Attention``).

    A plain call is ``embed_time``, ``encode_text`` and ``denoise``. The first depends on the step only, the second on
    the prompt only, so a sampling loop can compute each once::

        text = TextContext.concatenate([unet.encode_text(negative), unet.encode_text(prompt)])
        times = unet.embed_time(timesteps)                            # (steps, D)
        for time in times.split(1):
            noise = unet.denoise(torch.cat([latents] * 2), time, text)

    Raises:
        ValueError: a key is unknown or asks for what is not supported.
    """

    neutral = NEUTRAL_KEYS
    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["BasicTransformerBlock", "ResnetBlock2D", "UpBlock"]
    _skip_layerwise_casting_patterns: ClassVar[list[str]] = ["norm"]
    _repeated_blocks: ClassVar[list[str]] = ["BasicTransformerBlock"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | Sequence[int] | None = None,
        in_channels: int = 4,
        out_channels: int = 4,
        flip_sin_to_cos: bool = True,
        freq_shift: int = 0,
        down_block_types: Sequence[str] = (
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
            "DownBlock2D",
        ),
        mid_block_type: str | None = "UNetMidBlock2DCrossAttn",
        up_block_types: Sequence[str] = (
            "UpBlock2D",
            "CrossAttnUpBlock2D",
            "CrossAttnUpBlock2D",
            "CrossAttnUpBlock2D",
        ),
        block_out_channels: Sequence[int] = (320, 640, 1280, 1280),
        layers_per_block: int | Sequence[int] = 2,
        dropout: float = 0.0,
        act_fn: str = "silu",
        norm_num_groups: int = 32,
        norm_eps: float = 1e-5,
        cross_attention_dim: int | Sequence[int] = 1280,
        transformer_layers_per_block: int | Sequence[int] = 1,
        attention_head_dim: int | Sequence[int] = 8,
        use_linear_projection: bool = False,
        upcast_attention: bool = False,
        only_cross_attention: bool | Sequence[bool] = False,
        class_embed_type: str | None = None,
        num_class_embeds: int | None = None,
        resnet_time_scale_shift: str = "default",
        time_embedding_dim: int | None = None,
        time_cond_proj_dim: int | None = None,
        **others: Any,
    ) -> None:
        super().__init__()
        self.accept_neutral(others)
        levels = UNetLevels.from_config(self.config)
        time_dim = time_embedding_dim or block_out_channels[0] * 4

        self.conv_in = nn.Conv2d(in_channels, block_out_channels[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(block_out_channels[0], time_dim, time_cond_proj_dim)
        self.class_embedding: nn.Module | None = None
        if class_embed_type == "timestep":
            self.class_embedding = TimestepEmbedding(block_out_channels[0], time_dim)
        elif class_embed_type == "identity":
            self.class_embedding = nn.Identity()
        elif num_class_embeds is not None:
            self.class_embedding = nn.Embedding(num_class_embeds, time_dim)
        self.build_blocks(levels, time_dim)
        self.conv_norm_out = nn.GroupNorm(norm_num_groups, block_out_channels[0], norm_eps)
        self.conv_out = nn.Conv2d(block_out_channels[0], out_channels, 3, padding=1)

    def build_blocks(self, levels: UNetLevels, time_dim: int) -> None:
        config, last = self.config, len(levels.channels) - 1
        groups = config.norm_num_groups
        resnet = partial(
            ResnetBlock2D,
            groups=groups,
            eps=config.norm_eps,
            time_dim=time_dim,
            scale_shift=config.resnet_time_scale_shift == "scale_shift",
            dropout=config.dropout,
        )

        def transformer(level: int, wanted: bool, only_cross: bool | None = None) -> partial[SpatialTransformer] | None:
            only_cross = levels.only_cross[level] if only_cross is None else only_cross
            spatial = partial(
                SpatialTransformer, groups=groups, linear=config.use_linear_projection, only_cross=only_cross
            )
            return partial(spatial, levels.channels[level], **levels.transformer(level)) if wanted else None

        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        width = levels.channels[0]
        skips = [width]  # the widths of what the way down leaves for the way up
        for i, (channels, layers, attend) in enumerate(zip(levels.channels, levels.layers, levels.down, strict=True)):
            block = DownBlock(
                width, channels, layers=layers, resnet=resnet, transformer=transformer(i, attend), last=i == last
            )
            self.down_blocks.append(block)
            skips += [channels] * (layers + (i < last))
            width = channels

        self.mid_block = None
        if config.mid_block_type is not None:
            attend = config.mid_block_type == "UNetMidBlock2DCrossAttn"
            self.mid_block = MidBlock(width, resnet=resnet, transformer=transformer(last, attend, False))

        for i, attend in zip(range(last, -1, -1), levels.up, strict=True):
            taken = [skips.pop() for _ in range(levels.layers[i] + 1)]
            self.up_blocks.append(
                UpBlock(
                    width,
                    levels.channels[i],
                    skip_channels=taken,
                    resnet=resnet,
                    transformer=transformer(i, attend),
                    last=i == 0,
                )
            )
            width = levels.channels[i]

    @property
    def cross_attentions(self) -> list[Attention]:
        """All cross-attentions, in the order in which they run."""
        blocks = [*self.down_blocks, *([] if self.mid_block is None else [self.mid_block]), *self.up_blocks]
        return [
            attention
            for block in blocks
            for spatial in block.attentions
            for transformer in spatial.transformer_blocks
            for attention in transformer.cross_attentions
        ]

    def enable_freeu(self, s1: float, s2: float, b1: float, b2: float) -> None:
        """FreeU (Si et al. 2023): weigh backbone (b1, b2) and skips (s1, s2) anew in the two lowest blocks upward."""
        for block, scales in zip(self.up_blocks, ((s1, b1), (s2, b2)), strict=False):
            block.freeu = scales

    def disable_freeu(self) -> None:
        for block in self.up_blocks:
            block.freeu = None

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
        like timesteps, or (B, D), by ``class_embed_type``; Stable Diffusion's upscaler is told a noise level so.
        ``timestep_cond``, for a UNet with ``time_cond_proj_dim``: (B, that), the embedding of a guidance scale
        (``pipelines.steps.guidance_embedding``) for a UNet that was taught to guide itself (LCM, Luo et al. 2023).

        Raises:
            ValueError: labels are given and the UNet has no class embeddings, or the other way round; a condition is
                given to a UNet that takes none.
        """
        weight = self.time_embedding.linear_1.weight
        timesteps = torch.as_tensor(timesteps, device=device or weight.device).reshape(-1)
        config = self.config
        features = timestep_features(
            timesteps, config.block_out_channels[0], config.flip_sin_to_cos, config.freq_shift
        )  # (B, channels)
        if timestep_cond is not None and self.time_embedding.cond_proj is None:
            raise ValueError("UNet2DConditionModel: timestep_cond was given, but the UNet has no time_cond_proj_dim.")
        time = self.time_embedding(features.to(dtype or weight.dtype), timestep_cond)
        return time if class_labels is None and self.class_embedding is None else time + self._embed_class(class_labels)

    def _embed_class(self, class_labels: Tensor | None) -> Tensor:
        """(B,) or (B, D) -> (B, D)."""
        if self.class_embedding is None:
            raise ValueError("UNet2DConditionModel: class_labels were given, but the UNet has no class embeddings.")
        if class_labels is None:
            raise ValueError("UNet2DConditionModel: class_labels are missing; this UNet has class embeddings.")
        config, weight = self.config, self.time_embedding.linear_1.weight
        class_labels = class_labels.to(weight.device)
        if config.class_embed_type == "timestep":
            features = timestep_features(
                class_labels.reshape(-1), config.block_out_channels[0], config.flip_sin_to_cos, config.freq_shift
            )
            class_labels = features.to(weight.dtype)
        return self.class_embedding(class_labels).to(weight.dtype)

    @apply_forward_hook
    def encode_text(self, encoder_hidden_states: Tensor, encoder_attention_mask: Tensor | None = None) -> TextContext:
        """Text states (B, L, D) -> the keys and values of every cross-attention.

        ``encoder_attention_mask`` (B, L) is true, or 1, where a token counts.
        """
        width = self.config.cross_attention_dim
        if isinstance(width, int) and encoder_hidden_states.shape[-1] != width:
            raise ValueError(
                f"UNet2DConditionModel: the text states are {encoder_hidden_states.shape[-1]} wide and "
                f"cross_attention_dim={width}; the text encoder is not the one this UNet was made for."
            )
        if encoder_attention_mask is not None:  # as diffusers, a bias of -10000 rather than none at all
            keep = encoder_attention_mask[:, None, None].to(encoder_hidden_states.dtype)
            encoder_attention_mask = (1 - keep) * -10000.0  # (B, 1, 1, L)
        keys_values = tuple(attention.keys_values(encoder_hidden_states) for attention in self.cross_attentions)
        return TextContext(keys_values, encoder_attention_mask)

    @apply_forward_hook
    def denoise(self, sample: Tensor, time: Tensor, text: TextContext) -> Tensor:
        """Noisy latents (B, C, H, W), ``embed_time``'s (B or 1, D), ``encode_text``'s context -> (B, C', H, W)."""
        if len(text.keys_values) != len(self.cross_attentions):
            raise ValueError(
                f"This text context is for {len(text.keys_values)} cross-attentions and the UNet has "
                f"{len(self.cross_attentions)}; make it with this UNet's encode_text."
            )
        time, keys_values = F.silu(time), iter(text.keys_values)
        x = self.conv_in(sample)  # (B, channels, H, W)
        skips = [x]
        for block in self.down_blocks:
            x, outputs = block(x, time, keys_values, text.mask)
            skips += outputs
        if self.mid_block is not None:
            x = self.mid_block(x, time, keys_values, text.mask)
        for block in self.up_blocks:
            x = block(x, skips, time, keys_values, text.mask)
        return self.conv_out(F.silu(self.conv_norm_out(x)))

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        attention_mask: None = None,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        added_cond_kwargs: Mapping[str, Any] | None = None,
        down_block_additional_residuals: None = None,
        mid_block_additional_residual: None = None,
        down_intrablock_additional_residuals: None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """Noisy latents (B, C, H, W), timestep (one, or (B,)), text states (B, L, D) -> ``.sample`` (B, C', H, W).

        The arguments are those of diffusers' class.

        Raises:
            ValueError: one that is not supported is given.
        """
        refuse_given(
            attention_mask=attention_mask,
            cross_attention_kwargs=cross_attention_kwargs or None,
            added_cond_kwargs=added_cond_kwargs or None,
            down_block_additional_residuals=down_block_additional_residuals,
            mid_block_additional_residual=mid_block_additional_residual,
            down_intrablock_additional_residuals=down_intrablock_additional_residuals,
        )
        time = self.embed_time(timestep, sample.device, sample.dtype, class_labels, timestep_cond)
        text = self.encode_text(encoder_hidden_states, encoder_attention_mask)
        sample = self.denoise(sample, time, text)
        return UNet2DConditionOutput(sample=sample) if return_dict else (sample,)


def refuse_given(**arguments: Any) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(f"UNet2DConditionModel: {name} is not supported, but was given.")
