"""Pictures in a folder: listed by a metadata file, or each with its caption in a text file beside it."""

import os
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from latentdiff.training.data.captions import LONGEST, check_weight, decode_text, shorten
from latentdiff.training.data.pictures import CaptionedPicture, FileReader
from latentdiff.training.data.rows import Row, read_rows
from latentdiff.training.data.source import CAPTION_SUFFIXES, PICTURE_SUFFIXES, NoPicturesError, Source, Wanted

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
TRAIN = "train"  # the split of whatever names none
SPLITS = {TRAIN, "validation", "valid", "val", "dev", "test"}


def metadata_of(folder: Path) -> Path | None:
    """The metadata file of `folder`."""
    return next((folder / name for name in METADATA if (folder / name).is_file()), None)


def split_folder(folder: Path, split: str) -> Path:
    """The folder within `folder` that is named like the split, where there is one and the folder has no table.

    Raises:
        NoPicturesError: `folder` knows no splits, and another than "train" is asked for.
    """
    if metadata_of(folder) is not None:
        return folder
    if split in _splits(folder):
        return folder / split
    if split != TRAIN:
        raise NoPicturesError(f"{folder}: no pictures of split {split!r}; it has neither a table nor such a folder")
    return folder


def _splits(folder: Path) -> set[str]:
    """The folders of `folder` that are splits by their names; none where others stand beside them."""
    entries = [path for path in folder.iterdir() if not path.name.startswith(".")]
    folders = {path.name for path in entries if path.is_dir()}
    if not folders <= SPLITS:
        return set()
    if any(path.suffix.lower() in PICTURE_SUFFIXES for path in entries if path.name not in folders):
        folders -= {TRAIN}  # what lies beside is the training data
    return folders


def inside(root: Path, file_name: str) -> Path:
    """The regular file `file_name` below `root`, which is resolved.

    Raises:
        ValueError: it leaves `root`, is no file, or cannot be a path.
    """
    shown = shorten(repr(file_name), 200)
    path = Path(os.path.normpath(root / file_name))
    try:
        real = path.resolve(strict=True)
        if not real.is_relative_to(root):
            raise ValueError(f"{shown} leaves the folder {root}")
        mode = real.stat().st_mode
    except RuntimeError:
        raise ValueError(f"{shown}: links that lead in a circle") from None
    except (OSError, UnicodeError) as error:
        if not path.is_relative_to(root):
            raise ValueError(f"{shown} leaves the folder {root}") from None
        reason = getattr(error, "strerror", None) or "not a path"
        raise ValueError(f"no such file: {shorten(str(path), 200)} ({reason})") from None
    if not stat.S_ISREG(mode):
        raise ValueError(f"{shown} is {'a folder' if stat.S_ISDIR(mode) else 'a pipe or device'}, not a file")
    return path


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

    def add(self, row: Row) -> None:
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


def read_beside(folder: Path, wanted: Wanted, whole: Path | None = None) -> Source:
    """The pictures below `folder`, each with its caption in a ``.txt`` or ``.caption`` file beside it.

    Without one, its class is the name of the folder that it is in, as in the `datasets` library's ImageFolder.

    Args:
        whole: the folder that `folder` is one split of.
    """
    root = folder.resolve()
    source = Source(f"{(whole or folder).resolve()}{os.sep}")
    held_out = {"validation"} if wanted.split == TRAIN and whole in (None, folder) else set()
    for entry in _walk(root, source, held_out):
        if source.is_full(wanted):
            break
        try:
            path = inside(root, str(entry.relative_to(root)))
            caption = _caption_beside(root, path, wanted)
            source.pictures.append(CaptionedPicture(str(path), FileReader(str(path)), caption))
        except ValueError as error:
            source.refuse(str(entry), error)
    return source


def _walk(folder: Path, source: Source, leave_out: set[str]) -> Iterator[Path]:
    """Files with a picture's suffix, in order of their names; hidden ones are left out, links to folders named."""
    for entry in sorted(os.scandir(folder), key=lambda e: e.name):
        path = Path(entry.path)
        if entry.name.startswith(".") or entry.name in leave_out:
            continue
        is_picture = path.suffix.lower() in PICTURE_SUFFIXES
        if _is_folder(entry):
            if is_picture:
                source.refuse(entry.path, "is a folder, not a picture")
            elif entry.is_symlink():
                source.warn(entry.path, "is a link to a folder, and is not followed")
            if not entry.is_symlink():
                yield from _walk(path, source, set())
        elif is_picture:
            yield path


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # links that lead in a circle
        return False


def _caption_beside(root: Path, picture: Path, wanted: Wanted) -> tuple[str, ...]:
    if wanted.condition == "none":
        return wanted.captions(None)
    for suffix in CAPTION_SUFFIXES:
        file = picture.with_suffix(suffix)
        if os.path.lexists(file):
            return _read_caption(root, file, wanted)
    if wanted.condition == "class" and picture.parent != root:
        return wanted.captions(picture.parent.name)
    if wanted.caption is None:
        file = picture.with_suffix(".txt")
        lacks = "no class; lay it into a folder named like it," if wanted.condition == "class" else "no caption;"
        raise ValueError(f"{lacks} write one into {shorten(file.name)} beside it, or a metadata.jsonl for the folder")
    return wanted.captions(None)


def _read_caption(root: Path, file: Path, wanted: Wanted) -> tuple[str, ...]:
    name = shorten(file.name)
    path = inside(root, str(file.relative_to(root)))
    try:
        if path.stat().st_size > 4 * LONGEST + 4:  # a character takes at most four bytes
            raise ValueError(f"a caption of {path.stat().st_size:,} bytes; at most {LONGEST:,} characters are taken")
        return wanted.captions(decode_text(path.read_bytes()).strip(), name)
    except OSError as error:
        raise ValueError(f"{name}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
