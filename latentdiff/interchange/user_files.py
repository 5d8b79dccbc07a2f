"""Reading files that other people made: regular files only, and of limited size. The limits are all here."""

import json
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

MAX_TEXT = 64 * 2**20
"""Bytes of a file of JSON, a table or prompts."""

MAX_TABLE = 2**30
"""Bytes of a table that is read whole, such as CSV."""

MAX_HEADER = 100_000_000
"""Bytes of the header of a safetensors file, as the library has it."""

MAX_PICTURE = 2**30
"""Bytes of a file of a picture. Pillow's limit of pixels comes later."""

MAX_YAML = 2**18
"""Bytes of a YAML file, and the number of values in it when every alias is written out."""

MAX_PICKLE = 32 * 2**20
"""Bytes of the ``data.pkl`` in a ``.ckpt`` when it is inflated; the tensors are not part of it."""

MAX_TRAIN_TIMESTEPS = 100_000
"""Of a diffusion process; tables of that length are computed. Known models have at most 4,000."""


def check_regular(file: Path) -> None:
    """Refuse what is no regular file; links are followed. Reading a pipe or a device could wait or go on for ever.

    Raises:
        FileNotFoundError: there is nothing, or a folder.
        ValueError: it is a pipe, a device or a socket.
    """
    try:
        mode = file.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{file}: no such file") from None
    except ValueError:  # a null byte
        raise FileNotFoundError(f"{str(file)!r}: no such file") from None
    if stat.S_ISDIR(mode):
        raise FileNotFoundError(f"{file} is a folder, not a file")
    if not stat.S_ISREG(mode):
        raise ValueError(f"{file} is a pipe or a device, not a regular file; only regular files are read")


def check_regular_files(folder: Path) -> None:
    """`check_regular` for everything in a folder that another library is going to read; dangling links are left out."""
    for path in sorted(folder.glob("*")):
        if path.exists() and not path.is_dir():
            check_regular(path)


def read_bytes(file: Path, limit: int = MAX_TEXT) -> bytes:
    """The content of a regular file of at most `limit` bytes.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no regular file, or larger.
    """
    check_regular(file)
    with file.open("rb") as stream:
        content = stream.read(limit + 1) if file.stat().st_size <= limit else None  # some of /proc have no size
    if content is None or len(content) > limit:
        raise ValueError(f"{file} is larger than {limit / 2**20:g} MiB, the limit for a file of this kind")
    return content


def read_text(file: Path, limit: int = MAX_TEXT) -> str:
    """A text file in UTF-8, with or without a byte order mark; line ends become ``\\n``. See `read_bytes`."""
    try:
        text = read_bytes(file, limit).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


@contextmanager
def faults_named(source: object, foreign: bool = False) -> Iterator[None]:
    """Let a ValueError within the context, about something in `source`, begin with it, unless its message names it.

    Args:
        foreign: another library reads the source; its errors, of whatever type, become ValueErrors, or stay OSErrors.
    """
    try:
        yield
    except Exception as error:
        what = " ".join(str(error).split()) or type(error).__name__
        is_named = str(source) in what or getattr(error, "filename", None) is not None
        if is_named or not (foreign or isinstance(error, ValueError)):
            raise
        kinds = (FileNotFoundError, OSError)
        kind = next((kind for kind in kinds if isinstance(error, kind)), ValueError)
        raise kind(f"{source}: {what[:1000]}") from error


def check_timesteps(config: Mapping[str, Any], where: object) -> None:
    """Raises ValueError, beginning with `where`, for a config of a diffusion process of too many steps, or of none."""
    steps = config.get("num_train_timesteps")
    if steps is None:  # a UNet2DModel's config has the key, and seldom a number
        return
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= MAX_TRAIN_TIMESTEPS:
        raise ValueError(
            f"{where}: num_train_timesteps={steps!r} should be a whole number from 1 to {MAX_TRAIN_TIMESTEPS:,}"
        )


def is_stored_whole(tensor: "Tensor") -> bool:
    """Whether a tensor that was unpickled has its values in the file: neither sparse nor a few repeated by strides."""
    if tensor.is_meta:
        return True
    strided = str(tensor.layout) == "torch.strided"
    return strided and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def parse_json(text: str | bytes, where: object) -> Any:
    """A JSON value. Raises ValueError, beginning with `where`, if `text` is not JSON."""
    try:
        return json.loads(text)
    except UnicodeDecodeError:
        raise ValueError(f"{where}: not JSON (it is not encoded in UTF-8)") from None
    except RecursionError:
        raise ValueError(f"{where}: not JSON that can be read (it is nested too deeply)") from None
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error})") from None


def parse_json_object(text: str | bytes, where: object) -> dict[str, Any]:
    """A JSON object; see `parse_json`."""
    value = parse_json(text, where)
    if not isinstance(value, dict):
        raise ValueError(f"{where}: a JSON object is expected, not a {type(value).__name__}")
    return value


def read_yaml(file: Path) -> Any:
    """The value of a YAML file, of plain types.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no regular file, too large, or not YAML; the message names the line.
    """
    return parse_yaml(read_text(file, MAX_YAML), file)


def parse_yaml(text: str, where: object) -> Any:
    """The value of a YAML document, of plain types. Raises ValueError, beginning with `where`; see `read_yaml`."""
    import yaml

    loader = None
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if root is None:
            return None
        if written_out(root, {}) > MAX_YAML:
            raise ValueError("its anchors and aliases stand for too many values; write out what is needed")
        return loader.construct_document(root)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"{where}{line}: not YAML ({error.problem or error.context})") from None
    except RecursionError:
        raise ValueError(f"{where}: YAML that is nested too deeply") from None
    except Exception as error:  # impossible dates, unknown tags and the like raise many things
        raise ValueError(f"{where}: not YAML ({' '.join(str(error).split())[:200]})") from None
    finally:
        if loader is not None:
            loader.dispose()


def written_out(node: Any, known: dict[int, float]) -> float:
    """The number of values below a YAML node with every alias written out; infinite if one contains itself."""
    if id(node) not in known:
        known[id(node)] = float("inf")  # what is found again below itself
        children = [] if isinstance(node.value, str) else node.value  # a scalar's
        pairs = [child if isinstance(child, tuple) else (child,) for child in children]
        known[id(node)] = 1 + sum(written_out(child, known) for pair in pairs for child in pair)
    return known[id(node)]
