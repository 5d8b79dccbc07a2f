"""LoHa and LoKr (Yeh et al. 2024, LyCORIS) as LoRAs that do exactly the same, layer by layer, and their files.

LoHa (FedPara, Hyeon-Woo et al. 2022): dW = (A1 B1) * (A2 B2), a product place by place. LoKr: dW = W1 (x) W2, a
Kronecker product. LyCORIS's names for the matrices are PEFT's too.
"""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
PARTS = {part: part for part in (*LOHA, *LOKR)}
"""The matrices of a layer, as the ends of keys name them."""
MOST, MOST_IN_ALL = 2**26, 2**32
"""Numbers in the weight of one layer, and in those of all: small factors may stand for any size."""
CONVOLUTIONS = ("conv", "conv1", "conv2", "conv_in", "conv_out", "conv_shortcut", "proj_in", "proj_out")
"""Layers that may be convolutions, to which a flat matrix does not say their kernel."""


def kind_of(parts: Iterable[str]) -> str | None:
    """LoHa or LoKr, by some part of a layer; None: neither."""
    return next((("LoHa" if part in LOHA else "LoKr") for part in parts if part in PARTS), None)


def as_lora(key: str, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, int | None]:
    """What a layer's matrices are as those of a LoRA: down (r, in, ...), up (out, r, ...), with dW = up down exactly.

    Also the rank that its alpha is divided by; None: nothing says it.

    Args:
        key: of one of them, for messages.
        parts: by the names of `PARTS`.

    Raises:
        ValueError: one is missing, or they do not fit each other.
    """
    kind = str(kind_of(parts))
    try:
        return (_loha if kind == "LoHa" else _lokr)({name: one.float() for name, one in parts.items() if name in PARTS})
    except KeyError as error:
        raise ValueError(f"{key}: this layer of a {kind} has no {error.args[0]}") from None
    except (RuntimeError, IndexError) as error:
        shapes = ", ".join(f"{name} {tuple(one.shape)}" for name, one in parts.items())
        reason = str(error).splitlines()[0]
        raise ValueError(f"{key}: the matrices of this {kind} do not fit each other: {shapes} ({reason})") from error


def _loha(parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, int]:
    a1, b1, a2, b2 = (parts[name] for name in LOHA[:4])
    rank = len(b1)
    if "hada_t1" in parts or "hada_t2" in parts:  # Tucker's form of a convolution
        factors = (_tucker(parts["hada_t1"], a1, b1), _tucker(parts["hada_t2"], a2, b2))
        return *_whole(factors[0] * factors[1]), rank
    if a1.shape[0] != a2.shape[0] or b1.shape[1] != b2.shape[1] or a1.shape[1] != rank or a2.shape[1] != len(b2):
        raise RuntimeError("their sides differ")
    _check_size(len(a1), b1.shape[1])
    if rank * len(b2) >= min(len(a1), b1.shape[1]):
        return *_whole((a1 @ b1) * (a2 @ b2)), rank
    # (A1 B1) * (A2 B2) = (rows of A1 (x) rows of A2) (columns of B1 (x) columns of B2), of rank r1 r2
    up = torch.einsum("or,os->ors", a1, a2).flatten(1)
    down = torch.einsum("ri,si->rsi", b1, b2).flatten(0, 1)
    return down, up, rank


def _lokr(parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, int | None]:
    ranks = [len(parts[name]) for name in ("lokr_w1_b", "lokr_w2_b") if name in parts]
    if "lokr_t2" in parts and len(parts["lokr_w2_a"]) != len(parts["lokr_t2"]):
        raise RuntimeError("their ranks differ")
    first = parts["lokr_w1"] if "lokr_w1" in parts else _product(parts["lokr_w1_a"], parts["lokr_w1_b"])
    if "lokr_w2" in parts:
        second = parts["lokr_w2"]
    elif "lokr_t2" in parts:
        second = _tucker(parts["lokr_t2"], parts["lokr_w2_a"], parts["lokr_w2_b"])
    else:
        second = _product(parts["lokr_w2_a"], parts["lokr_w2_b"])
    if first.ndim != 2 or second.ndim not in (2, 4):
        raise RuntimeError("a Kronecker product needs matrices")
    _check_size(first.numel(), second.numel())
    down, up = _whole(torch.kron(first.reshape(*first.shape, *(1,) * (second.ndim - 2)), second))
    return down, up, ranks[0] if ranks else None


def _tucker(core: Tensor, outputs: Tensor, inputs: Tensor) -> Tensor:
    """(out, in, k, k) of a core (r, r, k, k) and its sides (r, out) and (r, in)."""
    _check_size(outputs.shape[1], inputs.shape[1], *core.shape[2:])
    return torch.einsum("ijkl,jr,ip->prkl", core, inputs, outputs)


def _product(first: Tensor, second: Tensor) -> Tensor:
    _check_size(len(first), second.shape[1])
    return first @ second


def _check_size(*sides: int) -> None:
    if math.prod(sides) > MOST:
        raise RuntimeError(f"more than {MOST:,} numbers in the weight of one layer")


def _whole(delta: Tensor) -> tuple[Tensor, Tensor]:
    """A difference of weights (out, in, ...) as down and up, one of which is the identity."""
    outputs, inputs = delta.flatten(1).shape
    ones = (1,) * (delta.ndim - 2)
    if outputs <= inputs:
        return delta, torch.eye(outputs).reshape(outputs, outputs, *ones)
    return torch.eye(inputs).reshape(inputs, *delta.shape[1:]), delta.reshape(outputs, inputs, *ones)
