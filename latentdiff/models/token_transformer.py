"""``TokenTransformer``: a distribution over the codes of a picture, given text, a class, or nothing.

Each place of the grid of codes is a token. In raster order a code is predicted from those before it (DALL-E, Ramesh et
al. 2021, Sec. 2.2; Taming Transformers, Esser et al. 2021, Sec. 3.2); with some codes hidden, they are predicted from
the others (MaskGIT, Chang et al. 2022; MUSE, Chang et al. 2023).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
from diffusers import ModelMixin  # noqa: F401  diffusers' loader of pipelines looks for it beside the class
from diffusers.configuration_utils import register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from latentdiff.conditioning import Conditioning
from latentdiff.models.layers import Checkpointed, KeyValue
from latentdiff.models.network import Network
from latentdiff.models.single_file_networks import find_checkpoint, packed_network
from latentdiff.models.token_blocks import KeyValueCache, Rotations, TokenBlock, rotations

ORDERS = ("raster", "masked")
SMALL = 0.02  # standard deviation of the first weights, GPT-2's


class Prepared(NamedTuple):
    """What is the same for all codes of a picture."""

    keys_values: tuple[KeyValue, ...] = ()
    """Of the cross-attentions, (B, N, L, D/N) each."""
    mask: Tensor | None = None
    """(B, 1, 1, L), true where a text state counts."""
    label: Tensor | None = None
    """(B, 1, D), added to every token."""

    def select(self, index: slice | Tensor) -> "Prepared":
        """The batch's entries at `index`."""
        pairs = tuple((keys[index], values[index]) for keys, values in self.keys_values)
        return Prepared(pairs, *(None if tensor is None else tensor[index] for tensor in (self.mask, self.label)))


