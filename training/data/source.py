"""What all sources of pictures have in common."""

import errno
import os
import stat
import unicodedata
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from latentdiff.training.data.caption_checks import check_captions, shorten
from latentdiff.training.data.captioned_picture import CaptionedPicture
from latentdiff.training.data.picture_table import ROWS
from latentdiff.training.settings import Condition, DataSettings

Names = dict[tuple[Path, bool], dict[str, str]]
"""Of folders: what files are called there, by what `normal` makes of it, or that in small letters."""
LARGE = 200_000  # pictures of shards or a dataset, from which on they go into a table on the disk
CAPTION_SUFFIXES = (".txt", ".caption")
NO_CAPTION = "no caption"  # what the reason begins with where one is missing
TRAIN = "train"  # the split of whatever names none
SPLITS = {
    **dict.fromkeys((TRAIN, "training"), TRAIN),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""Names of splits, which files and folders may have, and what they stand for, as in the `datasets` library."""


def same_split(name: str) -> str:
    """What all names of one split have in common: "validation" for "val"."""
    return SPLITS.get(name.lower(), name)


class NoPicturesError(FileNotFoundError):
    """A source, or a split of it, has no pictures."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something about one entry: `name` says which, `reason` what."""

    name: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is requested of a source.

    Args:
        split: rows and folders without a split are of "train". "valid", "val" and "dev" are "validation".
        image_column: of a dataset.
        caption_column: of a dataset or table.
        masks: whether the pictures' masks are wanted.
        mask_column: of a dataset or table; None: masks lie beside the pictures, see `masks.MASK_SUFFIX`.
        caption: caption of every picture that has none of its own.
        condition: what captions are for: "text", "class" or "none". Classes may be whole numbers, labels of
            `datasets`, ``.cls`` files in shards, and names of folders, where a picture in a folder without a table has
            no caption beside it. With "none" every picture has the caption "".
        streaming: read a dataset as a stream, once, into a copy below `cache_dir`.
        max_pictures: take this many of the first.
        cache_dir: where a stream is copied to; by default where `datasets` keeps its own copies.
        picture_folder: a folder outside the source that paths in its tables may lead to as well.
        part: (k, n): of shards, only the k-th of every n, from 1.
        drain: of shards and datasets, takes the pictures and findings out of the source whenever there are many.
    """

    split: str = TRAIN
    image_column: str = "image"
    caption_column: str = "text"
    caption: str | None = None
    condition: Condition = "text"
    streaming: bool = False
    max_pictures: int | None = None
    cache_dir: Path | None = None
    picture_folder: str | None = None
    part: tuple[int, int] | None = None
    masks: bool = False
    mask_column: str | None = None
    drain: "Callable[[Source], None] | None" = field(default=None, compare=False)

    @classmethod
    def of(cls, settings: DataSettings, split: str | None = None, **more: Any) -> "Wanted":
        """What `settings` ask of their source; `split` instead of theirs, if given."""
        same = ("image_column", "caption_column", "caption", "streaming", "max_pictures", "picture_folder")
        masks = getattr(settings, "masked_loss", False) is not False
        more = {"masks": masks, "mask_column": getattr(settings, "mask_column", None), **more}
        return cls(split=split or settings.split, **{name: getattr(settings, name) for name in same}, **more)

    def captions(self, value: Any, column: str | None = None) -> tuple[str, ...]:
        """Captions from what an entry has in its caption column. Raises ValueError; see `check_captions`.

        Classes may be whole numbers; without condition there is the caption "" alone.
        """
        if self.condition == "none":
            return ("",)
        if self.condition == "class" and isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        return check_captions(value, column or self.caption_column, self.caption)

    def has_split(self, name: str) -> bool:
        """Whether a row or folder of this split is wanted."""
        return same_split(name) == same_split(self.split)

    def allowed(self, *folders: Path) -> tuple[Path, ...]:
        """The folders, resolved, that a path in a table may lead to, if the table's own are `folders`."""
        further = [] if self.picture_folder is None else [Path(self.picture_folder).expanduser()]
        found = [folder.resolve() for folder in (*folders, *further)]
        # A dataset in the hub's cache is a folder of links to blobs.
        return (*found, *(folder.parent.parent / "blobs" for folder in found if folder.parent.name == "snapshots"))

    @property
    def may_lack_captions(self) -> bool:
        return self.condition == "none" or self.caption is not None


@dataclass
class Source:
    """The pictures of a source, and what is wrong with others.

    Args:
        prefix: what all names begin with; a manifest leaves it out, so that it stays true of a moved folder.
        refused: entries that cannot be used.
        warnings: entries that can be used, but should be looked at.
        tables: those that the pictures are listed in.
        splits: other splits than the one that is wanted, where there are any.
        drained: how many pictures were taken out.
        drained_refused: how many entries that cannot be used were taken out.
    """

    prefix: str
    pictures: list[CaptionedPicture] = field(default_factory=list)
    refused: list[Finding] = field(default_factory=list)
    warnings: list[Finding] = field(default_factory=list)
    tables: list[Path] = field(default_factory=list)
    splits: set[str] = field(default_factory=set)
    drained: int = 0
    drained_refused: int = 0

    def key(self, name: str) -> str:
        """The name of an entry within the source."""
        return name.removeprefix(self.prefix)

    def refuse(self, name: str, reason: object) -> None:
        self.refused.append(Finding(name, str(reason)))

    def warn(self, name: str, reason: str) -> None:
        self.warnings.append(Finding(name, reason))

    def know_split(self, name: str) -> None:
        """Remember another split than the one that is wanted, for a message; not thousands of them."""
        if len(self.splits) < 20:
            self.splits.add(shorten(name))

    def add(self, picture: CaptionedPicture, wanted: Wanted) -> None:
        """Add a picture that nothing refers to, so that it may be drained."""
        self.pictures.append(picture)
        if wanted.drain is not None and len(self.pictures) >= (ROWS if self.drained else LARGE):
            wanted.drain(self)

    @property
    def count(self) -> int:
        return self.drained + len(self.pictures)

    @property
    def is_empty(self) -> bool:
        """Whether nothing was found, neither usable nor unusable."""
        return not (self.count or self.refused or self.drained_refused)

    def is_full(self, wanted: Wanted) -> bool:
        return wanted.max_pictures is not None and self.count >= wanted.max_pictures


def inside(folder: Path, file_name: str, allowed: Sequence[Path], names: Names | None = None) -> Path:
    """The regular file `file_name` of `folder`.

    A name that is not there stands for one that is written otherwise: with backslashes, or with its accents composed
    or decomposed (Unicode NFC, NFD).

    Args:
        allowed: folders, resolved, in one of which it must lie.
        names: kept between calls, so that a folder is listed once.

    Raises:
        ValueError: it leaves these folders, is no file, or cannot be a path.
    """
    shown, names = shorten(repr(file_name), 200), {} if names is None else names
    path = os.path.normpath(os.path.join(folder, file_name))
    try:
        if not os.path.lexists(path):
            path = str(_written_otherwise(folder, file_name, names) or path)
        real = os.path.realpath(path, strict=True)
        if not _is_below(real, allowed):
            raise ValueError(f"{shown} leaves the folder {allowed[0]}; picture_folder=FOLDER allows another one")
        mode = os.stat(real).st_mode
    except (OSError, UnicodeError) as error:
        if not _is_below(path, allowed):
            raise ValueError(f"{shown} leaves the folder {allowed[0]}") from None
        if getattr(error, "errno", None) == errno.ELOOP:
            raise ValueError(f"{shown}: links that lead in a circle") from None
        alike = None
        with suppress(OSError):
            alike = _written_otherwise(folder, file_name, names, any_case=True)
        hint = "" if alike is None else f"; there is {shorten(os.path.relpath(alike, folder))}, and upper case counts"
        reason = getattr(error, "strerror", None) or "not a path"
        raise ValueError(f"no such file: {shorten(path, 200)} ({reason}){hint}") from None
    if not stat.S_ISREG(mode):
        raise ValueError(f"{shown} is {'a folder' if stat.S_ISDIR(mode) else 'a pipe or device'}, not a file")
    return Path(path)


def _is_below(path: str, folders: Sequence[Path]) -> bool:
    return any(path == str(folder) or path.startswith(os.path.join(folder, "")) for folder in folders)


def _written_otherwise(folder: Path, file_name: str, names: Names, any_case: bool = False) -> Path | None:
    for part in PurePath(file_name.replace("\\", "/")).parts:
        if part != ".." and not os.path.lexists(folder / part):
            alike = names.setdefault((folder, any_case), {})
            if not alike:
                alike.update({_key(name, any_case): name for name in os.listdir(folder)})
            if _key(part, any_case) not in alike:
                return None
            part = alike[_key(part, any_case)]
        folder = folder / part
    return Path(os.path.normpath(folder))


def _key(name: str, any_case: bool) -> str:
    return normal(name).casefold() if any_case else normal(name)


def normal(name: str) -> str:
    """A file's name with its accents composed, as most systems write them."""
    return unicodedata.normalize("NFC", name)
