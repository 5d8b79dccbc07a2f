"""LoRA (Hu et al. 2021), layer by layer, independent of the file's format: W + alpha/r B A, bias and DoRA's magnitude.

The formats of diffusers (also its older names), PEFT and kohya are read and written. LoHa and LoKr are read as LoRAs.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latentdiff.interchange.lora import lycoris
from latentdiff.interchange.lora.kohya_names import (
    KOHYA_PREFIXES,
    TEXT,
    TEXT_2,
    TRANSFORMER,
    UNET,
    from_kohya_name,
    is_ldm_name,
    short,
)

PEFT_PREFIX = "base_model.model."
ADAPTER_NAME = re.compile(r"(\.lora_[AB]|\.lora_magnitude_vector)\.[^.]+(\.(?:weight|bias))$")
KOHYA_PARTS = {
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora_mid.weight": "mid",
    "alpha": "alpha",
    "dora_scale": "magnitude",
    **lycoris.PARTS,
}
OWN_PARTS = {
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_B.bias": "bias",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "lora.down.weight": "down",  # from here on, names that diffusers wrote before it used PEFT
    "lora.up.weight": "up",
    "lora_linear_layer.down.weight": "down",
    "lora_linear_layer.up.weight": "up",
    "alpha": "alpha",
    **lycoris.PARTS,
}
OLD_ATTENTION = re.compile(r"(.+?)(?:\.processor)?\.to_(q|k|v|out)_lora\.(down|up)\.weight")
PLAIN_NAME = re.compile(r"[\w.]*")
"""Patterns in a config that are no more than the end of a layer's name."""

MAX_PATTERNS, MAX_EXPRESSIONS, MAX_LENGTH = 10_000, 32, 200
"""Of patterns, of regular expressions among them, and of the letters of one. A UNet has some hundred layers."""

OTHER_KINDS = {
    "oft_": "OFT",
    ".diff": "a difference of weights",
    ".on_input": "IA3",
}


@dataclass(frozen=True)
class LoraLayer:
    """The update of one layer's weight: ``alpha / rank * up @ down``."""

    down: Tensor
    """A: (r, in), or (r, in, k, k) for a convolution."""
    up: Tensor
    """B: (out, r), or (out, r, 1, 1)."""
    alpha: float
    bias: Tensor | None = None
    """(out,), of B."""
    magnitude: Tensor | None = None
    """(out,), of DoRA (Liu et al. 2024)."""
    is_flat: bool = False
    """Whether ``down`` may be that of a convolution, (r, in * k * k), which only the network can tell."""

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


Layers = dict[str, LoraLayer]
"""By the layer's name, such as ``unet.mid_block.resnets.0.conv1``."""


def format_of(state: Mapping[str, Tensor]) -> str:
    """One of "kohya", "kohya (original blocks)", "peft", "diffusers" or "diffusers (old)".

    Raises:
        ValueError: none of them.
    """
    if not state:
        raise ValueError("there are no tensors in it")
    kinds = {kind for mark, kind in OTHER_KINDS.items() for key in state if mark in key}
    if kinds:
        raise ValueError(f"it holds {' and '.join(sorted(kinds))}; of such adapters LoRA, LoHa and LoKr can be read")
    if all(key.startswith(tuple(KOHYA_PREFIXES)) for key in state):
        return "kohya (original blocks)" if any(is_ldm_name(key.split(".")[0]) for key in state) else "kohya"
    parts = {split_key(plain_key(key))[1] for key in state}
    if "down" not in parts and not lycoris.kind_of(filter(None, parts)):
        raise ValueError(f"keys such as {next(iter(state))} are not LoRA in diffusers', PEFT's or kohya's format")
    if all(key.startswith(PEFT_PREFIX) for key in state):
        return "peft"
    return "diffusers" if any(".lora_A." in key for key in state) else "diffusers (old)"


def plain_key(key: str) -> str:
    """A key as PEFT saves it: without the wrapper's name and, as in a network's own state, that of the adapter."""
    return ADAPTER_NAME.sub(r"\1\2", key.replace(PEFT_PREFIX, "", 1))


