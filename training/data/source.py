"""What all sources of pictures have in common."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from latentdiff.training.data.captions import check_captions
from latentdiff.training.data.pictures import CaptionedPicture
from latentdiff.training.settings import Condition

PICTURE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jp2", ".ppm"}
)
CAPTION_SUFFIXES = (".txt", ".caption")


class NoPicturesError(FileNotFoundError):
    """A source, or a split of it, has no pictures."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something about one entry: `name` says which, `reason` what."""

    name: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is requested of a source; see `load_pictures`."""

    split: str = "train"
    image_column: str = "image"
    caption_column: str = "text"
    caption: str | None = None
    condition: Condition = "text"
    streaming: bool = False
    max_pictures: int | None = None
    cache_dir: Path | None = None

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
