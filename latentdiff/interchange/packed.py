"""A pipeline's folder in one safetensors file: a layout of our own, for models that Stable Diffusion's cannot hold.

The weights of ``unet/diffusion_pytorch_model.safetensors`` are named ``unet.NAME``. The file's metadata hold, as JSON
under `KEY`, what else there is: ``version``; ``weights``, the name of each component's weight file; ``texts``, every
other file by its path; ``binaries``, those that are no text, in base64. Unpacked it is the same folder, byte for byte.
"""

import base64
import binascii
import json
import re
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from latentdiff.interchange.atomic import failures_named
from latentdiff.interchange.folders import check_safetensors
from latentdiff.interchange.user_files import parse_json_object

if TYPE_CHECKING:
    import torch

KEY = "latentdiff.folder"
TOKENIZER_KEY = "latentdiff.tokenizer"
SECOND_TOKENIZER_KEY = "latentdiff.tokenizer_2"
"""Of the tokenizer, likewise, in a file of Stable Diffusion's layout, which has no place for one."""

VERSION = 1
MAX_FILES = 1000
INDEX = "model_index.json"
PART = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}")
WEIGHTS_NAME = re.compile(r"[A-Za-z0-9_][\w.-]{0,99}\.safetensors", re.ASCII)
FILE_NAME = re.compile(r"[A-Za-z0-9_][\w.-]{0,99}\.(?:json|txt|model|jinja)", re.ASCII)
"""Of configs, and of tokenizers' words and merges; nothing that a library would run or unpickle."""


def packed_content(file: Path) -> dict[str, Any] | None:
    """What the metadata of a file in this layout say, see above; None for other files. No weights are read.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged, of a later version, or names what cannot be in a pipeline's folder.
    """
    if file.suffix != ".safetensors":
        return None
    check_safetensors(file)
    with safe_open(file, "np") as stream:
        text = (stream.metadata() or {}).get(KEY)
        names = list(stream.keys())
    if text is None:
        return None
    found = read_content(file, text, KEY)
    if INDEX not in found["texts"]:
        raise ValueError(f"{file} is damaged: it has no {INDEX}")
    for name in names:
        part, dot, _ = name.partition(".")
        if not dot or part not in found["weights"]:
            raise ValueError(f"{file} is damaged: its {name[:100]!r} is of no component")
    return found


def header_names(file: Path) -> list[str]:
    """The names of the tensors in a safetensors file. Raises ValueError if it is damaged."""
    check_safetensors(file)
    with safe_open(file, "np") as stream:
        return list(stream.keys())


def read_content(file: Path, text: str, key: str) -> dict[str, dict[str, str]]:
    """``weights``, ``texts`` and ``binaries`` in a file's metadata. Raises ValueError if they are damaged."""
    content = parse_json_object(text, f"{file} is damaged: its {key}")
    if content.get("version") != VERSION:
        raise ValueError(
            f"{file}: its layout has the version {str(content.get('version'))[:20]}, and this latentdiff reads version "
            f"{VERSION}; a newer one may read it"
        )
    found = {group: content.get(group, {}) for group in ("weights", "texts", "binaries")}
    for group, entries in found.items():
        if not isinstance(entries, dict) or not all(isinstance(value, str) for value in entries.values()):
            raise ValueError(f"{file} is damaged: its {group} should have a text for each name")
    check_names(file, found)
    return found


def check_names(file: Path, content: dict[str, dict[str, str]]) -> None:
    """Raises ValueError for names of files that lead out of a folder, are of no kind that is read, or are too many."""
    paths = [f"{part}/{name}" for part, name in content["weights"].items()]
    for path in paths:
        part, name = path.split("/", 1)
        if not (PART.fullmatch(part) and WEIGHTS_NAME.fullmatch(name)):
            raise ValueError(f"{file} is damaged: {path[:200]!r} is no name for a component's weights")
    others = [*content["texts"], *content["binaries"]]
    for path in others:
        *parts, name = path.split("/")
        if len(parts) > 1 or not all(map(PART.fullmatch, parts)) or not FILE_NAME.fullmatch(name):
            raise ValueError(f"{file} is damaged: {path[:200]!r} is no name for a file of a pipeline's folder")
    if len({path.lower() for path in paths + others}) < len(paths + others) or len(others) > MAX_FILES:
        raise ValueError(f"{file} is damaged: it has files of one name, or too many of them")


def packed_index(file: Path) -> dict[str, Any] | None:
    """The ``model_index.json`` in a file of this layout; None for other files. See `packed_content`."""
    content = packed_content(file)
    return None if content is None else parse_json_object(content["texts"][INDEX], f"{file}: its {INDEX}")


