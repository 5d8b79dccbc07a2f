"""The folders of this disk that a page may name: nothing outside of them is opened for it."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from latentdiff.pipelines.server.requests import RequestError


class Folders:
    """Folders that were named when the server was started, and what people type to say something within them.

    Args:
        roots: as they were named.
    """

    def __init__(self, roots: Sequence[Path]) -> None:
        self.roots = {label_of(root): Path(os.path.realpath(root.expanduser())) for root in roots}

    def find(self, typed: str, field: str, there: bool = True) -> Path:
        """What is typed, as a path without links: begun with a folder's name, within one of them, or absolute.

        Args:
            field: that it was typed into, for the message.
            there: whether it has to exist.

        Raises:
            RequestError: it is not within the folders, or not there. Nothing is said of what is outside.
        """
        if not self.roots:
            raise RequestError(f"{field}: no folders were named; start the page with --folder DIR", field)
        if not typed.strip() or "\0" in typed:
            raise RequestError(f"{field}: say a path within {self.shown}", field)
        if ".." in Path(typed.strip()).parts:
            raise RequestError(f"{field}: {typed} is not within {self.shown}; write it without ..", field)
        places = [self._inside(place) for place in self._places(typed.strip())]
        for place in places:
            if place is not None and is_there(place):
                return place
        if (there and not any(places)) or places[0] is None:
            raise RequestError(f"{field}: {typed} is not within {self.shown}", field)
        if there:
            raise RequestError(f"{field}: there is no {typed} within {self.shown}", field)
        return places[0]

    @property
    def shown(self) -> str:
        return " or ".join(self.roots)

    def label(self, place: Path) -> str:
        """How a place within the folders is shown, and typed again."""
        for name, root in self.roots.items():
            if place == root or root in place.parents:
                return (Path(name) / place.relative_to(root)).as_posix()
        raise ValueError(f"{place} is not within {self.shown}")

    def hold(self, place: Path) -> bool:
        """Whether a place lies within the folders, and what it links to does."""
        return self._inside(place) is not None

    def _places(self, typed: str) -> Iterator[Path]:
        """What could be meant, most likely first."""
        path = Path(typed)
        for name, root in self.roots.items():
            parts = Path(name).parts
            if path.parts[: len(parts)] == parts:
                yield root.joinpath(*path.parts[len(parts) :])
        for root in self.roots.values():
            yield root / path

    def _inside(self, place: Path) -> Path | None:
        """Where links lead, if that is within the folders."""
        try:
            real = Path(os.path.realpath(place))
        except (OSError, ValueError):
            return None
        return real if any(real == root or root in real.parents for root in self.roots.values()) else None


def is_there(place: Path) -> bool:
    """False for names that no disk takes, too."""
    try:
        return place.exists()
    except OSError:
        return False


def label_of(root: Path) -> str:
    """A folder as it was named, but for where it lies: with that as it was typed, relative, or else its name."""
    return root.name if root.is_absolute() or root.parts[:1] == ("~",) else os.path.normpath(root)
