"""Pictures listed by ``metadata.jsonl``, ``metadata.csv`` or ``metadata.parquet``. One bad row is one bad row."""

import codecs
import csv
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from latentdiff.training.data.captions import check_weight, decode_text, shorten
from latentdiff.training.data.pictures import CaptionedPicture, FileReader
from latentdiff.training.data.source import TRAIN, NoPicturesError, Source, Wanted, inside

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


def metadata_of(folder: Path) -> Path | None:
    """The metadata file of `folder`."""
    return next((folder / name for name in METADATA if (folder / name).is_file()), None)


def read_metadata(folder: Path, file: Path, wanted: Wanted, whole: Path | None = None) -> Source:
    """The pictures that a metadata file lists.

    Args:
        whole: the folder that `folder` is one split of.

    Raises:
        ValueError: the file cannot be read as a whole, or no row has a file name, or a caption where one is needed.
    """
    root = folder.resolve()
    source = Source(f"{(whole or folder).resolve()}{os.sep}")
    table = _Table(source, root, file, wanted)
    for row in read_rows(file, ["file_name", wanted.caption_column, "weight", "split"]):
        if source.is_full(wanted):
            break
        table.add(row)
    table.check_columns()
    for name in METADATA:
        if name != file.name and (folder / name).is_file():
            source.warn(str(folder / name), f"is not used; {file.name} is")
    return source


class _Table:
    """Turns rows into pictures of a source, and remembers what the rows had."""

    def __init__(self, source: Source, root: Path, file: Path, wanted: Wanted) -> None:
        self.source, self.root, self.file, self.wanted = source, root, file, wanted
        self.columns: dict[str, None] = {}
        self.rows: dict[str, int] = {}  # name of a picture: its place in the source
        self.splits: set[str] = set()

    def add(self, row: "Row") -> None:
        unit = "row" if self.file.suffix == ".parquet" else "line"
        where = f"{self.root / self.file.name}, {unit} {row.number}"
        if isinstance(row.values, str):
            return self._refuse_unknown(where, row.values)
        self.columns.update(dict.fromkeys(map(str, row.values)))
        split = row.values.get("split") or TRAIN
        if split != self.wanted.split:
            self.splits.add(str(split))
            return None
        file_name = row.values.get("file_name")
        if not isinstance(file_name, str) or not file_name:
            wrong = "no file_name" if file_name is None else f"expected a file_name, not {shorten(repr(file_name))}"
            return self.source.refuse(where, wrong)
        try:
            self._keep(self._picture(file_name, row.values))
        except ValueError as error:
            self.source.refuse(f"{where} ({shorten(file_name, 200)})", error)

    def _refuse_unknown(self, where: str, reason: str) -> None:
        """A row that does not say its split is of the first."""
        if self.wanted.split == TRAIN:
            self.source.refuse(where, reason)

    def _picture(self, file_name: str, values: dict[str, Any]) -> CaptionedPicture:
        if "\0" in file_name:
            raise ValueError("file_name with a NUL character in it")
        path = str(inside(self.root, file_name))
        captions = self.wanted.captions(values.get(self.wanted.caption_column))
        return CaptionedPicture(path, FileReader(path), captions, check_weight(values.get("weight")))

    def _keep(self, picture: CaptionedPicture) -> None:
        pictures = self.source.pictures
        place = self.rows.setdefault(picture.name, len(pictures))
        if place == len(pictures):
            pictures.append(picture)
        else:
            captions = tuple(dict.fromkeys(pictures[place].captions + picture.captions))
            pictures[place] = replace(pictures[place], captions=captions)
            self.source.warn(picture.name, f"is listed more than once in {self.file.name}; its captions go together")

    def check_columns(self) -> None:
        """Raises ValueError if a column that is needed is in no row."""
        if self.source.pictures or not self.columns:
            return
        needed = ["file_name"] if self.wanted.may_lack_captions else ["file_name", self.wanted.caption_column]
        for column in needed:
            if column not in self.columns:
                raise ValueError(f"{self.file}: no column {column!r}; it has {shorten(', '.join(self.columns), 200)}")
        if not self.source.refused:
            found = ", ".join(sorted(self.splits)) or "none"
            raise NoPicturesError(f"{self.file}: no rows of split {self.wanted.split!r}; its splits: {found}")