def read_layers(
    state: Mapping[str, Tensor],
    config: Mapping[str, Any] | None = None,
    *,
    layers_per_block: int = 2,
    known: Mapping[str, str] | None = None,
) -> tuple[Layers, list[str]]:
    """The layers of a file, and the keys in it that belong to none.

    Args:
        state: the file's tensors; PEFT's keys without ``base_model.model.`` and with the network's name, as diffusers'.
        config: PEFT's, its keys with the network's name too. With neither config nor alpha in the file, alpha is the
            rank.
        layers_per_block: see `from_kohya_name`.
        known: the layers of the networks that are loaded, from `flat_names`; others are not read.

    Raises:
        ValueError: a layer lacks a matrix, or something is not a LoRA's.
    """
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    keys: dict[str, str] = {}
    others = []
    for key, tensor in state.items():
        name, part = split_key(key, layers_per_block, known)
        if name is None or part is None or (known is not None and name not in known.values()):
            others.append(key)
        elif part in found[name]:
            raise ValueError(f"{key} and another key are both the {part} part of {name}")
        else:
            found[name][part] = tensor
            keys.setdefault(name, key)
    layers, total = dict[str, LoraLayer](), 0
    for name, parts in found.items():
        layers[name] = make_layer(name, keys[name], parts, config)
        total += layers[name].up.numel() + layers[name].down.numel() if lycoris.kind_of(parts) else 0
        if total > lycoris.MOST_IN_ALL:
            raise ValueError(f"its layers stand for more than {lycoris.MOST_IN_ALL:,} numbers; no model is as large")
    return layers, others


def split_key(
    key: str, layers_per_block: int = 2, known: Mapping[str, str] | None = None
) -> tuple[str | None, str | None]:
    """The layer that a key belongs to, and which part it is; None where that is unknown."""
    if key.startswith(tuple(KOHYA_PREFIXES)):
        flat, _, end = key.partition(".")
        return from_kohya_name(flat, layers_per_block, known), KOHYA_PARTS.get(end)
    old = OLD_ATTENTION.fullmatch(key)
    if old:
        module, which, part = old.groups()
        text = module.startswith((f"{TEXT}.", f"{TEXT_2}."))
        name = f"{which}_proj" if text else "to_out.0" if which == "out" else f"to_{which}"
        return own_name(f"{module}.{name}"), part
    ends = [end for end in OWN_PARTS if key.endswith(f".{end}")]
    if not ends:
        return None, None
    longest = max(ends, key=len)
    return own_name(key.removesuffix(f".{longest}")), OWN_PARTS[longest]


def own_name(name: str) -> str:
    """A name with its network, which diffusers' oldest files leave out for the denoiser."""
    name = name.replace(".processor.", ".")
    if name.startswith("transformer_blocks."):
        return f"{TRANSFORMER}.{name}"
    return f"{UNET}.{name}" if name.startswith(("down_blocks.", "mid_block.", "up_blocks.")) else short(name)


def make_layer(name: str, key: str, parts: Mapping[str, Tensor], config: Mapping[str, Any] | None) -> LoraLayer:
    check_tensors(key, parts)
    down, up, alpha = (of_lycoris if lycoris.kind_of(parts) else of_lora)(name, key, parts, config)
    if not math.isfinite(alpha):
        raise ValueError(f"{key}: its alpha is {alpha}; it must be finite")
    magnitude = parts.get("magnitude")
    if magnitude is not None:
        check_magnitude(key, magnitude, len(up))
        magnitude = magnitude.flatten()
    is_flat = lycoris.kind_of(parts) is not None and down.ndim == 2
    return LoraLayer(down, up, alpha, parts.get("bias"), magnitude, is_flat)


