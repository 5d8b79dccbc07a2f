"""Pictures listed by ``metadata.jsonl``, ``metadata.csv`` or ``metadata.parquet``. One bad row is one bad row."""

import codecs
import csv
import io
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from latentdiff.interchange.user_files import MAX_TABLE, MAX_TEXT, faults_named, read_bytes
from latentdiff.training.data.caption_checks import check_weight, decode_text, shorten
from latentdiff.training.data.captioned_picture import CaptionedPicture, FileReader
from latentdiff.training.data.decode import why_unreadable
from latentdiff.training.data.masks import MASK_SUFFIX
from latentdiff.training.data.source import Names, Source, Wanted, inside

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


def metadata_of(folder: Path) -> Path | None:
    """The metadata file of `folder`; what is called so and is no regular file is none."""
    return next((folder / name for name in METADATA if (folder / name).is_file()), None)


class Listing:
    """Turns rows of the tables below a folder into pictures of a source, and remembers what the rows had.

    Args:
        root: the whole folder, resolved, which paths must not leave.
        split_of: the split of what lies at a path, where its row does not say so.
    """

    def __init__(self, source: Source, root: Path, wanted: Wanted, split_of: Callable[[Path], str]) -> None:
        self.source, self.wanted, self.split_of = source, wanted, split_of
        self.allowed = wanted.allowed(root)
        self.places: dict[str, int] = {}  # name of a picture: its place in the source
        self.names: Names = {}

    def read_any(self, folder: Path) -> Path | None:
        """Add the pictures that the metadata file of `folder` lists, if it has one, and return that."""
        for path in (folder / name for name in METADATA):
            if os.path.lexists(path) and not path.is_file():
                what = "a folder" if path.is_dir() else "a pipe or device" if path.exists() else "a link to nothing"
                self.source.warn(str(path), f"is not read: it is {what}, not a file")
        table = metadata_of(folder)
        if table is not None:
            self.read(table)
        return table

    def read(self, file: Path) -> None:
        """Add the pictures that a metadata file lists.

        Raises:
            ValueError: the file cannot be read as a whole, or no row has a file name, or a caption where one is needed.
        """
        self.source.tables.append(file)
        before = len(self.source.pictures)
        columns: dict[str, None] = {}
        masks = [self.wanted.mask_column] if self.wanted.masks and self.wanted.mask_column else []
        for row in read_rows(file, ["file_name", self.wanted.caption_column, "weight", "split", *masks]):
            if self.source.is_full(self.wanted):
                break
            if isinstance(row.values, dict):
                columns.update(dict.fromkeys(map(str, row.values)))
            self.add(file, row)
        needed = ["file_name"] if self.wanted.may_lack_captions else ["file_name", self.wanted.caption_column]
        needed = masks if len(self.source.pictures) > before else needed
        for column in needed if columns else ():
            if column not in columns:
                raise ValueError(f"{file}: no column {column!r}; it has {shorten(', '.join(columns), 200)}")
        for name in METADATA:
            if name != file.name and (file.parent / name).is_file():
                self.source.warn(str(file.parent / name), f"is not used; {file.name} is")

    def add(self, file: Path, row: "Row") -> None:
        where = f"{file}, {row.place}"
        if isinstance(row.values, str):  # it does not say its split
            if self.wanted.has_split(self.split_of(file)):
                self.source.refuse(where, row.values)
            return
        file_name = row.values.get("file_name")
        named = str(file_name) if isinstance(file_name, str) and file_name else None
        split = str(row.values.get("split") or self.split_of(file if named is None else file.parent / named))
        if not self.wanted.has_split(split):
            self.source.know_split(split)
        elif named is not None:
            try:
                self._keep(file, self._picture(file, named, row.values))
            except ValueError as error:
                self.source.refuse(f"{where} ({shorten(named, 200)})", error)
        else:
            wrong = "no file_name" if file_name is None else f"expected a file_name, not {shorten(repr(file_name))}"
            self.source.refuse(where, wrong)

    def _picture(self, file: Path, file_name: str, values: dict[str, Any]) -> CaptionedPicture:
        if "\0" in file_name:
            raise ValueError("file_name with a NUL character in it")
        path = str(inside(file.parent, file_name, self.allowed, self.names))
        captions = self.wanted.captions(values.get(self.wanted.caption_column))
        weight = check_weight(values.get("weight"))
        if why := why_unreadable(path):
            raise ValueError(why)
        mask = self._mask(file, path, values) if self.wanted.masks else None
        return CaptionedPicture(path, FileReader(path), captions, weight, mask=mask)

    def _mask(self, file: Path, picture: str, values: dict[str, Any]) -> FileReader | None:
        """What reads the mask that the row names, or that lies beside the picture."""
        if self.wanted.mask_column is None:
            beside = os.path.splitext(picture)[0] + MASK_SUFFIX
            named = beside if os.path.lexists(beside) else None
        else:
            named = values.get(self.wanted.mask_column)
            if named is not None and (not isinstance(named, str) or "\0" in named):
                raise ValueError(f"{self.wanted.mask_column}: expected a file's name, not {shorten(repr(named))}")
        return FileReader(str(inside(file.parent, named, self.allowed, self.names))) if named else None

    def _keep(self, file: Path, picture: CaptionedPicture) -> None:
        pictures = self.source.pictures
        place = self.places.setdefault(picture.name, len(pictures))
        if place == len(pictures):
            pictures.append(picture)
        else:
            captions = tuple(dict.fromkeys(pictures[place].captions + picture.captions))
            pictures[place] = replace(pictures[place], captions=captions)
            self.source.warn(picture.name, f"is listed more than once in {file.name}; its captions go together")


