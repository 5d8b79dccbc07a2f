"""The table of a folder of drawn pictures, as `datasets`' imagefolder and training read it: ``metadata.jsonl``."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from latentdiff.interchange.atomic import write_text_whole

METADATA = "metadata.jsonl"
OTHERS = ("metadata.csv", "metadata.parquet")  # what is read in its place
MARK = "model_digest"
"""A column that others' tables do not have."""


def read_table(folder: Path) -> list[dict[str, Any]]:
    """The rows of a table that this program wrote; none if there is no table.

    Raises:
        FileExistsError: there is one that it did not write.
    """
    file = folder / METADATA
    if not os.path.lexists(file):
        return []
    rows: list[Any]
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError, RecursionError):
        rows = [None]
    if not all(isinstance(row, dict) and {MARK, "file_name"} <= row.keys() for row in rows):
        raise FileExistsError(f"{file} exists and was not written by latentdiff; move it, or choose another folder")
    return rows


def check_table(folder: Path) -> None:
    """Raises FileExistsError if another program's table is where ours is to be written, or would be read instead."""
    for name in OTHERS:
        if os.path.lexists(folder / name):
            raise FileExistsError(f"{folder / name}: this folder has a table of its own; choose another folder")
    read_table(folder)


def write_table(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the table, whole or not at all; rows of pictures that are there from earlier stay. Without rows, none."""
    new = {row["file_name"] for row in rows}
    old = [row for row in read_table(folder) if row["file_name"] not in new and is_there(folder, row["file_name"])]
    if not old and not rows:
        (folder / METADATA).unlink(missing_ok=True)
        return
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in [*old, *rows])
    write_text_whole(folder / METADATA, "".join(lines))


def is_there(folder: Path, name: Any) -> bool:
    return isinstance(name, str) and (folder / name).is_file()
