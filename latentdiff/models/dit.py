"""``DiTTransformer2DModel``: the transformer denoiser of classes, with diffusers' names, keys and weights.

Scalable Diffusion Models with Transformers (Peebles & Xie 2023), Sec. 3.2, blocks with adaLN-Zero.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
from diffusers import ModelMixin  # noqa: F401  diffusers' loader of pipelines looks for it beside the class
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from latentdiff.conditioning import Conditioning
from latentdiff.models.layers import Attention
from latentdiff.models.network import AnyValue
from latentdiff.models.patches import FEATURES, MLP, PatchTransformer, modulate
from latentdiff.models.single_file_networks import find_checkpoint, packed_network
from latentdiff.models.time_embedding import TimestepEmbedding


class Labels(NamedTuple):
    """What a DiT is conditioned on."""

    labels: Tensor
    """(B,) long"""

    def select(self, index: slice | Tensor) -> "Labels":
        return Labels(self.labels[index])


class LabelEmbedding(nn.Module):
    """Classes, and after the last one none, (B,) -> (B, D)."""

    def __init__(self, classes: int, dim: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, dim)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)


class TimeAndClass(nn.Module):
    """The sum of the embeddings of a timestep and of a class: (B or 1, FEATURES), (B,) -> (B, D)."""

    def __init__(self, classes: int, dim: int) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(FEATURES, dim)
        self.class_embedder = LabelEmbedding(classes, dim)

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        label = self.class_embedder(labels)
        return self.timestep_embedder(features.to(label.dtype)) + label


class AdaLayerNormZero(nn.Module):
    """What time and class make of a block: shift, scale and gate of its two parts, (B, 1, D) each."""

    def __init__(self, classes: int, dim: int) -> None:
        super().__init__()
        self.emb = TimeAndClass(classes, dim)
        self.linear = nn.Linear(dim, 6 * dim)
        self.norm = nn.LayerNorm(dim, 1e-6, elementwise_affine=False)

    def forward(self, features: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        return self.linear(F.silu(self.emb(features, labels)))[:, None].chunk(6, dim=2)


class DiTBlock(nn.Module):
    """Self-attention and a feed-forward layer, each modulated by time and class. DiT, Fig. 3."""

    def __init__(self, dim: int, heads: int, classes: int, *, bias: bool, activation: str, affine: bool, eps: float):
        super().__init__()
        self.norm1 = AdaLayerNormZero(classes, dim)
        self.attn1 = Attention(dim, heads, bias=bias)
        self.norm3 = nn.LayerNorm(dim, eps, elementwise_affine=affine)
        self.ff = MLP(dim, activation)

    def forward(self, x: Tensor, features: Tensor, labels: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        shift, scale, gate, ff_shift, ff_scale, ff_gate = self.norm1(features, labels)
        h = modulate(self.norm1.norm(x), shift, scale)
        x = x + gate * self.attn1(h, h)
        return x + ff_gate * self.ff(modulate(self.norm3(x), ff_shift, ff_scale))


class DiTTransformer2DModel(PatchTransformer):
    """Predicts noise (or v, or the picture), and maybe variances, from latents, a timestep and a class.

    The config is that of diffusers' class: ``num_embeds_ada_norm`` is the number of classes, and the label after the
    last stands for none of them. Labels are never dropped here; training does that with captions.

    Args:
        freq_shift: of the timesteps' sinusoids. 1 is diffusers', which cannot be told otherwise; 0 is the released
            code's, for whose checkpoints it is set by conversion. diffusers passes the key over.

    Raises:
        ValueError: a key is unknown or asks for what is not supported.
    """

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "dropout": (0.0,),
        "norm_num_groups": AnyValue((32,)),
        "upcast_attention": (False, True),
        "norm_type": ("ada_norm_zero",),
    }
    own: ClassVar[Mapping[str, tuple[Any, ...]]] = {"freq_shift": (1, 0)}
    _no_split_modules: ClassVar[list[str]] = ["DiTBlock"]
    _repeated_blocks: ClassVar[list[str]] = ["DiTBlock"]

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 4,
        out_channels: int | None = None,
        num_layers: int = 28,
        attention_bias: bool = True,
        sample_size: int = 32,
        patch_size: int = 2,
        activation_fn: str = "gelu-approximate",
        num_embeds_ada_norm: int = 1000,
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-5,
        **others: Any,
    ) -> None:
        super().__init__()
        self.accept_neutral(others)
        self.per_level("num_embeds_ada_norm")
        self.build_ends(freq_shift=others.get("freq_shift", 1))
        dim = self.width
        self.transformer_blocks = nn.ModuleList(
            DiTBlock(
                dim,
                num_attention_heads,
                num_embeds_ada_norm,
                bias=attention_bias,
                activation=activation_fn,
                affine=norm_elementwise_affine,
                eps=norm_eps,
            )
            for _ in range(num_layers)
        )
        self.proj_out_1 = nn.Linear(dim, 2 * dim)
        self.proj_out_2 = nn.Linear(dim, self.patch_values)

    @classmethod
    def from_single_file(
        cls,
        source: str | Path,
        *,
        heads: int | None = None,
        dtype: torch.dtype | None = torch.float32,
        allow_pickle: bool = False,
        **hub: Any,
    ) -> Self:
        """Load a checkpoint of DiT's released code; its shape is inferred from the weights.

        ::

            DiTTransformer2DModel.from_single_file("DiT-XL-2-256x256.pt", allow_pickle=True)

        It is computed as there, with ``freq_shift=0``. Of a training checkpoint the averages are taken.

        Args:
            source: a ``.safetensors`` file, or ``owner/name/file.safetensors`` on the hub, or its address there.
            heads: of every attention, which weights do not show; by default as in the released sizes: 16 in a network
                1152 wide, else 64 numbers each.
            dtype: of the weights; None leaves the file's.
            allow_pickle: read a ``.pt`` too, by ``torch.load(weights_only=True)``, which executes no code.
            hub: ``revision``, ``token``, ``cache_dir``, ``local_files_only``, ``force_download``.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is damaged, holds something else or lacks weights, or heads do not fit.
            TypeError: an unknown argument.
            OSError: the hub cannot be asked.
        """
        from latentdiff.interchange.single_file import Checkpoint, read_dit

        file = find_checkpoint(cls, source, allow_pickle, hub)
        packed = packed_network(cls, file, dtype, {"heads": heads})
        network: Self = packed or read_dit(Checkpoint(file, allow_pickle), cls, dtype, heads)
        return network

    def start_from_nothing(self) -> None:
        super().start_from_nothing()
        zeros = [block.norm1.linear for block in self.transformer_blocks]
        for layer in (*zeros, self.proj_out_1, self.proj_out_2):
            nn.init.zeros_(layer.weight)

    def prepare(self, conditioning: Conditioning) -> Labels:
        """The labels; without any, the one that stands for no class.

        Raises:
            ValueError: there are conditions that a DiT does not take.
        """
        unknown = [name for name, _ in conditioning.items() if name not in ("labels", "channels")]
        if unknown:
            raise ValueError(f"DiTTransformer2DModel: it takes no {', no '.join(unknown)}, but was given")
        none = torch.tensor([self.config.num_embeds_ada_norm])
        return Labels(none if conditioning.labels is None else conditioning.labels)

    def prepared_by(self) -> list[nn.Module]:
        """See `network.Denoiser`."""
        return []

    @apply_forward_hook
    def embed_time(
        self,
        timesteps: Tensor | float,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
    ) -> Tensor:
        """Timesteps, one number or (B,) -> their sinusoids (1 or B, FEATURES), of which each block makes its own
        embedding. Labels are `prepare`'s.

        Raises:
            ValueError: an embedded guidance scale is given.
        """
        if timestep_cond is not None:
            raise ValueError("DiTTransformer2DModel: timestep_cond is not supported, but was given.")
        layer = self.transformer_blocks[0].norm1.emb.timestep_embedder.linear_1
        return self.features(timesteps, device, dtype, layer)

    @apply_forward_hook
    def denoise(self, sample: Tensor, time: Tensor, prepared: Labels) -> Tensor:
        """Noisy latents (B, C, H, W), ``embed_time``'s (B or 1, FEATURES), ``prepare``'s -> (B, C', H, W)."""
        labels = prepared.labels.to(sample.device)
        x = self.pos_embed(sample)  # (B, L, D)
        for block in self.transformer_blocks:
            x = self.run(block, x, time, labels)
        both = F.silu(self.transformer_blocks[0].norm1.emb(time, labels))
        shift, scale = self.proj_out_1(both)[:, None].chunk(2, dim=2)
        return self.to_picture(self.proj_out_2(modulate(self.norm_out(x), shift, scale)), sample.shape[-2:])

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Noisy latents (B, C, H, W), timestep (one, or (B,)), labels (B,) -> ``.sample`` (B, C', H, W).

        Without labels the one that stands for no class. ``cross_attention_kwargs`` must be empty.

        Raises:
            ValueError: it is not; or a side is no multiple of the patch's.
        """
        if cross_attention_kwargs:
            raise ValueError("DiTTransformer2DModel: cross_attention_kwargs is not supported, but was given.")
        time = self.embed_time(timestep, hidden_states.device, hidden_states.dtype)
        sample = self.denoise(hidden_states, time, self.prepare(Conditioning(labels=class_labels)))
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)
