"""The UNet, and ``UNet2DConditionModel``: the denoiser of Stable Diffusion, with diffusers' names and keys.

Latent Diffusion (Rombach et al. 2022), Sec. 3.3; the UNet itself is ADM's (Dhariwal & Nichol 2021), Sec. 3.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch.nn.functional as F
from diffusers import ModelMixin  # noqa: F401  diffusers' loader of pipelines looks for it beside the class
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from latentdiff.conditioning import Conditioning
from latentdiff.models.layers import Attention, norm_silu
from latentdiff.models.loras import with_lora_scale
from latentdiff.models.time_embedding import TimeConditioned
from latentdiff.models.transformer import SpatialTransformer, Text, TextContext, TextStates
from latentdiff.models.unet_blocks import UNetBuilder
from latentdiff.models.unet_config import NEUTRAL_KEYS, UNetLevels, text_unet_levels


class UNet(TimeConditioned):
    """A way down, a middle, and a way up that also receives what every layer on the way down gave."""

    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns: ClassVar[list[str]] = ["norm"]
    down_blocks: Any
    up_blocks: Any

    def build(self, levels: UNetLevels) -> None:
        """Make all layers that the config asks for."""
        config, width = self.config, levels.channels[0]
        kernel, last_kernel = (config.get(key, 3) for key in ("conv_in_kernel", "conv_out_kernel"))
        self.conv_in = nn.Conv2d(config.in_channels, width, kernel, padding=kernel // 2)
        builder = UNetBuilder(config, levels, time_dim=self.build_time())
        self.down_blocks = builder.down_blocks()
        self.up_blocks = builder.up_blocks()
        self.mid_block = None if config.mid_block_type is None else builder.mid_block()
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, width, config.norm_eps)
        self.conv_out = nn.Conv2d(width, config.out_channels, last_kernel, padding=last_kernel // 2)
        first = 0
        for transformer in self.transformers():  # each knows which of a context's keys and values are its own
            transformer.first = first
            first += len(transformer.cross_attentions)

    def transformers(self) -> Iterator[SpatialTransformer]:
        """In the order in which they run."""
        for block in (*self.down_blocks, self.mid_block, *self.up_blocks):
            for attention in getattr(block, "attentions", ()):
                if isinstance(attention, SpatialTransformer):
                    yield attention

    @property
    def cross_attentions(self) -> list[Attention]:
        """In the order in which they run."""
        return [attention for transformer in self.transformers() for attention in transformer.cross_attentions]

    @apply_forward_hook
    def denoise(
        self,
        sample: Tensor,
        time: Tensor,
        prepared: Text | None = None,
        residuals: Sequence[Tensor] = (),
        mid_residual: Tensor | None = None,
        within: Sequence[Tensor] = (),
    ) -> Tensor:
        """Noisy pixels or latents (B, C, H, W), ``embed_time``'s (B or 1, D), ``prepare``'s -> (B, C', H, W).

        A ControlNet (Zhang et al. 2023) gives ``residuals``, to be added to what the way down leaves for the way up,
        and ``mid_residual``, to be added after the middle. A T2I-Adapter (Mou et al. 2023) gives ``within``, to be
        added within the blocks of the way down, one for each of the first blocks, and maybe one after the middle.
        """
        self._check_context(prepared)
        added = None if prepared is None else prepared.added
        time = F.silu(time if added is None else time + added)
        x = self.conv_in(sample)  # (B, channels, H, W)
        skips = [x]
        for i, down in enumerate(self.down_blocks):
            x, outputs = down(x, time, prepared, within[i] if i < len(within) else None)
            skips += outputs
        if residuals:
            skips = [skip + residual for skip, residual in zip(skips, residuals, strict=True)]
        if self.mid_block is not None:
            x = self.mid_block(x, time, prepared)
        if len(within) > len(self.down_blocks):
            x = x + within[-1]
        if mid_residual is not None:
            x = x + mid_residual
        for up in self.up_blocks:
            skips, own = skips[: -len(up.resnets)], skips[-len(up.resnets) :]
            x = up(x, own, time, prepared, size=skips[-1].shape[-2:] if skips else None)
        return self.conv_out(norm_silu(self.conv_norm_out, x))

    def _check_context(self, prepared: Text | None) -> None:
        if isinstance(prepared, TextContext) and len(prepared.keys_values) != len(self.cross_attentions):
            raise ValueError(
                f"This text context is for {len(prepared.keys_values)} cross-attentions and the UNet has "
                f"{len(self.cross_attentions)}; make it with this UNet's encode_text."
            )


class UNet2DConditionModel(UNet, PeftAdapterMixin):
    """Predicts noise (or v, or the picture) from noisy latents, a timestep and the states of a text encoder.

    The config is that of diffusers' class. ``attention_head_dim`` is, there as here, the *number* of heads, for all
    levels or one for each; ``upcast_attention`` is always fulfilled (see ``layers.Attention``).

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
    _no_split_modules: ClassVar[list[str]] = ["BasicTransformerBlock", "ResnetBlock2D", "UpBlock"]
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
        transformer_layers_per_block: int | Sequence[int | Sequence[int]] = 1,
        reverse_transformer_layers_per_block: Sequence[int | Sequence[int]] | None = None,
        attention_head_dim: int | Sequence[int] = 8,
        use_linear_projection: bool = False,
        upcast_attention: bool = False,
        only_cross_attention: bool | Sequence[bool] = False,
        class_embed_type: str | None = None,
        num_class_embeds: int | None = None,
        projection_class_embeddings_input_dim: int | None = None,
        class_embeddings_concat: bool = False,
        resnet_time_scale_shift: str = "default",
        time_embedding_dim: int | None = None,
        time_cond_proj_dim: int | None = None,
        time_embedding_type: str = "positional",
        addition_embed_type: str | None = None,
        addition_time_embed_dim: int | None = None,
        conv_in_kernel: int = 3,
        conv_out_kernel: int = 3,
        **others: Any,
    ) -> None:
        super().__init__()
        self.accept_neutral(others)
        self.build(text_unet_levels(self))

    def prepare(self, conditioning: Conditioning) -> TextContext:
        """`encode_text` of the text states; class labels and an embedded guidance scale are `embed_time`'s.

        Raises:
            ValueError: there are no text states; a pooled embedding or time ids are missing, or this UNet takes none.
        """
        if conditioning.states is None:
            raise ValueError("UNet2DConditionModel: the conditioning has no text states")
        if self.add_embedding is None:
            refuse_given(**{"a pooled embedding": conditioning.pooled, "time_ids": conditioning.time_ids})
        added = conditioning.arguments().get("added_cond_kwargs")
        return self.encode_text(conditioning.states, conditioning.mask, added)

    def prepared_by(self) -> list[nn.Module]:
        """See `network.Denoiser`."""
        return [*self.cross_attentions, *([] if self.add_embedding is None else [self.add_embedding])]

    @apply_forward_hook
    def encode_text(
        self,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        added_cond_kwargs: Mapping[str, Any] | None = None,
    ) -> TextContext:
        """Text states (B, L, D) -> the keys and values of every cross-attention.

        ``encoder_attention_mask`` (B, L) is true, or 1, where a token counts. ``added_cond_kwargs``, for a UNet with
        ``addition_embed_type="text_time"``: {"text_embeds": (B, D'), "time_ids": (B, N)}, as SDXL's.

        Raises:
            ValueError: what is given does not go with the UNet's config.
        """
        if not self.works_in_parts:
            raise ValueError(
                "UNet2DConditionModel: with group offloading only plain calls are possible, unet(...), and so after "
                "unet.compile()."
            )
        states, mask, added = self._text_states(encoder_hidden_states, encoder_attention_mask, added_cond_kwargs)
        return TextContext(tuple(attention.keys_values(states) for attention in self.cross_attentions), mask, added)

    def _text_states(self, states: Tensor, mask: Tensor | None, added: Mapping[str, Any] | None) -> TextStates:
        """Text states (B, L, D), with their mask (B, L) as it is added to the scores, (B, 1, 1, L), and what is added
        to the time."""
        width = self.config.cross_attention_dim
        if isinstance(width, int) and states.shape[-1] != width:
            raise ValueError(
                f"UNet2DConditionModel: the text states are {states.shape[-1]} wide and "
                f"cross_attention_dim={width}; the text encoder is not the one this UNet was made for."
            )
        # as in diffusers -10000, not minus infinity
        mask = None if mask is None else (1 - mask[:, None, None].to(states.dtype)) * -10000.0
        return TextStates(states, mask, self._embed_added(added))

    def _embed_added(self, given: Mapping[str, Any] | None) -> Tensor | None:
        """``added_cond_kwargs`` -> (B, D), to be added to the time embedding."""
        if self.add_embedding is None:
            refuse_given(added_cond_kwargs=given or None)
            return None
        return self.add_embedding.embed((given or {}).get("text_embeds"), (given or {}).get("time_ids"))

    @with_lora_scale
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
        down_block_additional_residuals: Sequence[Tensor] | None = None,
        mid_block_additional_residual: Tensor | None = None,
        down_intrablock_additional_residuals: Sequence[Tensor] | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """Noisy latents (B, C, H, W), timestep (one, or (B,)), text states (B, L, D) -> ``.sample`` (B, C', H, W).

        The arguments are those of diffusers' class. ``cross_attention_kwargs`` may be {"scale": how strongly loaded
        LoRAs act}; for ``added_cond_kwargs`` see `encode_text`; the additional residuals are a ControlNet's, those
        within blocks a T2I-Adapter's.

        Raises:
            ValueError: one that is not supported is given.
        """
        refuse_given(attention_mask=attention_mask)
        residuals, mid_residual = down_block_additional_residuals, mid_block_additional_residual
        if (residuals is None) != (mid_residual is None):
            raise ValueError(
                "UNet2DConditionModel: down_block_additional_residuals and mid_block_additional_residual, a "
                "ControlNet's, must be given both or none; a T2I-Adapter's are down_intrablock_additional_residuals."
            )
        within = down_intrablock_additional_residuals or ()
        if len(within) > len(self.down_blocks) + 1:
            raise ValueError(
                f"UNet2DConditionModel: {len(within)} down_intrablock_additional_residuals are more than its "
                f"{len(self.down_blocks)} blocks of the way down and the middle; the adapter is for another UNet."
            )
        time = self.embed_time(timestep, sample.device, sample.dtype, class_labels, timestep_cond)
        # Not `encode_text`: every cross-attention makes its keys and values when it runs, so that weights which are
        # offloaded or sharded block by block are there.
        text = self._text_states(encoder_hidden_states, encoder_attention_mask, added_cond_kwargs)
        sample = self.denoise(sample, time, text, residuals or (), mid_residual, within)
        return UNet2DConditionOutput(sample=sample) if return_dict else (sample,)

    def enable_freeu(self, s1: float, s2: float, b1: float, b2: float) -> None:
        """FreeU (Si et al. 2023): scale backbone (b1, b2) and skips (s1, s2) in the two lowest blocks of the way up."""
        blocks: list[Any] = list(self.up_blocks)
        for block, scales in zip(blocks, ((s1, b1), (s2, b2)), strict=False):
            block.freeu = scales

    def disable_freeu(self) -> None:
        blocks: list[Any] = list(self.up_blocks)
        for block in blocks:
            block.freeu = None

    def set_attention_slice(self, slice_size: str | int | None = "auto") -> None:
        """How many heads attention computes at once: half of them ("auto"), one ("max"), a number, or all (None).

        Fewer take longer, and save memory only where PyTorch's ``scaled_dot_product_attention`` keeps the scores.

        Raises:
            ValueError: the number is below 1 or above that of an attention's heads.
        """
        attentions = self._attentions()
        fewest = min((attention.heads for attention in attentions), default=1)
        known = slice_size in ("auto", "max", None)
        if not known and not (isinstance(slice_size, int) and 1 <= slice_size <= fewest):
            raise ValueError(f'slice_size must be "auto", "max" or from 1 to {fewest}, the heads; not {slice_size!r}.')
        for attention in attentions:
            halved = max(1, attention.heads // 2)
            named = {"auto": halved, "max": 1, None: None}
            attention.heads_at_once = slice_size if isinstance(slice_size, int) else named[slice_size]


def refuse_given(**arguments: Any) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(f"UNet2DConditionModel: {name} is not supported, but was given.")
