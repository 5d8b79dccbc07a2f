"""Converting LoRA files between the formats of diffusers, PEFT and kohya (which A1111, ComfyUI and others read)."""

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from latentdiff.interchange.adapter_files import LORA_NAMES, METADATA_KEY, find_adapter, read_config
from latentdiff.interchange.atomic import allow_as_usual, failures_named, json_text
from latentdiff.interchange.folders import check_links
from latentdiff.interchange.lora.kohya_names import (
    NETWORKS,
    TEXT,
    TEXT_2,
    TRANSFORMER,
    UNET,
    from_kohya_name,
    to_kohya_name,
)
from latentdiff.interchange.lora.layers import (
    PEFT_PREFIX,
    Layers,
    format_of,
    of_network,
    peft_config,
    peft_tensors,
    plain_key,
    read_layers,
)
from latentdiff.interchange.lora.lycoris import CONVOLUTIONS
from latentdiff.interchange.user_files import faults_named

LoraFormat = Literal["diffusers", "peft", "kohya"]
CONFIG_NAME = "adapter_config.json"
OF_ENCODERS = ("encoder.", "text_model.", "embeddings.", "pooler.")
"""Beginnings of PEFT's names that belong to a text encoder."""

OF_TRANSFORMERS = ("transformer_blocks.", "adaln_single.", "caption_projection.", "pos_embed.", "proj_out")
"""The same of a transformer that denoises."""

KEPT = ("ss_", "modelspec.")
"""Beginnings of the header's keys that describe the training; they are kept in every format."""


@dataclass(frozen=True)
class LoraReport:
    """What `convert_lora` did."""

    source_format: str
    files: tuple[Path, ...]
    """The files written."""
    layers: dict[str, int]
    """The number of layers in each network, such as {"unet": 128}."""
    ranks: tuple[int, ...]
    """The different ranks, in ascending order."""
    scales: tuple[float, ...]
    """The different values of alpha / rank, in ascending order."""


class LoraFile:
    """A LoRA as read from disk: its tensors, PEFT's config if there is one, and the header.

    A LoRA of several networks in PEFT's format has folders of their names, such as ``unet`` and ``text_encoder``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a whole safetensors file, or holds no LoRA.
    """

    def __init__(self, source: str | Path, weight_name: str | None = None, **hub: Any) -> None:
        parts = [Path(source) / name for name in NETWORKS if (Path(source) / name / CONFIG_NAME).is_file()]
        check_links(Path(source), parts)
        self.state: dict[str, Tensor] = {}
        self.config: dict[str, Any] | None = None
        self.header: dict[str, str] = {}
        self.format = ""
        places: list[str | Path] = [*parts] if weight_name is None and parts else [source]
        for part in places:
            file = find_adapter(part, LORA_NAMES, weight_name, **hub)
            self.read(file, part.name if isinstance(part, Path) and part in parts else None)

    def read(self, file: Path, network: str | None) -> None:
        with safe_open(file, "pt") as stream:
            state = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118 (safe_open is no mapping)
            header = stream.metadata() or {}
        with faults_named(file):
            self.format = format_of(state)
        self.header |= header
        config = read_config(file, header, beside=self.format == "peft")
        state = with_network(state, self.format, network)
        if self.format == "peft":
            networks = {key.partition(".")[0] for key in state}
            config = {f"{name}.{key}": value for name in networks for key, value in (config or {}).items()}
        self.state |= state
        self.config = {**(self.config or {}), **(config or {})} or None


def with_network(state: Mapping[str, Tensor], source_format: str, network: str | None = None) -> dict[str, Tensor]:
    """Tensors under keys with the name of their network, which PEFT's format leaves out.

    Raises:
        ValueError: two adapters of one layer.
    """
    plain = {plain_key(key): tensor for key, tensor in state.items()}
    if len(plain) < len(state):
        raise ValueError("there are several adapters in it; save each to a file of its own")
    if source_format != "peft" or all(key.startswith(tuple(f"{network}." for network in NETWORKS)) for key in plain):
        return plain
    if network is None:
        network = TEXT if all(key.startswith(OF_ENCODERS) for key in plain) else UNET
        network = TRANSFORMER if any(key.startswith(OF_TRANSFORMERS) for key in plain) else network
    return {f"{network}.{key}": tensor for key, tensor in plain.items()}


def convert_lora(
    source: Path, target: Path, to: LoraFormat, *, overwrite: bool = False, layers_per_block: int = 2
) -> LoraReport:
    """Write a LoRA in another format. Strengths, convolutions, text encoder and precision are kept.

    Only PEFT's training settings, which do not affect pictures, are dropped. ``target`` is a safetensors file; for
    diffusers it may also be a folder, which then holds ``pytorch_lora_weights.safetensors``. PEFT's format is a folder
    for one network, and for several a folder with such folders, ``unet``, ``text_encoder`` and so on. It
    does not name its model; PEFT loads it into the network itself.

    Args:
        source: a file in any of the formats, or its folder.
        overwrite: replace ``target`` if it exists.
        layers_per_block: of the UNet, for kohya files in the blocks of the original code. Stable Diffusion has 2.

    Raises:
        FileNotFoundError: there is no such file.
        FileExistsError: ``target`` exists, and ``overwrite`` is False.
        ValueError: the source is damaged or no LoRA, or the format cannot hold it. Nothing is written.
    """
    source, target = Path(source).expanduser(), Path(target).expanduser()
    if to not in get_args(LoraFormat):
        raise ValueError(f"unknown LoRA format {to!r}; choose from {', '.join(get_args(LoraFormat))}")
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such file or folder")
    if to == "diffusers" and target.suffix != ".safetensors":
        target = target / LORA_NAMES[0]
    if to == "kohya" and target.suffix != ".safetensors":
        raise ValueError(f"{target}: the name of a kohya file ends in .safetensors")
    if to == "peft" and target.suffix == ".safetensors":
        raise ValueError(f"{target}: PEFT's format is a folder; give the name of one")
    with faults_named(source):
        file = LoraFile(source)
        layers, others = read_layers(file.state, file.config, layers_per_block=layers_per_block)
        if others:
            raise ValueError(f"{len(others)} keys, such as {others[0]}, are no LoRA's of a known layer")
        check_shapes(layers)
        files = FORMATS[to](layers, {key: value for key, value in file.header.items() if key.startswith(KEPT)})
    written = write_files(files, target, overwrite)
    return LoraReport(
        file.format,
        written,
        {network: count for network in NETWORKS if (count := len(of_network(layers, network)))},
        tuple(sorted({layer.rank for layer in layers.values()})),
        tuple(sorted({layer.scale for layer in layers.values()})),
    )


