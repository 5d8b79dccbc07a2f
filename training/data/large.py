"""Sources of very many pictures: examined some at a time, and kept in a table that the next start opens as it is."""

import json
import logging
import threading
import uuid
from array import array
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from latentdiff.interchange.atomic import write_text_whole
from latentdiff.training.data.captioned_picture import PartReader
from latentdiff.training.data.masks import TOO_MANY
from latentdiff.training.data.picture_table import FORMAT, PictureTable, TableWriter
from latentdiff.training.data.remote import RemoteReader
from latentdiff.training.data.source import Finding, Source
from latentdiff.training.data.survey import (
    NAMED,
    Entry,
    manifest_line,
    not_too_bad,
    sort_out,
    survey,
    without,
    write_manifest,
)

logger = logging.getLogger(__name__)

READERS = {kind.__name__: kind for kind in (PartReader, RemoteReader)}
"""Those that a later process can make again of what a file says."""
ROW = "RowReader"  # which it has to be given


class Manifest(Mapping[str, Entry]):
    """The entries of a manifest by name, of which only the places in the file are in memory; the last of a name counts.

    Lines can be appended. A last line that was cut off is removed.

    Args:
        file: made if there is none.
        about: for its first line; None: it is only read, as another process may write it.
    """

    def __init__(self, file: Path, about: Mapping[str, str] | None = None) -> None:
        if about is not None and not file.exists():
            write_manifest(file, (), about)
        hashes, starts, end = array("q"), array("q"), 0
        with file.open("rb") as lines:
            for line in lines:
                if not line.endswith(b"\n"):
                    break
                with suppress(ValueError, KeyError, TypeError):
                    hashes.append(hash(json.loads(line)["name"]))
                    starts.append(end)
                end += len(line)
        self._lock, self._stream = threading.Lock(), file.open("rb" if about is None else "r+b")
        if about is not None:
            self._stream.truncate(end)
        found = np.asarray(hashes, dtype=np.int64)
        order = np.argsort(found, kind="stable")
        self._hashes, self._starts = found[order], np.asarray(starts, dtype=np.int64)[order]

    def __len__(self) -> int:
        return len(self._hashes)

    def __iter__(self) -> Iterator[str]:
        for start in self._starts:
            yield self._at(int(start)).name

    def __getitem__(self, name: str) -> Entry:
        key = hash(name)
        for i in range(int(np.searchsorted(self._hashes, key, "right")) - 1, -1, -1):
            if self._hashes[i] != key:
                break
            if (entry := self._at(int(self._starts[i]))).name == name:
                return entry
        raise KeyError(name)

    def _at(self, start: int) -> Entry:
        with self._lock:
            self._stream.seek(start)
            line = self._stream.readline()
        return Entry.of(json.loads(line))

    def append(self, entries: list[Entry]) -> None:
        """Add lines, which this object does not find."""
        with self._lock:
            self._stream.seek(0, 2)
            self._stream.write("".join(map(manifest_line, entries)).encode("ascii"))
            self._stream.flush()

    def close(self) -> None:
        self._stream.close()


class LargeSurvey:
    """Examines the pictures of a source as it is read, and writes the usable ones into a table.

    Args:
        manifest: see `Manifest`.
        about: for its first line: ``data`` and ``split``.
        tables: the folder for the table.
        unwanted: names within the source that are left out.
        others: manifests of other surveys of these pictures.
    """

    def __init__(
        self,
        manifest: Path,
        about: Mapping[str, str],
        tables: Path,
        unwanted: Set[str],
        others: Sequence[Path] = (),
    ) -> None:
        self.manifest, self.about, self.tables, self.unwanted = manifest, about, tables, unwanted
        self.others = others
        self.refused: list[Finding] = []  # the first ones
        self.bad = 0
        self._known: Manifest | None = None
        self._writer: TableWriter | None = None

    def take(self, source: Source) -> None:
        """What a source drains into; see `Wanted`."""
        if self._known is None or self._writer is None:
            self._known = Manifest(self.manifest, self.about)
            self._seen = ChainMap[str, Entry](*map(Manifest, [self.manifest, *self.others]))  # type: ignore[arg-type]
            self.tables.mkdir(parents=True, exist_ok=True)
            for leftover in self.tables.glob(".partial-*.arrow"):
                leftover.unlink()
            self._writer = TableWriter(self.tables / f".partial-{uuid.uuid4().hex}.arrow")
            logger.info("%s: very many pictures; they are examined as they are listed", self.about["data"])
        known = self._known
        if any(picture.mask is not None for picture in source.pictures):
            raise ValueError(f"{self.about['data']}: {TOO_MANY}")
        source.drained += len(source.pictures)
        source.drained_refused += len(source.refused)
        pictures, findings = without(source, self.unwanted)
        source.pictures, source.refused = [], []
        kept = 0

        def keep(found: list[Entry]) -> None:
            nonlocal kept
            known.append([entry for entry in found[kept:] if known.get(entry.name) != entry])
            kept = len(found)

        part = Source(source.prefix, pictures)
        entries = survey(pictures, [source.key(picture.name) for picture in pictures], self._seen, keep)
        keep(entries)
        keep([*entries, *(Entry(source.key(f.name), use=False, reason=f.reason) for f in findings)])
        good, bad = sort_out(part, entries)
        self._writer.add(good)
        self.bad += len(findings) + len(bad)
        self.refused += [*findings, *bad][: NAMED + 1 - len(self.refused)]

    @property
    def is_used(self) -> bool:
        return self._writer is not None

    def finish(self, source: Source, key: str, max_bad_share: float) -> PictureTable:
        """The table of all usable pictures.

        Args:
            key: under which `open_table` finds it again.

        Raises:
            ValueError: more than the share `max_bad_share` is unusable.
            NoPicturesError: all is.
        """
        self.take(source)
        assert self._known is not None
        assert self._writer is not None
        self._known.close()
        self._writer.close()
        count, part = self._writer.count, self._writer.file
        not_too_bad(self.about["data"], self.refused, self.bad, count, max_bad_share)
        file = part.with_name(f"pictures-{part.stem.removeprefix('.partial-')}.arrow")
        part.rename(file)
        readers = self._writer.readers
        kinds = [type(reader).__name__ for reader in readers]
        said = [[kind, {} if kind == ROW else asdict(one)] for kind, one in zip(kinds, readers, strict=True)]
        index = {"format": FORMAT, "file": file.name, "size": file.stat().st_size, "readers": said, **self.about}
        write_text_whole(self.tables / f"pictures-{key}.json", json.dumps(index), sync=True)
        return PictureTable(file, readers)


def open_table(tables: Path, key: str, rows: Callable[[], Any] | None = None) -> PictureTable | None:
    """The table that was finished under `key`; None: there is none, or it is of another version or damaged.

    Args:
        rows: gives what reads the rows of a dataset.
    """
    index = _read_index(tables / f"pictures-{key}.json")
    if not index:
        return None
    try:
        file = tables / Path(index["file"]).name
        if file.stat().st_size != index["size"]:
            return None
        kinds: dict[str, Callable[..., Any]] = {**READERS} if rows is None else {**READERS, ROW: rows}
        readers = [kinds[kind](**values) for kind, values in index["readers"]]
    except (OSError, KeyError, TypeError, ValueError):
        return None
    return PictureTable(file, readers)


def _read_index(file: Path) -> dict[str, Any]:
    try:
        index = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return index if isinstance(index, dict) and index.get("format") == FORMAT else {}
