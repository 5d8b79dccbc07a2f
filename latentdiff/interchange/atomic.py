"""Files that are written whole or not at all."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_file(file: Path, sync: bool = False) -> Iterator[Path]:
    """A new, empty file beside `file`, with the same suffix, to be written within the context.

    When the context ends without an error it takes the place of `file`; after an error it is removed, and `file` is as
    it was. Missing folders are made. ::

        with atomic_file(folder / "table.json") as partial:
            partial.write_text("{}")

    Args:
        sync: wait until the content is on disk, so that it survives a crash of the machine too.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".partial-{secrets.token_hex(8)}{file.suffix}")
    try:
        partial.touch(exist_ok=False)
        yield partial
        if sync:
            with partial.open("rb+") as stream:
                os.fsync(stream.fileno())
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def write_text_whole(file: Path, text: str, sync: bool = False) -> None:
    """Write a text file in UTF-8, by `atomic_file`."""
    with atomic_file(file, sync) as partial:
        partial.write_text(text, encoding="utf-8")
