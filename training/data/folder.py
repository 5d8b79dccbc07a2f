"""Pictures in a folder: listed by a metadata file, or each with its caption in a text file beside it."""

import os
from collections.abc import Iterator
from pathlib import Path

from latentdiff.training.data.captions import LONGEST, decode_text, shorten
from latentdiff.training.data.pictures import CaptionedPicture, FileReader
from latentdiff.training.data.source import (
    CAPTION_SUFFIXES,
    PICTURE_SUFFIXES,
    TRAIN,
    NoPicturesError,
    Source,
    Wanted,
    inside,
)
from latentdiff.training.data.tables import metadata_of

SPLITS = {TRAIN, "validation", "valid", "val", "dev", "test"}


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
