"""``PixArtTransformer2DModel``: the transformer denoiser of text, with diffusers' names, keys and weights.

PixArt-alpha (Chen et al. 2023), Sec. 2.3: a DiT with cross-attention, whose modulation all blocks share (adaLN-single).
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import ModelMixin  # noqa: F401  diffusers' loader of pipelines looks for it beside the class
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from latentdiff.conditioning import Conditioning
from latentdiff.models.layers import Attention, TextInput
from latentdiff.models.network import AnyValue
from latentdiff.models.patches import FEATURES, MLP, PatchTransformer, modulate
from latentdiff.models.time_embedding import TimestepEmbedding
from latentdiff.models.transformer import Text, TextContext, TextStates


class CaptionProjection(nn.Module):
    """Text states as wide as the tokens: (B, L, D') -> (B, L, D)."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, states: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(states), approximate="tanh"))


class TimeAndSizes(nn.Module):
    """Embeddings of the timestep and, with ``sizes``, of height, width and their ratio (micro-conditions)."""

    def __init__(self, dim: int, sizes: bool) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(FEATURES, dim)
        if sizes:
            self.resolution_embedder = TimestepEmbedding(FEATURES, dim // 3)
            self.aspect_ratio_embedder = TimestepEmbedding(FEATURES, dim // 3)


class AdaLayerNormSingle(nn.Module):
    """What time and sizes make of all blocks."""

    def __init__(self, dim: int, sizes: bool) -> None:
        super().__init__()
        self.emb = TimeAndSizes(dim, sizes)
        self.linear = nn.Linear(dim, 6 * dim)


class PixArtBlock(nn.Module):
    """Self-attention, cross-attention and a feed-forward layer, the first and the last modulated. PixArt, Fig. 4."""

    def __init__(
        self, dim: int, heads: int, text_dim: int, *, bias: bool, activation: str, affine: bool, eps: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps, elementwise_affine=affine)
        self.attn1 = Attention(dim, heads, bias=bias)
        self.attn2 = Attention(dim, heads, text_dim, bias=bias)
        self.norm2 = nn.LayerNorm(dim, eps, elementwise_affine=affine)
        self.ff = MLP(dim, activation)
        self.scale_shift_table = nn.Parameter(torch.randn(6, dim) / dim**0.5)

    def forward(self, x: Tensor, time: Tensor, text: TextInput, mask: Tensor | None) -> Tensor:
        """(B, L, D), (B or 1, 6, D), the text and its mask -> (B, L, D)."""
        shift, scale, gate, ff_shift, ff_scale, ff_gate = (self.scale_shift_table + time).chunk(6, dim=1)
        h = modulate(self.norm1(x), shift, scale)
        x = x + gate * self.attn1(h, h)
        x = x + self.attn2(x, text, mask)
        return x + ff_gate * self.ff(modulate(self.norm2(x), ff_shift, ff_scale))


class PixArtTransformer2DModel(PatchTransformer):
    """Predicts noise (or v, or the picture), and maybe variances, from latents, a timestep and text states.

    The config is that of diffusers' class. ``caption_channels`` is the width of the text states; without it they are as
    wide as ``cross_attention_dim`` says. ``use_additional_conditions``, by default where ``sample_size`` is 128: the
    height and width of pictures and their ratio are conditions too.

    Raises:
        ValueError: a key is unknown or asks for what is not supported.
    """

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "dropout": (0.0,),
        "norm_num_groups": AnyValue((32,)),
        "num_embeds_ada_norm": AnyValue((1000,)),  # it knows no classes
        "upcast_attention": (False, True),
        "norm_type": ("ada_norm_single",),
        "attention_type": ("default",),
    }
    _no_split_modules: ClassVar[list[str]] = ["PixArtBlock"]
    _repeated_blocks: ClassVar[list[str]] = ["PixArtBlock"]

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 4,
        out_channels: int | None = 8,
        num_layers: int = 28,
        cross_attention_dim: int = 1152,
        attention_bias: bool = True,
        sample_size: int = 128,
        patch_size: int = 2,
        activation_fn: str = "gelu-approximate",
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-6,
        interpolation_scale: float | None = None,
        use_additional_conditions: bool | None = None,
        caption_channels: int | None = None,
        **others: Any,
    ) -> None:
        super().__init__()
        self.accept_neutral(others)
        self.per_level("cross_attention_dim")
        dim = self.width
        self.build_ends(interpolation_scale)
        if caption_channels is not None and cross_attention_dim != dim:
            self.refuse("cross_attention_dim", cross_attention_dim, f"must be {dim}, the width, with caption_channels.")
        if self.takes_sizes and dim % 3:
            self.refuse("attention_head_dim", attention_head_dim, "makes a width that is no multiple of 3, for sizes.")
        self.transformer_blocks = nn.ModuleList(
            PixArtBlock(
                dim,
                num_attention_heads,
                cross_attention_dim,
                bias=attention_bias,
                activation=activation_fn,
                affine=norm_elementwise_affine,
                eps=norm_eps,
            )
            for _ in range(num_layers)
        )
        self.scale_shift_table = nn.Parameter(torch.randn(2, dim) / dim**0.5)
        self.proj_out = nn.Linear(dim, self.patch_values)
        self.adaln_single = AdaLayerNormSingle(dim, self.takes_sizes)
        self.caption_projection = None if caption_channels is None else CaptionProjection(caption_channels, dim)

    @property
    def takes_sizes(self) -> bool:
        """Whether sizes are conditions."""
        asked = self.config.use_additional_conditions
        return bool(self.config.sample_size == 128 if asked is None else asked)

    @property
    def cross_attentions(self) -> list[Attention]:
        """In the order in which they run."""
        return [block.attn2 for block in self.transformer_blocks]

    def start_from_nothing(self) -> None:
        super().start_from_nothing()
        # the gates begin at their tables' small random numbers, not at 0, and cross-attention adds nothing
        for layer in (self.adaln_single.linear, self.proj_out, *(one.to_out[0] for one in self.cross_attentions)):
            nn.init.zeros_(layer.weight)  # type: ignore[arg-type]

    def prepare(self, conditioning: Conditioning) -> TextContext:
        """The keys and values of every cross-attention, the mask, and the embedding of the sizes.

        Raises:
            ValueError: there are no text states, sizes are missing, or there are conditions that it does not take.
        """
        known = ("states", "mask", "sizes", "channels")
        unknown = [name for name, _ in conditioning.items() if name not in known]
        if unknown:
            raise ValueError(f"PixArtTransformer2DModel: it takes no {', no '.join(unknown)}, but was given")
        return self.encode_text(
            conditioning.states, conditioning.mask, conditioning.arguments().get("added_cond_kwargs")
        )

    def prepared_by(self) -> list[nn.Module]:
        """See `network.Denoiser`."""
        projections = [] if self.caption_projection is None else [self.caption_projection]
        return [*self.cross_attentions, *projections, self.adaln_single.emb]

    @apply_forward_hook
    def encode_text(
        self, states: Tensor | None, mask: Tensor | None = None, added: Mapping[str, Tensor | None] | None = None
    ) -> TextContext:
        """Text states (B, L, D'), and what counts of them (B, L) -> the keys and values of every cross-attention.

        added: {"resolution": (B, 2), "aspect_ratio": (B, 1)}, where sizes are conditions.

        Raises:
            ValueError: what is given does not go with the config.
        """
        text = self._text_states(states, mask, added)
        return TextContext(tuple(one.keys_values(text.states) for one in self.cross_attentions), text.mask, text.added)

    def _text_states(
        self, states: Tensor | None, mask: Tensor | None, added: Mapping[str, Tensor | None] | None
    ) -> TextStates:
        """As the blocks take them: projected states, the mask as it is added to the scores, (B, 1, 1, L), and the
        embedding of the sizes (B, D)."""
        if states is None:
            raise ValueError("PixArtTransformer2DModel: there are no text states")
        key = "cross_attention_dim" if self.caption_projection is None else "caption_channels"
        if states.shape[-1] != self.config[key]:
            raise ValueError(
                f"PixArtTransformer2DModel: the text states are {states.shape[-1]} wide and {key}={self.config[key]}; "
                f"the text encoder is not the one this transformer was made for."
            )
        if mask is not None and mask.ndim == 2:  # as in diffusers -10000, not minus infinity
            mask = (1 - mask[:, None].to(states.dtype)) * -10000.0
        sizes = self._embed_sizes(added, states.dtype)
        states = states if self.caption_projection is None else self.caption_projection(states)
        return TextStates(states, None if mask is None else mask[:, None], sizes)

    def _embed_sizes(self, added: Mapping[str, Tensor | None] | None, dtype: torch.dtype) -> Tensor | None:
        """``added_cond_kwargs`` -> (B, D), to be added to the time's embedding; None where sizes are no conditions."""
        if not self.takes_sizes:
            return None
        parts = []
        for name in ("resolution", "aspect_ratio"):
            numbers = (added or {}).get(name)
            if numbers is None:
                raise ValueError(f"PixArtTransformer2DModel: sizes are conditions of this one, and {name} is missing")
            features = self.time_features(numbers.flatten()).to(dtype)
            embed = getattr(self.adaln_single.emb, f"{name}_embedder")
            parts.append(embed(features).reshape(numbers.shape[0], -1))  # (B, 2D/3), (B, D/3)
        return torch.cat(parts, dim=1)

    @apply_forward_hook
    def embed_time(
        self,
        timesteps: Tensor | float,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
    ) -> Tensor:
        """Timesteps, one number or (B,) -> (1 or B, D).

        Raises:
            ValueError: labels or an embedded guidance scale are given.
        """
        if class_labels is not None or timestep_cond is not None:
            raise ValueError("PixArtTransformer2DModel: it takes no class_labels and no timestep_cond")
        embedder: Any = self.adaln_single.emb.timestep_embedder
        return embedder(self.features(timesteps, device, dtype, embedder.linear_1))

    @apply_forward_hook
    def denoise(self, sample: Tensor, time: Tensor, prepared: Text) -> Tensor:
        """Noisy latents (B, C, H, W), ``embed_time``'s (B or 1, D), ``prepare``'s -> (B, C', H, W)."""
        if prepared.added is not None:
            time = time + prepared.added
        modulation = self.adaln_single.linear(F.silu(time)).unflatten(1, (6, -1))  # (B or 1, 6, D)
        x = self.pos_embed(sample)  # (B, L, D)
        for number, block in enumerate(self.transformer_blocks):
            x = self.run(block, x, modulation, prepared.at(number), prepared.mask)
        shift, scale = (self.scale_shift_table + time[:, None]).chunk(2, dim=1)
        return self.to_picture(self.proj_out(modulate(self.norm_out(x), shift, scale)), sample.shape[-2:])

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        timestep: Tensor | float | None = None,
        added_cond_kwargs: Mapping[str, Tensor | None] | None = None,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        attention_mask: None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Noisy latents (B, C, H, W), text states (B, L, D'), timestep (one, or (B,)) -> ``.sample`` (B, C', H, W).

        The arguments are those of diffusers' class. ``encoder_attention_mask``: (B, L), true or 1 where a state counts,
        or (B, 1, L), added to the scores; for ``added_cond_kwargs`` see `encode_text`.

        Raises:
            ValueError: there are no states or no timestep; or an argument is given that is not supported.
        """
        for name, value in (("cross_attention_kwargs", cross_attention_kwargs), ("attention_mask", attention_mask)):
            if value is not None and value != {}:
                raise ValueError(f"PixArtTransformer2DModel: {name} is not supported, but was given.")
        if timestep is None:
            raise ValueError("PixArtTransformer2DModel: there is no timestep")
        time = self.embed_time(timestep, hidden_states.device, hidden_states.dtype)
        text = self._text_states(encoder_hidden_states, encoder_attention_mask, added_cond_kwargs)
        sample = self.denoise(hidden_states, time, text)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)