@dataclass(frozen=True, slots=True)
class Row:
    """place: such as "line 7", from 1. values: by column, or what is wrong with the row."""

    place: str
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
        lines: Iterable[bytes] = iter(lambda: binary.readline(MAX_TEXT + 1), b"")
        start = binary.peek(1024).removeprefix(codecs.BOM_UTF8).lstrip()
        wide = start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        if wide or start.startswith(b"["):
            text = _whole_text(file)
            try:
                array = json.loads(text)
            except (ValueError, RecursionError):
                array = None
            if isinstance(array, list):  # one array of all objects, not one object a line
                yield from (Row(f"entry {i}", checked_object(value)) for i, value in enumerate(array, start=1))
                return
            lines = text.encode("utf-8", "surrogateescape").split(b"\n")
        for number, line in enumerate(lines, start=1):
            if len(line) > MAX_TEXT:
                raise ValueError(f"{file}, line {number}: it is longer than {MAX_TEXT >> 20} MiB")
            if line.strip():
                yield Row(f"line {number}", json_object(line))


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
    return checked_object(value)


def checked_object(value: Any) -> dict[str, Any] | str:
    """What JSON was read, or that it is no object."""
    if isinstance(value, dict):
        return value
    kinds: dict[type, str] = {str: "a text", list: "a list", bool: "true or false", type(None): "null"}
    return f"expected an object, {{...}}, not {kinds.get(type(value), 'a number')}"


def _whole_text(file: Path) -> str:
    with faults_named(file):
        return decode_text(read_bytes(file, MAX_TABLE), "surrogateescape")


def _csv(file: Path, columns: list[str]) -> Iterator[Row]:
    """Records of a CSV file. A quote that never closes spoils its own line, not the rest of the file."""
    lines = io.StringIO(_whole_text(file), newline="").readlines()
    if not lines:
        raise ValueError(f"{file}: the file is empty")
    first = {mark: [name.strip(' "\r\n') for name in lines[0].split(mark)] for mark in ",;\t"}
    mark = next((mark for mark, names in first.items() if "file_name" in names), ",")
    header, start = _record(lines, 0, mark)
    if isinstance(header, str):
        raise ValueError(f"{file}: the first line names no columns ({header})")
    header = [name.strip() for name in header]
    while start < len(lines):
        fields, after = _record(lines, start, mark)
        place = f"line {start + 1}"
        if isinstance(fields, str):
            yield Row(place, fields)
        elif len(fields) > len(header):
            quoted = {",": "commas", ";": "semicolons", "\t": "tabs"}[mark]
            yield Row(place, f"{len(fields)} fields, where the first line names {len(header)}; quote {quoted}")
        elif any(fields):
            yield Row(place, dict(zip(header, fields, strict=False)))
        start = after


def _record(lines: list[str], start: int, mark: str) -> tuple[list[str] | str, int]:
    """Fields of the record that begins at line `start` (or what is wrong with it), and where the next one begins."""
    following = (lines[i] for i in range(start, len(lines)))
    reader = csv.reader(following, strict=True, delimiter=mark)
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
            batches = map(_batch_rows, table.iter_batches(columns=have))
            for number, values in enumerate(itertools.chain.from_iterable(batches), start=1):
                yield Row(f"row {number}", values)
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
