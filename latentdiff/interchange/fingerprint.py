"""Digests that identify a model: of the files that a pipeline is loaded from, and of weights in memory."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentdiff.interchange.folders import read_json

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = re.compile(r"[^.]+?(\.(?P<variant>[^.]+?))?(-\d{5}-of-\d{5})?\.safetensors")
CONFIGS = (".json", ".txt", ".model")  # tokenizers have lists of words and merges, and sentencepiece models
IGNORED_KEYS = ("_diffusers_version", "_name_or_path", "_commit_hash", "transformers_version")
"""Keys of a config that name its writer or its path, and do not count."""

SHA256 = re.compile(r"[0-9a-f]{64}")


def model_digest(folder: Path, variant: str | None = None) -> str:
    """SHA-256, in hexadecimal, over the weights and configs that ``model_index.json`` names.

    It depends on the files' names and contents and neither on where the folder is nor on what else lies in it. The
    same weights saved in other shards, or in another precision, are another model here. Large files in the hub's cache
    are not read: they are named by their SHA-256 there. A file of our own layout is the folder that it holds.

    Args:
        folder: of a pipeline; or a file that holds a whole one. Of Stable Diffusion's layout it is the file's SHA-256.
        variant: such as "fp16": the weight files that count where a component has them.

    Raises:
        FileNotFoundError: no pipeline folder.
        ValueError: its index is damaged.
    """
    if folder.is_file():
        from latentdiff.interchange.packed import packed_content, unpacked

        if packed_content(folder) is None:
            return file_digest(folder)
        with unpacked(folder) as held:
            return model_digest(held, variant)
    index = read_json(folder / "model_index.json")
    whole = hashlib.sha256()
    for name, value in sorted(index.items()):
        if not isinstance(value, list) or len(value) != 2 or value[1] is None:
            continue
        whole.update(f"{name} {value[1]}\n".encode())
        for file in component_files(folder / name, variant):
            whole.update(f"{name}/{file.name} {file_digest(file)}\n".encode())
    return whole.hexdigest()


def component_files(part: Path, variant: str | None) -> Iterator[Path]:
    """What a component is loaded from, by name; indices of shards say nothing that the shards do not."""
    files = sorted(path for path in part.glob("*") if path.is_file())
    weights = {file: match["variant"] for file in files if (match := WEIGHTS.fullmatch(file.name))}
    taken = variant if variant in weights.values() else None
    for file in files:
        is_config = file.suffix in CONFIGS and ".safetensors.index." not in file.name and ".bin.index." not in file.name
        if is_config or (file in weights and weights[file] == taken):
            yield file


def file_digest(file: Path) -> str:
    """SHA-256 of a file's content; of a config without `IGNORED_KEYS`."""
    stored = file.resolve()
    if stored.parent.name == "blobs" and SHA256.fullmatch(stored.name):
        return stored.name
    if file.suffix == ".json":
        return hashlib.sha256(plain_json(file.read_bytes())).hexdigest()
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def plain_json(content: bytes) -> bytes:
    """JSON without `IGNORED_KEYS`, with sorted keys; anything but a JSON object is unchanged."""
    try:
        values = json.loads(content)
    except ValueError:
        return content
    if not isinstance(values, dict):
        return content
    return json.dumps({key: value for key, value in values.items() if key not in IGNORED_KEYS}, sort_keys=True).encode()


def weights_digest(tensors: Mapping[str, "Tensor"]) -> str:
    """SHA-256, in hexadecimal, of names, shapes, dtypes and values: the same on every device and from every file."""
    import torch

    whole = hashlib.sha256()
    for name in sorted(tensors):
        if name.endswith("num_batches_tracked"):  # has no effect in evaluation mode, and some files lack it
            continue
        tensor = tensors[name].detach().cpu().contiguous()
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        whole.update(tensor.flatten().view(torch.uint8).numpy().data)
    return whole.hexdigest()


def codes_digest(autoencoder: Any) -> str:
    """SHA-256 of what the codes of an autoencoder with codes depend on and mean, but for the decoder; "" if unknown.

    Of float32 and bfloat16 weights it is the same: they are rounded to the latter. Others could be rounded otherwise.
    """
    import torch

    state = autoencoder.state_dict()
    own = {name: one for name, one in state.items() if name.startswith(("encoder.", "quant_conv.", "quantize."))}
    if any(one.is_meta or one.dtype not in (torch.float32, torch.bfloat16) for one in own.values()):
        return ""
    kind = (int(autoencoder.codes), list(autoencoder.config.get("levels") or ()))
    rounded = weights_digest({name: one.to(torch.bfloat16) for name, one in own.items()})
    return hashlib.sha256(f"{kind} {rounded}".encode()).hexdigest()


def digest_in_background(folder: Path, variant: str | None = None) -> "Future[str]":
    """`model_digest` in a background thread, which does not keep the program from ending."""
    future: Future[str] = Future()

    def work() -> None:
        try:
            future.set_result(model_digest(folder, variant))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future