def check_shapes(layers: Layers) -> None:
    """Raises ValueError for a layer of a LoHa or LoKr whose kernel only the network tells."""
    for name, layer in layers.items():
        if layer.is_flat and name.rpartition(".")[2] in CONVOLUTIONS:
            raise ValueError(
                f"{name}: such a file does not say whether this is a convolution, and of which size; a pipeline of its "
                f"model loads it (load_lora_weights), and fuse_lora() keeps it in the weights"
            )


Content = tuple[dict[str, Tensor], dict[str, str]] | dict[str, Any]
"""Content of a file: tensors and header, or a JSON object."""


def diffusers_files(layers: Layers, kept: dict[str, str]) -> dict[str, Content]:
    """Contents by path below the target; "" is the target itself."""
    config: dict[str, Any] = {}
    for network in NETWORKS:
        if own := of_network(layers, network):
            config |= {f"{network}.{key}": value for key, value in peft_config(own).items()}
    header = {"format": "pt", METADATA_KEY: json.dumps(config, indent=2, sort_keys=True), **kept}
    return {"": (peft_tensors(with_text_model(layers)), header)}


def with_text_model(layers: Layers) -> Layers:
    """With CLIP's names as before transformers 5.6, which every diffusers that we take reads."""
    for network in (TEXT, TEXT_2):
        start, old = f"{network}.encoder.layers.", f"{network}.text_model.encoder.layers."
        layers = {name.replace(start, old, 1): layer for name, layer in layers.items()}
    return layers


def peft_files(layers: Layers, kept: dict[str, str]) -> dict[str, Content]:
    files: dict[str, Content] = {}
    parts = {network: own for network in NETWORKS if (own := of_network(layers, network))}
    for network, own in parts.items():
        folder = f"{network}/" if len(parts) > 1 else ""
        tensors = {f"{PEFT_PREFIX}{key}": tensor for key, tensor in peft_tensors(own).items()}
        files[f"{folder}adapter_model.safetensors"] = (tensors, {"format": "pt", **kept})
        files[f"{folder}{CONFIG_NAME}"] = {
            "peft_type": "LORA",
            "task_type": None,
            "base_model_name_or_path": None,
            "inference_mode": True,
            **peft_config(own),
        }
    return files


def kohya_files(layers: Layers, kept: dict[str, str]) -> dict[str, Content]:
    tensors: dict[str, Tensor] = {}
    two_encoders = any(name.startswith((f"{TEXT_2}.", f"{UNET}.add_embedding.")) for name in layers)
    for name, layer in layers.items():
        flat = to_kohya_name(name, two_encoders)
        if from_kohya_name(flat) != name:
            raise ValueError(f"{name} is no layer of Stable Diffusion's; kohya's format has no name for it")
        if layer.bias is not None:
            raise ValueError(f"{name} has a bias, which kohya's format cannot hold")
        tensors[f"{flat}.alpha"] = torch.tensor(layer.alpha)
        tensors[f"{flat}.lora_down.weight"] = layer.down
        tensors[f"{flat}.lora_up.weight"] = layer.up
        if layer.magnitude is not None:
            tensors[f"{flat}.dora_scale"] = layer.magnitude.reshape(-1, *(1,) * (layer.down.ndim - 1))
    common = peft_config({name: layer for name, layer in layers.items() if name.startswith(f"{UNET}.")} or layers)
    header = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(common["r"]),
        "ss_network_alpha": str(common["lora_alpha"]),
    }
    return {"": (tensors, {**header, **kept})}


FORMATS = {"diffusers": diffusers_files, "peft": peft_files, "kohya": kohya_files}


def write_files(files: Mapping[str, Content], target: Path, overwrite: bool) -> tuple[Path, ...]:
    """Write all of `files` or none; they are written to a temporary folder and then moved into place.

    Raises:
        FileExistsError: one of them is there, and `overwrite` is False.
    """
    places = {name: target / name if name else target for name in files}
    for place in places.values():
        if place.is_dir() or (place.exists() and not overwrite):
            raise FileExistsError(f"{place} is there already; choose another name, or --overwrite (overwrite=True)")
    beside = next(folder for folder in target.absolute().parents if folder.is_dir())
    with failures_named(target), tempfile.TemporaryDirectory(dir=beside, prefix=".saving-") as temporary:
        partial = {name: Path(temporary) / str(i) for i, name in enumerate(files)}
        for name, content in files.items():
            if isinstance(content, dict):
                partial[name].write_text(json_text(content), encoding="utf-8")
            else:
                tensors, header = content
                save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, partial[name], header)
        allow_as_usual(Path(temporary))
        for name, place in places.items():
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(partial[name], place)
    return tuple(places.values())