def check_tensors(key: str, parts: Mapping[str, Tensor]) -> None:
    """Raises ValueError for parts of a layer that can be none."""
    for part, tensor in parts.items():
        if not (tensor.is_floating_point() or part == "alpha") or 0 in tensor.shape:
            raise ValueError(f"{key}: no matrix of a LoRA has {tensor.dtype} and shape {tuple(tensor.shape)}")
        if not tensor.float().isfinite().all():
            raise ValueError(f"{key}: the {part} part of this layer has values that are not finite (nan or inf)")
    if "alpha" in parts and parts["alpha"].numel() != 1:
        raise ValueError(f"{key}: its alpha must be one number, not of shape {tuple(parts['alpha'].shape)}")


def of_lycoris(
    name: str, key: str, parts: Mapping[str, Tensor], config: Mapping[str, Any] | None
) -> tuple[Tensor, Tensor, float]:
    """Down, up and alpha of a LoRA that does what a layer of a LoHa or LoKr does."""
    down, up, rank = lycoris.as_lora(key, parts)
    if rank is None:  # LyCORIS leaves such a layer as it is; PEFT scales it all the same
        rank = int(setting_of("r", name, config) or 0)
        alpha = float(rank or 1) if not rank or "alpha" in parts else alpha_of(name, rank, config)
        rank = rank or 1
    else:
        alpha = float(parts["alpha"]) if "alpha" in parts else alpha_of(name, rank, config)
    return down, up, alpha / rank * len(down)


def of_lora(
    name: str, key: str, parts: Mapping[str, Tensor], config: Mapping[str, Any] | None
) -> tuple[Tensor, Tensor, float]:
    """Down, up and alpha of a LoRA's layer."""
    down, up = parts.get("down"), parts.get("up")
    if down is None or up is None:
        raise ValueError(f"{key}: this layer has no {'down (A)' if down is None else 'up (B)'} matrix")
    check_matrices(key, down, up, parts.get("mid"))
    if "mid" in parts:  # LyCORIS: three factors of a convolution; the first two are multiplied
        down = torch.einsum("rskl,si->rikl", parts["mid"].float(), down.flatten(1).float()).to(down.dtype)
    return down, up, float(parts["alpha"]) if "alpha" in parts else alpha_of(name, len(down), config)


def check_magnitude(key: str, magnitude: Tensor, outputs: int) -> None:
    """Raises ValueError if DoRA's magnitudes are not one for each output; LyCORIS also writes one for each input."""
    axis = 0 if magnitude.ndim == 1 or key.startswith(tuple(KOHYA_PREFIXES)) else 1
    if magnitude.ndim == 0 or magnitude.numel() != outputs or magnitude.shape[axis] != outputs:
        raise ValueError(f"{key}: DoRA's magnitudes have shape {tuple(magnitude.shape)}, not one for each output")


def check_matrices(key: str, down: Tensor, up: Tensor, mid: Tensor | None) -> None:
    """Raises ValueError if the matrices of a layer do not fit each other."""
    for tensor in (down, up, *([] if mid is None else [mid])):
        if tensor.ndim not in (2, 4):
            raise ValueError(f"{key}: no matrix of a LoRA has {tensor.dtype} and shape {tuple(tensor.shape)}")
    if mid is not None and (mid.ndim != 4 or mid.shape[1] != down.shape[0] or down.shape[2:].numel() != 1):
        raise ValueError(f"{key}: its matrices do not fit each other: {tuple(down.shape)}, then {tuple(mid.shape)}")
    first = down if mid is None else mid
    if up.shape[1] != first.shape[0] or up.ndim != first.ndim or up.shape[2:].numel() != 1:
        raise ValueError(f"{key}: its matrices do not fit each other: {tuple(first.shape)}, then {tuple(up.shape)}")


def alpha_of(name: str, rank: int, config: Mapping[str, Any] | None) -> float:
    """Alpha of a layer by a PEFT config; the rank if there is none for its network."""
    alpha = setting_of("lora_alpha", name, config)
    if alpha is None:
        return float(rank)
    rs = (config or {}).get(f"{name.partition('.')[0]}.use_rslora")
    return alpha * math.sqrt(rank) if rs else alpha  # rsLoRA (Kalajdzievski 2023): alpha / sqrt(r)


