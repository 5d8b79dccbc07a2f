"""What is known of each picture of a source, as a file of JSON lines that people may read and change."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentdiff.interchange.atomic import atomic_file

FORMAT = "latentdiff manifest 1"


@dataclass(frozen=True, slots=True)
class Entry:
    """One picture, or one row that is none.

    Args:
        name: within the source.
        reason: why it cannot be used; empty where it can.
        use: False where the user said to leave it out.
        stamp: changes when the file does; empty where there is none.
        size: (width, height) upright; (0, 0) where it cannot be decoded.
        fingerprint: see `duplicates.fingerprint`.
    """

    name: str
    reason: str = ""
    use: bool = True
    digest: str = ""
    stamp: str = ""
    bytes: int = 0
    size: tuple[int, int] = (0, 0)
    fingerprint: str = ""
    warnings: tuple[str, ...] = ()

    def row(self) -> dict[str, Any]:
        """As a line of the manifest."""
        row: dict[str, Any] = {"name": self.name, "use": self.use}
        if self.reason:
            row["reason"] = self.reason
        if self.digest:
            row |= {"width": self.size[0], "height": self.size[1], "bytes": self.bytes, "digest": self.digest}
            row |= {"stamp": self.stamp, "fingerprint": self.fingerprint}
        if self.warnings:
            row["warnings"] = list(self.warnings)
        return row


def write_manifest(file: Path, entries: Iterable[Entry], about: Mapping[str, Any]) -> None:
    """Write `entries` as JSON lines, whole or not at all.

    Args:
        about: goes into the first line: what the entries are of.
    """
    with atomic_file(file, sync=True) as partial, partial.open("w", encoding="ascii") as lines:
        lines.write(json.dumps({"format": FORMAT, **about}) + "\n")
        for entry in entries:
            lines.write(json.dumps(entry.row()) + "\n")


def read_manifest(file: Path) -> dict[str, Entry]:
    """The entries of a manifest by name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no manifest, or a line of it is broken; the line is named.
    """
    entries: dict[str, Entry] = {}
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                if number == 1:
                    if row.get("format") != FORMAT:
                        raise ValueError(f"expected {FORMAT!r}")
                    continue
                entry = _entry(row)
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                raise ValueError(f"{file}, line {number}: not a line of a manifest ({error})") from None
            entries[entry.name] = entry
    if not entries and file.stat().st_size == 0:
        raise ValueError(f"{file}: the file is empty")
    return entries


def _entry(row: dict[str, Any]) -> Entry:
    name, use = row["name"], row.get("use", True)
    if not isinstance(name, str) or not isinstance(use, bool):
        raise ValueError("'name' must be a text, and 'use' true or false")
    return Entry(
        name=name,
        reason=str(row.get("reason", "")),
        use=use,
        digest=str(row.get("digest", "")),
        stamp=str(row.get("stamp", "")),
        bytes=int(row.get("bytes", 0)),
        size=(int(row.get("width", 0)), int(row.get("height", 0))),
        fingerprint=str(row.get("fingerprint", "")),
        warnings=tuple(map(str, row.get("warnings", ()))),
    )
