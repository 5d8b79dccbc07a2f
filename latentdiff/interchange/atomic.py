"""Files and folders that are written whole or not at all."""

import errno
import json
import os
import re
import secrets
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
"""What the system says when a disk is full, a file larger than allowed, or the disk broken."""


@contextmanager
def failures_named(target: Path) -> Iterator[None]:
    """Let a failure of writing within the context be an OSError that names `target`; the system does not name the
    file of a full disk, or names the partial one, and safetensors has errors of a type of its own. A null byte in its
    name is a ValueError.
    """
    if "\0" in str(target):
        raise ValueError(f"{str(target)!r} has a null byte, which no name of a file or folder may have")
    try:
        yield
    except Exception as error:
        said = re.search(r"\(os error (\d+)\)", str(error))  # safetensors'
        number = error.errno if isinstance(error, OSError) else said and int(said[1])
        partial = Path(str(getattr(error, "filename", ""))).name.startswith((".partial-", ".saving-"))
        if number in FULL or (number and partial):
            raise OSError(number, os.strerror(number), str(target)) from error
        raise


@contextmanager
def atomic_file(file: Path, sync: bool = False) -> Iterator[Path]:
    """A new, empty file beside `file`, with the same suffix, to be written within the context.

    When the context ends without an error it takes the place of `file`; after an error it is removed, and `file` is as
    it was. Missing folders are made. A full disk is an OSError that names `file`. ::

        with atomic_file(folder / "table.json") as partial:
            partial.write_text("{}")

    Args:
        sync: wait until the content is on disk, so that it survives a crash of the machine too.
    """
    partial = file.with_name(f".partial-{secrets.token_hex(8)}{file.suffix}")
    with failures_named(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with failures_named(file):
            partial.touch(exist_ok=False)
            mode = partial.stat().st_mode
            yield partial
            partial.chmod(mode)  # safetensors lets nobody but the owner read its files
            if sync:
                with partial.open("rb+") as stream:
                    os.fsync(stream.fileno())
            os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def allow_as_usual(folder: Path, files: Iterable[Path] | None = None) -> None:
    """Let others do with the files in a new folder what the system lets them do with any new file.

    safetensors lets nobody but the owner read what it writes.

    Args:
        files: those that are new, where the folder is not.
    """
    probe = folder / f".partial-{secrets.token_hex(8)}"
    probe.touch(exist_ok=False)
    mode = probe.stat().st_mode
    probe.unlink()
    for file in folder.rglob("*") if files is None else files:
        if file.is_file() and not file.is_symlink():
            file.chmod(mode)


def write_text_whole(file: Path, text: str, sync: bool = False) -> None:
    """Write a text file in UTF-8, by `atomic_file`."""
    with atomic_file(file, sync) as partial:
        partial.write_text(text, encoding="utf-8")


def json_text(value: Any) -> str:
    """JSON as this package writes it into configs: indented, keys in order, and a final line break."""
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """The path of a new folder near `folder`, to be made and filled within the context.

    When the context ends without an error it becomes `folder`, which must be empty or not exist; after an error it is
    removed. Missing parents are made.
    """
    with failures_named(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with failures_named(folder), tempfile.TemporaryDirectory(dir=folder.parent, prefix=".saving-") as temporary:
        new = Path(temporary) / "new"
        yield new
        allow_as_usual(Path(temporary))
        os.replace(new, folder)
