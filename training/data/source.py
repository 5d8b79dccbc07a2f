"""What all sources of pictures have in common."""

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from latentdiff.training.data.captions import check_captions, shorten
from latentdiff.training.data.pictures import CaptionedPicture
from latentdiff.training.settings import Condition, DataSettings

PICTURE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jp2", ".ppm"}
)
CAPTION_SUFFIXES = (".txt", ".caption")
TRAIN = "train"  # the split of whatever names none


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
        split: rows and folders without a split are of "train".
        image_column: of a dataset.
        caption_column: of a dataset or table.
        caption: caption of every picture that has none of its own.
        condition: what captions are for: "text", "class" or "none". Classes may be whole numbers, labels of
            `datasets`, ``.cls`` files in shards, and names of folders, where a picture in a folder without a table has
            no caption beside it. With "none" every picture has the caption "".
        streaming: read a dataset as a stream, once, into a copy below `cache_dir`.
        max_pictures: take this many of the first.
        cache_dir: where a stream is copied to; by default where `datasets` keeps its own copies.
    """

    split: str = TRAIN
    image_column: str = "image"
    caption_column: str = "text"
    caption: str | None = None
    condition: Condition = "text"
    streaming: bool = False
    max_pictures: int | None = None
    cache_dir: Path | None = None

    @classmethod
    def of(cls, settings: DataSettings, split: str | None = None, **more: Any) -> "Wanted":
        """What `settings` ask of their source; `split` instead of theirs, if given."""
        same = ("image_column", "caption_column", "caption", "streaming", "max_pictures")
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
    """

    prefix: str
    pictures: list[CaptionedPicture] = field(default_factory=list)
    refused: list[Finding] = field(default_factory=list)
    warnings: list[Finding] = field(default_factory=list)

    def key(self, name: str) -> str:
        """The name of an entry within the source."""
        return name.removeprefix(self.prefix)

    def refuse(self, name: str, reason: object) -> None:
        self.refused.append(Finding(name, str(reason)))

    def warn(self, name: str, reason: str) -> None:
        self.warnings.append(Finding(name, reason))

    def is_full(self, wanted: Wanted) -> bool:
        return wanted.max_pictures is not None and len(self.pictures) >= wanted.max_pictures


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
