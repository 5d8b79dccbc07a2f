"""Rows of ``metadata.jsonl``, ``metadata.csv`` and ``metadata.parquet``. One bad row is one bad row."""

import codecs
import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentdiff.training.data.captions import decode_text


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
