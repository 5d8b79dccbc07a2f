"""Files of prompts: one prompt a line, or tables with settings of each."""

import csv
import difflib
import io
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import Field, ValidationError

from latentdiff.interchange.user_files import parse_json_object, read_text
from latentdiff.pipelines.batch.drawing_options import RowOptions, defaults_of, first_problem

DRIVE = re.compile(r"[A-Za-z]:")


class Prompt(RowOptions):
    """One picture to draw, with its own options; what is None is as for all."""

    prompt: str
    """Or a class, of models of classes; empty for models that draw without either."""
    seed: int | None = Field(None, ge=0, lt=2**63)
    file_name: str | None = None
    """Relative to the folder of the pictures; by default the number of the prompt, from 1."""


COLUMNS = ("prompt", "seed", *defaults_of(RowOptions), "file_name")


def read_prompts(file: Path) -> list[Prompt]:
    """The prompts in a file: ``.txt``, one a line, or ``.jsonl`` or ``.csv`` with the columns of `Prompt`.

    Empty lines are skipped; in text files so are lines that begin with ``#``. Empty cells are as if there were none.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another kind of file, no regular file or too large, no prompts in it, or something wrong with a
            line, which is named.
    """
    rows = {".txt": text_rows, ".jsonl": jsonl_rows, ".csv": csv_rows}
    if file.suffix.lower() not in rows:
        raise ValueError(f"{file}: prompts are read from {', '.join(rows)} files")
    prompts = [check_row(row, where) for where, row in rows[file.suffix.lower()](read_text(file), file)]
    if not prompts:
        raise ValueError(f"{file}: there are no prompts in it")
    return prompts


def text_rows(text: str, file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield f"{file}, line {number}", {"prompt": line.strip()}


def jsonl_rows(text: str, file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{file}, line {number}"
            yield where, {key: value for key, value in parse_json_object(line, where).items() if value is not None}


def csv_rows(text: str, file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    table = csv.DictReader(io.StringIO(text), strict=True)
    try:
        for row in table:
            where = f"{file}, line {table.line_num}"
            if None in row or None in row.values():
                raise ValueError(f"{where}: it has {'more' if None in row else 'fewer'} cells than the first line")
            yield where, {key.strip(): value for key, value in row.items() if value.strip()}
    except csv.Error as error:
        raise ValueError(f"{file}, line {table.reader.line_num}: {error}") from None


def check_row(row: Mapping[str, Any], where: str) -> Prompt:
    """Raises ValueError for an unknown column, the nearest known one named, or a value that cannot be used.

    The column "class" is another name for "prompt".
    """
    if "class" in row and "prompt" not in row:
        row = {"prompt" if key == "class" else key: value for key, value in row.items()}
    for key in row:
        if key not in COLUMNS:
            near = difflib.get_close_matches(str(key), COLUMNS, n=1)
            known = f"did you mean {near[0]!r}?" if near else f"the columns are {', '.join(COLUMNS)}"
            raise ValueError(f"{where}: unknown column {key!r}; {known}")
    if not str(row.get("prompt", "")).strip():
        raise ValueError(f"{where}: there is no prompt")
    try:
        return Prompt.model_validate(row)
    except ValidationError as error:
        raise ValueError(f"{where}: {first_problem(error)}") from None


def several_of_each(prompts: Iterable[Prompt], count: int) -> list[Prompt]:
    """`count` pictures of each prompt in turn; where it has a seed, that and the next ones.

    Raises:
        ValueError: a prompt has a file_name, which several pictures cannot share.
    """
    prompts = list(prompts)
    named = next((one.file_name for one in prompts if one.file_name is not None), None)
    if count > 1 and named is not None:
        raise ValueError(f"--count {count}: several pictures cannot share the file_name {named!r}; leave one out")
    return [
        one if one.seed is None else one.model_copy(update={"seed": one.seed + number})
        for one in prompts
        for number in range(count)
    ]


def name_files(prompts: Iterable[Prompt]) -> list[str]:
    """The file name of each prompt's picture, with ``/`` between folders.

    Raises:
        ValueError: one is no name of a PNG within the folder, or two pictures would have the same.
    """
    names: list[str] = []
    taken: dict[str, int] = {}
    for number, prompt in enumerate(prompts, 1):
        name = f"{number:06d}.png" if prompt.file_name is None else check_name(prompt.file_name)
        same = taken.setdefault(same_file(name), number)
        if same != number:
            raise ValueError(f"prompts {same} and {number} have the same file_name, {name!r}")
        names.append(name)
    return names


def same_file(name: str) -> str:
    """Equal for names that some file systems take for the same: A and a, an accent composed and decomposed."""
    return unicodedata.normalize("NFC", name.casefold())


def check_name(name: str) -> str:
    """Raises ValueError if `name` is no relative path of a PNG file that stays in its folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or DRIVE.match(name):
        raise ValueError(f"file_name {name!r} leaves the folder of the pictures; give a relative path, such as a/1.png")
    if path.suffix.lower() != ".png" or path.name.startswith("."):
        raise ValueError(f"file_name {name!r} must end in .png, and not begin with a dot")
    return str(path)
