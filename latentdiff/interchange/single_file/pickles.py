"""Pickled checkpoints, as the first models were released: read without executing code in them."""

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")


class Ignored:
    """Stand-in for objects of the trainer that the first released checkpoints hold beside their weights."""

    def __init__(self, *args: Any, **options: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


IGNORED = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    "torch.nn.modules.container.ParameterDict",
)
"""Classes that are read as `Ignored` and never imported. The last one occurs in files of embeddings."""


def load_pickle(file: Path, allow: bool) -> Any:
    """The content of a file of ``torch.save``, if it is tensors, numbers, strings and containers of them.

    Tensors stay on disk until they are used, if the file is not of the oldest format.

    Raises:
        ValueError: it is damaged, holds anything else, or `allow` is False.
    """
    if file.suffix not in SUFFIXES:
        raise ValueError(f"{file}: a checkpoint is a .safetensors file, or with allow_pickle=True (--ckpt) a .ckpt")
    if not allow:
        raise ValueError(
            f"{file} is a pickle, which is only read if asked for: allow_pickle=True (--ckpt). Nothing in it is run "
            f"then, but better get the model as .safetensors"
        )
    stand_ins: list[Any] = [(type(name, (Ignored,), {}), name) for name in IGNORED]
    try:
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} holds more than tensors, which could run code, so it was not read and nothing was run "
            f"({reason(error)}); get the model as .safetensors"
        ) from None
    except Exception as error:  # a damaged file can raise anything
        raise ValueError(f"{file} is damaged, or no checkpoint ({reason(error)})") from None


def reason(error: Exception) -> str:
    """The reason in torch's message, without its advice to read the file unsafely."""
    asked = re.search(r"GLOBAL (\S+)", str(error))
    if asked:
        return f"it asks for {asked[1]}"
    text = str(error).split("WeightsUnpickler error:")[-1].strip().split("\n")[0].split(". ")[0]
    return " ".join(text.split())[:200] or type(error).__name__


def read_pickle(file: Path, allow: bool) -> tuple[dict[str, Tensor], int | None]:
    """The named tensors of a pickled checkpoint, and its number of training steps, if it holds it.

    Raises:
        ValueError: see `load_pickle`; or there are no named tensors in it.
    """
    content = load_pickle(file, allow)
    content = content if isinstance(content, dict) else {}
    state = content.get("state_dict", content)
    tensors = {name: value for name, value in state.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"{file}: there are no named tensors in it")
    step = content.get("global_step")
    return tensors, step if isinstance(step, int) else None
