"""The layers that the autoencoders and the UNet share.

Parameter names are diffusers', so weights need no mapping. Letters in shape comments: B batch, C channels, H W height
and width (of pixels or of the latent grid), L tokens, D width, N attention heads.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Checkpointed(nn.Module):
    """A module that can recompute its parts' activations in the backward pass instead of keeping them.

    ``ModelMixin.enable_gradient_checkpointing`` finds the flag below on every module and sets it together with
    ``_gradient_checkpointing_func``.
    """

    gradient_checkpointing: bool = False

    def run(self, module: nn.Module, *args: Any) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(module, *args)  # type: ignore[operator]
        return module(*args)


def norm_silu(norm: nn.Module, x: Tensor) -> Tensor:
    """SiLU of normalised activations, in place under ``torch.no_grad()``."""
    h = norm(x)
    return F.silu(h, inplace=not torch.is_grad_enabled() and h is not x)


class ResnetBlock2D(nn.Module):
    """Norm, SiLU, convolution, twice, beside a shortcut; the time embedding enters between the two.

    ADM (Dhariwal & Nichol 2021), Sec. 3: added before the second norm, or, with ``scale_shift``, as a scale and a
    shift after it. ``resample``, `halve` or `double`, acts on both paths between the first activation and convolution.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        groups: int,
        eps: float = 1e-6,
        time_dim: int | None = None,
        scale_shift: bool = False,
        dropout: float = 0.0,
        resample: Callable[[Tensor, tuple[int, int] | None], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample
        self.norm1 = nn.GroupNorm(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_dim, out_channels * (1 + scale_shift)) if time_dim is not None else None
        self.norm2 = nn.GroupNorm(groups, out_channels, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, time: Tensor | None = None, size: tuple[int, int] | None = None) -> Tensor:
        """(B, C, H, W) and (B or 1, D), the time embedding after its SiLU -> (B, C', H, W).

        With ``resample`` height and width are half, rounded down, or double, or ``size`` where it is given.
        """
        h = norm_silu(self.norm1, x)
        if self.resample is not None:
            h, x = self.resample(h, size), self.resample(x, size)
        h = self.conv1(h)
        if self.time_emb_proj is None:
            h = norm_silu(self.norm2, h)
        elif self.scale_shift:
            scale, shift = self.time_emb_proj(time)[:, :, None, None].chunk(2, dim=1)  # (B, C', 1, 1)
            h = F.silu(self.norm2(h) * (1 + scale) + shift)
        else:
            h = norm_silu(self.norm2, h + self.time_emb_proj(time)[:, :, None, None])
        h = self.conv2(self.dropout(h))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + h


def halve(x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """(B, C, H, W) -> (B, C, H/2, W/2), rounded down, by averages; ``size`` is there to be called like `double`."""
    check_divisible(x)
    return F.avg_pool2d(x, 2)


def double(x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """(B, C, H, W) -> (B, C, 2H, 2W), or (B, C, *size), by nearest neighbours."""
    if size is None:
        return F.interpolate(x, scale_factor=2.0, mode="nearest")
    return F.interpolate(x, size=size, mode="nearest")


def check_divisible(x: Tensor) -> None:
    """Raises ValueError if a side is too short to be halved."""
    height, width = x.shape[-2:]
    if min(height, width) < 2:
        raise ValueError(
            f"a feature map of {width}x{height} (width x height) cannot be halved; give the network a larger input, or "
            f"one of fewer levels"
        )


class Downsample2D(nn.Module):
    """Half the size by a strided convolution. ``padding=0`` pads right and below only, as the autoencoders do."""

    def __init__(self, channels: int, padding: int = 1) -> None:
        super().__init__()
        self.padding = padding
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        if self.padding:
            return self.conv(x)  # (B, C, H/2, W/2), rounded up
        check_divisible(x)
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # (B, C, H/2, W/2), rounded down


class Upsample2D(nn.Module):
    """Nearest-neighbour doubling, or growing to ``size``, and a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        if can_fuse(self.conv, x) and size in (None, (2 * x.shape[2], 2 * x.shape[3])):
            return F.conv_transpose2d(x, doubling_kernel(self.conv.weight), self.conv.bias, stride=2, padding=1)
        return self.conv(double(x, size))  # (B, C, 2H, 2W) or (B, C, *size)


def can_fuse(conv: nn.Module, x: Tensor) -> bool:
    """Whether doubling and this convolution may run as one transposed convolution.

    They may on the CPU in float32, where it was measured to be faster, if the convolution is a plain one: without LoRA,
    quantisation, hooks or offloaded weights.
    """
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_exporting()
        and not torch.jit.is_tracing()
        and type(conv) is nn.Conv2d
        and type(conv.weight) is nn.Parameter
        and conv.weight.dtype == torch.float32
        and conv.weight.device == x.device
        and "forward" not in vars(conv)
        and not (conv._forward_hooks or conv._forward_pre_hooks)
    )


def doubling_kernel(weight: Tensor) -> Tensor:
    """The weights of one transposed convolution that equals nearest-neighbour doubling and a 3x3 convolution.

    Only four of the nine doubled neighbours differ, so their weights are added up first: 4/9 of the products.

    (C', C, 3, 3) -> (C, C', 4, 4), for stride 2 and padding 1.
    """
    spread = weight.new_tensor([[0.0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]])
    return torch.einsum("yk,xl,oikl->ioyx", spread, spread, weight).contiguous()


def to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, HW, C), contiguous; no copy if ``x`` is channels-last."""
    return x.flatten(2).transpose(1, 2).contiguous()


def to_grid(tokens: Tensor, height: int, width: int) -> Tensor:
    """(B, HW, C) -> (B, C, H, W), a channels-last view."""
    batch, _, channels = tokens.shape
    return tokens.transpose(1, 2).view(batch, channels, height, width)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, L, D) -> (B, N, L, D/N), a view."""
    batch, length, _ = x.shape
    return x.view(batch, length, heads, -1).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, N, L, D/N) -> (B, L, D)."""
    return x.transpose(1, 2).flatten(2)


KeyValue = tuple[Tensor, Tensor]
"""Keys and values of one attention, (B, N, L, D/N) each: N heads, L tokens."""
TextInput = KeyValue | Tensor
"""What one cross-attention takes: keys and values made beforehand, or text states (B, L, D) to make them of."""


class Attention(nn.Module):
    """Multi-head attention whose keys and values are made by a call of their own, so they can be made beforehand.

    ``scaled_dot_product_attention`` sums and normalises the scores of half-precision inputs in float32. That is what
    the config's ``upcast_attention`` asks for, so the flag changes nothing here.

    Args:
        dim: of the tokens that ask and of the result.
        context_dim: of the tokens that are asked; None for self-attention.
        width: of all heads together; by default `dim`.
        groups: of a normalisation that a subclass puts before it; None for no normalisation.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        context_dim: int | None = None,
        *,
        width: int | None = None,
        bias: bool = False,
        groups: int | None = None,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        width, self.is_self = width or dim, context_dim is None
        context_dim = dim if context_dim is None else context_dim
        self.heads = heads
        self.heads_at_once: int | None = None
        self.group_norm = None if groups is None else nn.GroupNorm(groups, dim, eps)
        self.to_q = nn.Linear(dim, width, bias=bias)
        self.to_k = nn.Linear(context_dim, width, bias=bias)
        self.to_v = nn.Linear(context_dim, width, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(width, dim)])
        self.register_buffer("joined_weight", None, persistent=False)
        self.register_buffer("joined_bias", None, persistent=False)

    def fuse_projections(self, fuse: bool = True) -> None:
        """Let one product give queries, keys and values of one input, by copies of the weights; or no longer.

        It does so without gradients only, and not where a projection was replaced, as LoRAs do.

        Raises:
            ValueError: a projection is replaced already, or its weights are not there.
        """
        layers: list[Any] = [self.to_q, self.to_k, self.to_v] if self.is_self else [self.to_k, self.to_v]
        if fuse and not all(type(layer) is nn.Linear and not layer.weight.is_meta for layer in layers):
            raise ValueError("projections with LoRAs, quantised or offloaded ones cannot be fused; fuse_lora() first")
        self.joined_weight = torch.cat([layer.weight.detach() for layer in layers]) if fuse else None
        has_bias = fuse and self.to_k.bias is not None
        self.joined_bias = torch.cat([layer.bias.detach() for layer in layers]) if has_bias else None

    def joined(self, x: Tensor) -> tuple[Tensor, ...] | None:
        """All projections of (B, L, D) by one product, if they are fused; None where they are computed one by one."""
        if self.joined_weight is None or torch.is_grad_enabled():
            return None
        if not all(type(layer) is nn.Linear for layer in (self.to_q, self.to_k, self.to_v)):
            return None
        return F.linear(x, self.joined_weight, self.joined_bias).chunk(3 if self.is_self else 2, dim=-1)

    def keys_values(self, context: Tensor) -> KeyValue:
        """(B, L, context_dim) -> keys and values, (B, N, L, width/N) each."""
        joined = None if self.is_self else self.joined(context)
        keys, values = joined or (self.to_k(context), self.to_v(context))
        return split_heads(keys, self.heads), split_heads(values, self.heads)

    def attend(self, tokens: Tensor, context: TextInput, mask: Tensor | None = None) -> Tensor:
        """(B, L', D) and L keys and values, or the states (B, L, context_dim) to make them of -> (B, L', D).

        ``mask`` (B, 1, 1, L) is added to the scores.
        """
        joined = self.joined(tokens) if self.is_self else None
        if joined is not None:
            query, keys, values = (split_heads(x, self.heads) for x in joined)  # (B, N, L', width/N)
        else:
            query = split_heads(self.to_q(tokens), self.heads)
            keys, values = self.keys_values(context) if isinstance(context, Tensor) else context
        if self.heads_at_once is None:
            attended = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
        else:
            parts = zip(*(x.split(self.heads_at_once, dim=1) for x in (query, keys, values)), strict=True)
            attended = torch.cat([F.scaled_dot_product_attention(q, k, v, attn_mask=mask) for q, k, v in parts], dim=1)
        return self.to_out[0](merge_heads(attended))

    forward = attend


class GridAttention(Attention):
    """Self-attention over all positions of a feature map, after a normalisation; the autoencoders' has one head."""

    _from_deprecated_attn_block = True  # diffusers' loader renames parameters of files from before 2023

    def __init__(
        self, channels: int, *, groups: int | None, eps: float = 1e-6, heads: int = 1, width: int | None = None
    ) -> None:
        super().__init__(channels, heads, width=width, bias=True, groups=groups, eps=eps)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """(B, C, H, W) -> (B, C, H, W)."""
        height, width = x.shape[-2:]
        tokens = to_tokens(x if self.group_norm is None else self.group_norm(x))  # (B, HW, C)
        attended = self.attend(tokens, tokens)
        grid = to_grid(attended, height, width)
        # The first summand decides the memory format: channels-last from here on, which is faster in the decoder on a
        # processor. On a GPU every group norm would copy it back.
        return x + grid if x.is_cuda else grid + x