PATTERNS = {"lora_alpha": "alpha_pattern", "r": "rank_pattern"}
"""What says a setting of single layers."""


def setting_of(key: str, name: str, config: Mapping[str, Any] | None) -> float | None:
    """A setting of `PATTERNS` for a layer by a PEFT config; None if there is no config for its network."""
    network, _, module = name.partition(".")
    start = f"{network}."
    own = {key.removeprefix(start): value for key, value in (config or {}).items() if key.startswith(start)}
    if not own:
        return None
    patterns = own.get(PATTERNS[key]) or {}
    try:
        check_patterns(patterns)
        matching = (value for pattern, value in patterns.items() if matches(pattern, module))
        return float(next(matching, own.get(key, 8)))  # PEFT's default of both
    except (TypeError, ValueError, AttributeError, re.error, RecursionError) as error:
        raise ValueError(f"the LoRA's config is damaged: {key} or {PATTERNS[key]} ({error})") from error


def check_patterns(patterns: Mapping[str, Any]) -> None:
    """Raises ValueError for patterns whose matching could take very long: many, long, or with nested repetition."""
    involved = [pattern for pattern in patterns if not PLAIN_NAME.fullmatch(pattern)]
    if len(patterns) > MAX_PATTERNS or len(involved) > MAX_EXPRESSIONS:
        raise ValueError(
            f"there are {len(patterns)} patterns, {len(involved)} of them regular expressions; the limits are "
            f"{MAX_PATTERNS} and {MAX_EXPRESSIONS}"
        )
    for pattern in involved:
        if len(pattern) > MAX_LENGTH or len(re.findall(r"[*+]", pattern)) > 2 or re.search(r"\)[*+?]|\{", pattern):
            raise ValueError(f"{pattern[:100]!r} is too involved for the name of a layer")


def matches(pattern: str, module: str) -> bool:
    """Whether PEFT would apply a config's pattern, checked already, to `module`."""
    names = (module, f"text_model.{module}")
    if PLAIN_NAME.fullmatch(pattern):
        return any(name == pattern or name.endswith(f".{pattern}") for name in names)
    return any(re.match(rf"(.*\.)?({pattern})$", name) for name in names)


def peft_config(layers: Layers) -> dict[str, Any]:
    """The arguments of PEFT's ``LoraConfig`` for the layers of one network, whose names are without it.

    Raises:
        ValueError: PEFT cannot have such a LoRA.
    """
    ranks = {name: layer.rank for name, layer in layers.items()}
    alphas = {name: number(layer.alpha) for name, layer in layers.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    dora = {layer.magnitude is not None for layer in layers.values()}
    bias = {layer.bias is not None for layer in layers.values()}
    if len(dora) > 1 or len(bias) > 1:
        what = "DoRA's magnitudes" if len(dora) > 1 else "a bias"
        raise ValueError(f"some of its layers have {what} and some do not; PEFT and diffusers know only all or none")
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
        "target_modules": sorted(layers),
        "use_dora": dora == {True},
        "lora_bias": bias == {True},
    }


def number(value: float) -> int | float:
    return int(value) if value.is_integer() else value


def peft_tensors(layers: Layers) -> dict[str, Tensor]:
    """The layers' tensors under PEFT's names; what precedes ``.lora_A`` is unchanged."""
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        tensors[f"{name}.lora_A.weight"] = layer.down
        tensors[f"{name}.lora_B.weight"] = layer.up
        if layer.bias is not None:
            tensors[f"{name}.lora_B.bias"] = layer.bias
        if layer.magnitude is not None:
            shape = (1, -1, 1, 1) if layer.down.ndim == 4 else (-1,)
            tensors[f"{name}.lora_magnitude_vector"] = layer.magnitude.reshape(shape)
    return tensors


def of_network(layers: Layers, network: str) -> Layers:
    """The layers of one network, under names without it."""
    start = f"{network}."
    return {name.removeprefix(start): layer for name, layer in layers.items() if name.startswith(start)}