class TokenTransformer(Checkpointed, Network):
    """Logits of ``num_vq_embeddings`` codes for every place of a grid.

    Args:
        num_vq_embeddings: K, codes from 0 to K - 1. K itself stands for a code that is hidden.
        sample_size: the grid's height and width in training, the largest it takes.
        order: "raster", each code from those before it, or "masked", hidden codes from the others.
        num_layers, num_attention_heads, attention_head_dim: the width is the product of the last two.
        positions: "rotary" (turns with row and column, RoFormer), "axial" (learned for rows and for columns, DALL-E) or
            "learned" (for each place in raster order, GPT-2).
        cross_attention_dim: of the text states; None: no text.
        num_classes: of class labels, besides none of them, which is the label after the last; None: no classes.
        autoencoder_digest: whose codes they are, see `fingerprint.codes_digest`; "": not known.
        label_first: (in ``others``, of raster order) the class stands before the first code, as in Taming Transformers,
            and is not added to every token.

    Raises:
        ValueError: a key is unknown, or a value makes no sense.
    """

    config: Any
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}
    own: ClassVar[dict[str, tuple[Any, ...]]] = {"label_first": (False, True)}
    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["TokenBlock"]

    @register_to_config
    def __init__(
        self,
        num_vq_embeddings: int = 1024,
        sample_size: int | Sequence[int] = 16,
        order: str = "raster",
        num_layers: int = 8,
        num_attention_heads: int = 8,
        attention_head_dim: int = 64,
        positions: str = "rotary",
        cross_attention_dim: int | None = None,
        num_classes: int | None = None,
        autoencoder_digest: str = "",
        **others: Any,
    ) -> None:
        super().__init__()
        self.accept_neutral(others)
        for key in ("num_layers", "num_attention_heads", "attention_head_dim"):
            self.per_level(key)
        self.per_level("num_vq_embeddings", least=2)
        for key in ("cross_attention_dim", "num_classes"):
            if self.config[key] is not None:
                self.per_level(key)
        if sample_size is None:
            self.refuse("sample_size", None, "is not a size; give a whole number, or (height, width).")
        if not isinstance(autoencoder_digest, str):
            self.refuse("autoencoder_digest", autoencoder_digest, "is no digest; give a text, '' if it is not known.")
        self.check_choice("order", ORDERS)
        self.check_choice("positions", ("rotary", "axial", "learned"))
        self.check_multiple("attention_head_dim", [attention_head_dim], 4, "the numbers of a pair of pairs")
        dim = num_attention_heads * attention_head_dim
        self.causal, self.label_first = order == "raster", bool(others.get("label_first"))
        if self.label_first and (not self.causal or num_classes is None):
            self.refuse("label_first", True, "is for order='raster' with num_classes.")
        self.token_embedding = nn.Embedding(num_vq_embeddings + 1, dim)
        self.class_embedding = None if num_classes is None else nn.Embedding(num_classes + 1, dim)
        if positions == "axial":
            self.rows = nn.Parameter(torch.randn(self.grid[0], dim) * SMALL)
            self.columns = nn.Parameter(torch.randn(self.grid[1], dim) * SMALL)
        if positions == "learned":
            self.places = nn.Parameter(torch.randn(self.grid[0] * self.grid[1], dim) * SMALL)
        self.blocks = nn.ModuleList(
            TokenBlock(dim, num_attention_heads, cross_attention_dim) for _ in range(num_layers)
        )
        self.norm_out = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_vq_embeddings, bias=False)
        self.initialize(dim, num_layers)

    @classmethod
    def from_single_file(
        cls,
        source: str | Path,
        *,
        heads: int | None = None,
        num_classes: int | None = None,
        sample_size: int | None = None,
        dtype: torch.dtype | None = torch.float32,
        allow_pickle: bool = False,
        **hub: Any,
    ) -> Self:
        """Load the transformer of a checkpoint of Taming Transformers, of classes or of one data set.

        ::

            file = "cin_transformer.ckpt"
            transformer = TokenTransformer.from_single_file(file, num_classes=1000, allow_pickle=True)
            vqvae = VQModel.from_single_file(file, allow_pickle=True)
            ClassTokenPipeline(transformer, vqvae)("207", seed=0, top_k=250)

        Args:
            source: a ``.safetensors`` file, or ``owner/name/file.safetensors`` on the hub, or its address there.
            heads: of every attention, which weights do not show; by default as in the released sizes.
            num_classes: of a model of classes, whose labels are its first tokens; None: it begins with the token 0.
            sample_size: of a picture's grid of codes; by default 16 or what fits.
            dtype: of the weights; None leaves the file's.
            allow_pickle: read a ``.ckpt`` too, by ``torch.load(weights_only=True)``, which executes no code.
            hub: ``revision``, ``token``, ``cache_dir``, ``local_files_only``, ``force_download``.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is damaged, holds something else or lacks weights, or is told by another picture.
            TypeError: an unknown argument.
            OSError: the hub cannot be asked.
        """
        from latentdiff.interchange.single_file import Checkpoint
        from latentdiff.interchange.single_file.taming import read_transformer

        file = find_checkpoint(cls, source, allow_pickle, hub)
        options = {"heads": heads, "num_classes": num_classes, "sample_size": sample_size}
        network: Self = packed_network(cls, file, dtype, options) or read_transformer(
            Checkpoint(file, allow_pickle), cls, dtype, **options
        )
        return network

    def initialize(self, dim: int, layers: int) -> None:
        """GPT-2's first weights (Radford et al. 2019, Sec. 2.3): what the shortcuts get is smaller with depth."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                deep = (2 * layers) ** -0.5 if name.endswith(("to_out", "to_out.0", "ff.2")) else 1.0
                nn.init.normal_(module.weight, std=SMALL * deep)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the largest grid."""
        size = self.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return int(height), int(width)

    @property
    def codes(self) -> int:
        """K, how many there are; as a code it stands for one that is hidden."""
        return int(self.config.num_vq_embeddings)

    @property
    def downscale_factor(self) -> int:
        return 1

    def forward(
        self,
        codes: Tensor,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        class_labels: Tensor | None = None,
    ) -> Tensor:
        """Codes (B, h, w) of whole numbers -> logits (B, K, h, w), at each place of its own code.

        Args:
            encoder_hidden_states: (B, L, D) text states. encoder_attention_mask: (B, L), true where one counts.
            class_labels: (B,) long.

        Raises:
            ValueError: there is no such code, or the grid is larger than in training; or conditions are missing.
        """
        if not torch.compiler.is_compiling():  # which cannot look at values
            self.check_codes(codes)
        given = Conditioning(states=encoder_hidden_states, mask=encoder_attention_mask, labels=class_labels)
        return self.denoise(codes, self._prepare(given))

    @apply_forward_hook
    def prepare(self, conditioning: Conditioning) -> Prepared:
        """All that can be computed from the conditions alone."""
        return self._prepare(conditioning)

    def _prepare(self, given: Conditioning) -> Prepared:
        text, classes = self.config.cross_attention_dim is not None, self.class_embedding
        for name, wanted, tensor in (("text states", text, given.states), ("class labels", classes, given.labels)):
            if (wanted is not None and wanted is not False) != (tensor is not None):
                raise ValueError(f"TokenTransformer: it {'takes no' if tensor is not None else 'needs'} {name}")
        pairs: tuple[KeyValue, ...] = ()
        if given.states is not None:
            cross: list[Any] = [block.attn2 for block in self.blocks]
            pairs = tuple(one.keys_values(given.states) for one in cross)
        mask = None if given.mask is None else given.mask.bool()[:, None, None, :]
        label = None if classes is None or given.labels is None else classes(given.labels)[:, None]
        return Prepared(pairs, mask, label)

    def prepared_by(self) -> list[nn.Module]:
        """The modules whose weights `prepare` uses."""
        cross: list[Any] = [block.attn2 for block in self.blocks]
        known = [self.class_embedding, *(layer for one in cross if one is not None for layer in (one.to_k, one.to_v))]
        return [module for module in known if module is not None]

    def positions(self, height: int, width: int, like: Tensor) -> Tensor | Rotations:
        """Of a grid: rotations, or what is added to the tokens, (L, D)."""
        if self.config.positions == "rotary":
            return rotations(height, width, self.config.attention_head_dim, like)
        if self.config.positions == "learned":
            return self.places[: height * width]
        return (self.rows[:height, None] + self.columns[None, :width]).flatten(0, 1)

    @apply_forward_hook
    def denoise(self, codes: Tensor, prepared: Prepared) -> Tensor:
        """Codes (B, h, w), some hidden or in raster order, and what `prepare` gives -> logits (B, K, h, w)."""
        height, width = codes.shape[1:]
        tokens = codes.flatten(1)  # (B, L)
        if self.causal:  # each place sees the code before it; the first one what stands for none
            tokens = torch.cat([torch.full_like(tokens[:, :1], self.codes), tokens[:, :-1]], dim=1)
        x = self.token_embedding(tokens)  # (B, L, D)
        if self.label_first and prepared.label is not None:
            x = torch.cat([prepared.label.expand_as(x[:, :1]), x[:, 1:]], dim=1)
        logits = self._run(x, self.positions(height, width, x), prepared)  # (B, L, K)
        return logits.transpose(1, 2).unflatten(2, (height, width))

    @apply_forward_hook
    def begin(self, batch: int, height: int, width: int) -> KeyValueCache:
        """For `next_logits`, of B pictures."""
        like, config = self.token_embedding.weight, self.config
        shape = (batch, config.num_attention_heads, height * width, config.attention_head_dim)
        return KeyValueCache(len(self.blocks), shape, like.detach(), self.positions(height, width, like))

    @apply_forward_hook
    def next_logits(self, before: Tensor | None, prepared: Prepared, cache: KeyValueCache) -> Tensor:
        """The code (B,) at the place before, None at the first -> logits (B, K) of the next place, in raster order."""
        batch, place = cache.memory.shape[2], cache.length
        if before is None:
            before = torch.full((batch,), self.codes, device=cache.memory.device)
        at = cache.positions.at(place) if isinstance(cache.positions, Rotations) else cache.positions[place : place + 1]
        x = self.token_embedding(before[:, None])  # (B, 1, D)
        if self.label_first and place == 0 and prepared.label is not None:
            x = prepared.label.expand_as(x)
        logits = self._run(x, at, prepared, cache)  # (B, 1, K)
        cache.length += 1
        return logits[:, 0]

    def _run(
        self, x: Tensor, positions: Tensor | Rotations, prepared: Prepared, cache: KeyValueCache | None = None
    ) -> Tensor:
        """Tokens (B, L, D) -> logits (B, L, K)."""
        turn = positions if isinstance(positions, Rotations) else None
        if isinstance(positions, Tensor):
            x = x + positions
        if prepared.label is not None and not self.label_first:
            x = x + prepared.label
        for layer, block in enumerate(self.blocks):
            text = prepared.keys_values[layer] if prepared.keys_values else None
            x = self.run(block, x, turn, self.causal, text, prepared.mask, cache, layer)
        return self.head(self.norm_out(x))

    def check_codes(self, codes: Tensor) -> None:
        """Raises ValueError for what is no grid of codes of this model, hidden ones included in the masked order."""
        if codes.ndim != 3 or codes.is_floating_point():
            raise ValueError(f"codes must be whole numbers (B, h, w), not {codes.dtype} of {tuple(codes.shape)}")
        self.check_grid(*codes.shape[1:])
        ends = codes.aminmax() if codes.numel() else (0, 0)
        low, high = int(ends[0]), int(ends[1])
        most = self.codes - 1 if self.causal else self.codes
        if low < 0 or high > most:
            hidden = "" if self.causal else f" ({most} is a hidden one)"
            raise ValueError(f"codes must lie from 0 to {most}{hidden}, and there is {low if low < 0 else high}")

    def check_grid(self, height: int, width: int) -> None:
        """Raises ValueError if a grid is larger than in training."""
        most = self.grid
        if height > most[0] or width > most[1]:
            raise ValueError(
                f"{height} x {width} codes are more than the {most[0]} x {most[1]} (height x width) of the training, "
                f"beyond which the places mean nothing to this model"
            )