@dataclass(frozen=True, slots=True)
class Row:
    """number: line of the file, or row of a table, from 1. values: by column, or what is wrong with the row."""

    number: int
    values: dict[str, Any] | str


def read_rows(file: Path, columns: list[str]) -> Iterator[Row]:
    """The rows of a metadata file; `columns` are those of interest, of which a table may lack some.

    Raises:
        ValueError: the file cannot be read as a whole.
    """
    reader = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}[file.suffix]
    yield from reader(file, columns)


def _jsonl(file: Path, columns: list[str]) -> Iterator[Row]:
    with file.open("rb") as binary:
        lines = iter(binary)
        if binary.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            lines = iter(_whole_text(file).encode("utf-8").split(b"\n"))
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield Row(number, json_object(line))


def json_object(line: bytes) -> dict[str, Any] | str:
    """A JSON object, or what is wrong with it."""
    try:
        value = json.loads(decode_text(line, "surrogateescape"))
    except json.JSONDecodeError as error:
        return f"not JSON ({error.msg})"
    except ValueError as error:
        return "a number of too many digits" if "digits" in str(error) else str(error)
    except RecursionError:
        return "JSON that is nested too deeply"
    if isinstance(value, dict):
        return value
    kinds: dict[type, str] = {str: "a text", list: "a list", bool: "true or false", type(None): "null"}
    return f"expected an object, {{...}}, not {kinds.get(type(value), 'a number')}"


def _whole_text(file: Path) -> str:
    try:
        return decode_text(file.read_bytes(), "surrogateescape")
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _csv(file: Path, columns: list[str]) -> Iterator[Row]:
    """Records of a CSV file. A quote that never closes spoils its own line, not the rest of the file."""
    lines = io.StringIO(_whole_text(file), newline="").readlines()
    if not lines:
        raise ValueError(f"{file}: the file is empty")
    header, start = _record(lines, 0)
    if isinstance(header, str):
        raise ValueError(f"{file}: the first line names no columns ({header})")
    header = [name.strip() for name in header]
    while start < len(lines):
        fields, after = _record(lines, start)
        if isinstance(fields, str):
            yield Row(start + 1, fields)
        elif len(fields) > len(header):
            yield Row(start + 1, f"{len(fields)} fields, where the first line names {len(header)}; quote commas")
        elif any(fields):
            yield Row(start + 1, dict(zip(header, fields, strict=False)))
        start = after


def _record(lines: list[str], start: int) -> tuple[list[str] | str, int]:
    """Fields of the record that begins at line `start` (or what is wrong with it), and where the next one begins."""

    def following() -> Iterator[str]:
        for i in range(start, len(lines)):
            yield lines[i]

    reader = csv.reader(following(), strict=True)
    try:
        fields = next(reader, [])
    except csv.Error as error:
        return f"not CSV ({error})", start + 1
    return fields, start + max(reader.line_num, 1)


def _parquet(file: Path, columns: list[str]) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as table:
            have = [name for name in columns if name in table.schema_arrow.names]
            if "file_name" not in have:
                raise ValueError(f"{file}: no column 'file_name'; it has {', '.join(table.schema_arrow.names)}")
            number = 0
            for batch in table.iter_batches(columns=have):
                for values in _batch_rows(batch):
                    number += 1
                    yield Row(number, values)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file}: cannot be read as Parquet ({error})") from error


def _batch_rows(batch: Any) -> Iterator[dict[str, Any] | str]:
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:  # somewhere; find out where
        for i in range(batch.num_rows):
            try:
                yield batch.slice(i, 1).to_pylist()[0]
            except UnicodeDecodeError:
                yield "text that is not UTF-8"
