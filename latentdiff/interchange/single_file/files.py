"""Checkpoint files: their names, shapes and tensors, read as they are asked for."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from latentdiff.interchange.folders import check_safetensors

HEADER = "latentdiff"
"""Key of a file's header that holds the configs of what was saved here, as JSON."""


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a checkpoint file by their names.

    A safetensors file is read piece by piece. A ``.ckpt`` is read whole, by ``torch.load(weights_only=True)``: it can
    hold tensors and plain values, and nothing that runs.

    Args:
        file: ``.safetensors``, or ``.ckpt``, ``.pt`` or ``.bin`` with `allow_pickle`.
        ema: take the averaged weights (``model_ema.``) where there are any.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged, of another kind, or would need more than tensors; or it has no averaged weights.
    """

    def __init__(self, file: Path, allow_pickle: bool = False, ema: bool = False) -> None:
        self.file = file
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file")
        self.header: dict[str, Any] = {}
        self._stream: Any = None
        self._tensors: dict[str, Tensor] = {}
        if file.suffix == ".safetensors":
            check_safetensors(file)
            self._stream = safe_open(file, "pt")
            self.header = read_header(file, self._stream.metadata() or {})
            names = list(self._stream.keys())
        else:
            self._tensors = read_pickle(file, allow_pickle)
            names = list(self._tensors)
        self._places = {name: name for name in names}
        if ema:
            self._use_ema()

    def _use_ema(self) -> None:
        """Let the UNet's names stand for their averages, which are named without dots."""
        averaged = {
            name: average
            for name in self._places
            if (average := "model_ema." + name.removeprefix("model.").replace(".", "")) in self._places
        }
        if not averaged:
            raise ValueError(f"{self.file} has no averaged weights (model_ema.); leave ema out")
        self._places |= averaged

    def __getitem__(self, name: str) -> Tensor:
        place = self._places[name]
        return self._tensors[place] if self._stream is None else self._stream.get_tensor(place)

    def shape(self, name: str) -> tuple[int, ...]:
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


def read_header(file: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """What this package wrote into a file's header; empty for other files."""
    if HEADER not in metadata:
        return {}
    try:
        header = json.loads(metadata[HEADER])
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{file}: its header is not JSON ({error})") from None
    if not isinstance(header, dict) or not all(isinstance(value, dict) for value in header.values()):
        raise ValueError(f"{file}: its header should hold a config for each component")
    return header


def read_pickle(file: Path, allow: bool) -> dict[str, Tensor]:
    """The tensors of a file that ``torch.save`` wrote, without running anything in it."""
    import pickle

    if file.suffix not in (".ckpt", ".pt", ".pth", ".bin"):
        raise ValueError(f"{file}: a checkpoint is a .safetensors file, or a .ckpt")
    if not allow:
        raise ValueError(
            f"{file} is a pickle. It can be read without running anything in it; ask for that with allow_pickle=True "
            f"(--ckpt), or better, get the model as .safetensors"
        )
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).split("WeightsUnpickler error: ")[-1].split("\n")[0]
        raise ValueError(
            f"{file} holds more than tensors, which could run code, so it is not read ({reason.strip()}); get the "
            f"model as .safetensors"
        ) from None
    except (RuntimeError, EOFError, OSError, KeyError) as error:
        raise ValueError(f"{file} is damaged, or no checkpoint: {' '.join(str(error).split())[:200]}") from None
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    tensors = {name: value for name, value in (state or {}).items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"{file}: there are no named tensors in it")
    return tensors
