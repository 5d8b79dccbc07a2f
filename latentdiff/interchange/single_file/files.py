"""Checkpoint files: their names, shapes and tensors, read when they are needed."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from latentdiff.interchange.folders import check_safetensors
from latentdiff.interchange.single_file.names import CLIP, UNET, VAE, VAE_PARTS
from latentdiff.interchange.single_file.pickles import read_pickle

HEADER = "latentdiff"
"""Key of a file's header that holds the configs of what was saved here, as JSON."""


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a checkpoint file by their original names.

    A safetensors file is read tensor by tensor. A ``.ckpt`` is read by ``torch.load(weights_only=True)``: see
    `pickles.read_pickle`. The names of an autoencoder or a UNet alone, which lack their prefix, get it.

    Args:
        file: ``.safetensors``, or ``.ckpt``, ``.pt``, ``.pth`` or ``.bin`` with `allow_pickle`.
        ema: take the averaged weights (``model_ema.``) of the UNet; in a file without one, of the autoencoder.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged, of another kind, or would need more than tensors; or it has no averaged weights.
    """

    def __init__(self, file: Path, allow_pickle: bool = False, ema: bool = False) -> None:
        self.file = file
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file")
        self.header: dict[str, Any] = {}
        """The config of each component, by name, if this package wrote the file."""
        self.global_step: int | None = None
        """The number of training steps, if a ``.ckpt`` holds it."""
        self._stream: Any = None
        self._tensors: dict[str, Tensor] = {}
        if file.suffix == ".safetensors":
            check_safetensors(file)
            self._stream = safe_open(file, "pt")
            self.header = read_header(file, self._stream.metadata() or {})
            names = list(self._stream.keys())
        else:
            self._tensors, self.global_step = read_pickle(file, allow_pickle)
            names = list(self._tensors)
        self.beginning = missing_beginning(names)
        """The prefix that the names in the file lack: an autoencoder's or a UNet's, or the empty string."""
        self._places = original_names(names, self.beginning)
        if ema:
            self.use_averages("UNet" if any(name.startswith(UNET) for name in self._places) else "autoencoder")

    def use_averages(self, part: str) -> None:
        """Let the names of weights refer to their averages, whose names in the file have no dots.

        Args:
            part: "UNet" or "autoencoder". A whole model has averages of the UNet only.

        Raises:
            ValueError: the file has none.
        """
        of: Any = UNET if part == "UNet" else VAE_PARTS
        averages = {
            name: "model_ema." + place.removeprefix("model.").replace(".", "")
            for name, place in self._places.items()
            if name.startswith(of) and name.endswith((".weight", ".bias"))
        }
        there = set(self._places.values())
        missing = [name for name, average in averages.items() if average not in there]
        if missing or not averages:
            lacks = f"; {self.own_name(missing[0])} has none" if 0 < len(missing) < len(averages) else ""
            raise ValueError(f"{self.file} has no averaged weights (model_ema.) of its {part}{lacks}; leave ema out")
        self._places |= averages

    @property
    def has_unet(self) -> bool:
        return f"{UNET}input_blocks.0.0.weight" in self._places

    @property
    def has_vae(self) -> bool:
        return any(name.startswith(VAE_PARTS[:2]) for name in self._places)

    def own_name(self, name: str) -> str:
        """The name of a weight in the file itself."""
        return name.removeprefix(self.beginning)

    def __getitem__(self, name: str) -> Tensor:
        place = self._places[name]
        return self._tensors[place] if self._stream is None else self._stream.get_tensor(place)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        place = self._places[name]
        if self._stream is None:
            return tuple(self._tensors[place].shape)
        return tuple(self._stream.get_slice(place).get_shape())

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places


def missing_beginning(names: list[str]) -> str:
    """The prefix that the names of an autoencoder or a UNet alone lack; else the empty string."""
    if any(name.startswith(("encoder.down.", "decoder.up.")) for name in names):
        return VAE
    return UNET if "input_blocks.0.0.weight" in names else ""


def original_names(names: list[str], beginning: str) -> dict[str, str]:
    """The names that the weights have in a whole checkpoint, with those in the file.

    Some files leave out ``text_model.`` in the text encoder's.
    """
    known = set(names)
    if beginning:
        return {beginning + name: name for name in names}
    if f"{CLIP}embeddings.token_embedding.weight" in known:
        old = tuple(CLIP + part for part in ("embeddings.", "encoder.", "final_layer_norm."))
        return {name.replace(CLIP, f"{CLIP}text_model.") if name.startswith(old) else name: name for name in names}
    return {name: name for name in names}


def read_header(file: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The configs that this package wrote into a file's header; empty for other files.

    Raises:
        ValueError: it is damaged.
    """
    if HEADER not in metadata:
        return {}
    try:
        header = json.loads(metadata[HEADER])
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{file}: its header is not JSON ({error})") from None
    if not isinstance(header, dict) or not all(isinstance(value, dict) for value in header.values()):
        raise ValueError(f"{file}: its header should hold a config for each component")
    return header


def main_dtype(weights: Mapping[str, Tensor], beginning: str) -> torch.dtype:
    """The dtype of the first floating-point weight whose name starts with `beginning`; float32 if there is none."""
    for name in weights:
        if name.startswith(beginning) and (tensor := weights[name]).is_floating_point():
            return tensor.dtype
    return torch.float32