def pack(folder: Path, file: Path, dtype: "torch.dtype | None" = None) -> None:
    """Write a folder of ``save_pretrained``, with one weight file for each component, as `file`; whole or not at all.

    Args:
        dtype: of the weights in it; by default as they are.

    Raises:
        ValueError: there is a file of another kind in the folder.
    """
    from safetensors.torch import load_file

    from latentdiff.interchange.adapter_files import save_whole

    tensors = {}
    for path in sorted(folder.glob("*/*.safetensors")):
        for name, tensor in load_file(path).items():
            cast = tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)
            tensors[f"{path.parent.name}.{name}"] = cast
    # safetensors writes several metadata in any order; of one the same model is the same file
    save_whole(tensors, file, {KEY: content_text(folder)})


def content_text(folder: Path) -> str:
    """What the metadata of a file say of a folder.

    Raises:
        ValueError: there is a file of another kind in it.
    """
    content: dict[str, dict[str, str]] = {"weights": {}, "texts": {}, "binaries": {}}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        place = path.relative_to(folder).as_posix()
        if path.suffix == ".safetensors":
            content["weights"][path.parent.name] = path.name
            continue
        try:
            with path.open(encoding="utf-8", newline="") as stream:
                content["texts"][place] = stream.read()
        except UnicodeDecodeError:
            content["binaries"][place] = base64.b64encode(path.read_bytes()).decode("ascii")
    check_names(folder, content)
    return json.dumps({"version": VERSION, **content}, sort_keys=True)


def tokenizer_text(tokenizer: Any) -> str:
    """The files of a tokenizer, for the metadata of a file; see `TOKENIZER_KEY`."""
    with tempfile.TemporaryDirectory(prefix="latentdiff-") as temporary:
        tokenizer.save_pretrained(Path(temporary) / "tokenizer")
        return content_text(Path(temporary))


@contextmanager
def unpacked_tokenizer(file: Path, text: str) -> Iterator[Path]:
    """A temporary folder with the tokenizer in a file's metadata; see `unpacked`."""
    with temporary_folder(file) as folder:
        write_files(file, read_content(file, text, TOKENIZER_KEY), folder, ["tokenizer"])
        yield folder / "tokenizer"


def write_files(
    file: Path, content: dict[str, dict[str, str]], folder: Path, parts: Collection[str] | None = None
) -> None:
    """Write what a file's metadata hold into a folder, of all or of these components."""
    for path, text in {**content["texts"], **content["binaries"]}.items():
        if is_of(path, parts):
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content_of(text, path in content["texts"], f"{file} is damaged: its {path}"))


def is_of(path: str, parts: Collection[str] | None) -> bool:
    return parts is None or "/" not in path or path.split("/")[0] in parts


def unpack(file: Path, folder: Path, parts: Collection[str] | None = None) -> None:
    """Write what a file of this layout holds into an empty folder.

    Args:
        parts: components; by default all. ``model_index.json`` comes in any case.

    Raises:
        ValueError: the file is damaged, or of another layout.
    """
    from safetensors.torch import save_file

    content = packed_content(file)
    if content is None:
        raise ValueError(f"{file} does not hold a pipeline's folder")

    write_files(file, content, folder, parts)
    with safe_open(file, "pt") as stream:
        names = list(stream.keys())
        for part, name in content["weights"].items():
            if is_of(f"{part}/{name}", parts):
                (folder / part).mkdir(exist_ok=True)
                own = [key for key in names if key.startswith(f"{part}.")]
                tensors = {key.removeprefix(f"{part}."): stream.get_tensor(key) for key in own}
                save_file(tensors, folder / part / name, {"format": "pt"})


def content_of(text: str, is_text: bool, what: str) -> bytes:
    try:
        return text.encode() if is_text else base64.b64decode(text, validate=True)
    except (UnicodeEncodeError, binascii.Error, ValueError):
        raise ValueError(f"{what} is not {'Unicode' if is_text else 'base64'}") from None


@contextmanager
def unpacked(file: Path, parts: Collection[str] | None = None) -> Iterator[Path]:
    """A temporary folder with what a file of this layout holds, for the time of the context; see `unpack`.

    Errors of the context that name something in the folder name the file instead.
    """
    with temporary_folder(file) as folder:
        unpack(file, folder, parts)
        yield folder


@contextmanager
def temporary_folder(file: Path) -> Iterator[Path]:
    """A temporary folder for the time of the context, whose errors name `file` instead of something in the folder."""
    with tempfile.TemporaryDirectory(prefix="latentdiff-", ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary) / "model"
        folder.mkdir()
        try:
            with failures_named(folder):
                yield folder
        except Exception as error:
            if str(folder) not in str(error):
                raise
            kinds = (FileNotFoundError, OSError, TypeError)
            kind = next((kind for kind in kinds if isinstance(error, kind)), ValueError)
            raise kind(str(error).replace(str(folder), str(file))) from error
