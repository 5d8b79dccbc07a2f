"""The survey: every picture is decoded once before training, and what was found is kept in a manifest.

A manifest is a file of JSON lines that people may read and change.
"""

import hashlib
import json
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

from PIL import Image
from tqdm.auto import tqdm

from latentdiff.interchange.atomic import atomic_file
from latentdiff.interchange.user_files import check_regular
from latentdiff.training.data.advice import advice
from latentdiff.training.data.caption_checks import shorten
from latentdiff.training.data.captioned_picture import CaptionedPicture
from latentdiff.training.data.decode import Decoded, decode
from latentdiff.training.data.duplicates import fingerprint
from latentdiff.training.data.masks import decode_mask
from latentdiff.training.data.source import Finding, NoPicturesError, Source

logger = logging.getLogger(__name__)

FORMAT = "latentdiff manifest 1"
NAMED = 20  # findings named in a log or report; the rest are counted
ALIKE = 3  # findings with one reason that have a line each; more have one together
CHUNK = 512  # pictures handed to the threads at once
SAVE_SHARE = 20  # keeping results in between takes at most this fraction of the time, as 1 / n
SAVE_EVERY = 60.0  # seconds, at least


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
        mask_digest, mask_stamp: of its mask, where one is wanted.
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
    mask_digest: str = ""
    mask_stamp: str = ""

    def row(self) -> dict[str, Any]:
        """As a line of the manifest."""
        row: dict[str, Any] = {"name": self.name, "use": self.use, "reason": self.reason}
        if self.digest:
            row |= {"width": self.size[0], "height": self.size[1], "bytes": self.bytes, "digest": self.digest}
            row |= {"stamp": self.stamp, "fingerprint": self.fingerprint}
        if self.mask_digest:
            row |= {"mask_digest": self.mask_digest, "mask_stamp": self.mask_stamp}
        row["warnings"] = list(self.warnings)
        return {key: value for key, value in row.items() if value or key not in ("reason", "warnings")}

    @classmethod
    def of(cls, row: dict[str, Any]) -> "Entry":
        """From a line of a manifest. Raises ValueError, TypeError or KeyError if it is none."""
        if not isinstance(row["name"], str) or not isinstance(row.get("use", True), bool):
            raise ValueError("'name' must be a text, and 'use' true or false")
        named = ("reason", "digest", "stamp", "fingerprint", "mask_digest", "mask_stamp")
        texts = {key: str(row.get(key, "")) for key in named}
        size = (int(row.get("width", 0)), int(row.get("height", 0)))
        warnings = tuple(map(str, row.get("warnings", ())))
        use, length = row.get("use", True), int(row.get("bytes", 0))
        return cls(row["name"], use=use, bytes=length, size=size, warnings=warnings, **texts)


def write_manifest(file: Path, entries: Iterable[Entry], about: Mapping[str, Any]) -> None:
    """Write `entries` as JSON lines, whole or not at all.

    Args:
        about: goes into the first line: what the entries are of.
    """
    with atomic_file(file, sync=True) as partial, partial.open("w", encoding="ascii") as lines:
        lines.write(json.dumps({"format": FORMAT, **about}) + "\n")
        lines.writelines(map(manifest_line, entries))


def manifest_line(entry: Entry) -> str:
    return json.dumps(entry.row()) + "\n"


def read_manifest(file: Path) -> dict[str, Entry]:
    """The entries of a manifest by name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no manifest, or a line of it is broken; the line is named.
    """
    check_regular(file)
    entries: dict[str, Entry] = {}
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                if number == 1:
                    if row.get("format") != FORMAT:
                        raise ValueError(f"expected {FORMAT!r}")
                    continue
                entry = Entry.of(row)
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                raise ValueError(f"{file}, line {number}: not a line of a manifest ({error})") from None
            entries[entry.name] = entry
    if not entries and file.stat().st_size == 0:
        raise ValueError(f"{file}: the file is empty")
    return entries


def survey(
    pictures: Sequence[CaptionedPicture],
    keys: Sequence[str],
    known: Mapping[str, Entry] | None = None,
    keep: Callable[[list[Entry]], None] | None = None,
) -> list[Entry]:
    """What each of `pictures` is, in their order. Those that did not change since `known` are not decoded again.

    Args:
        keys: name of each picture in `known` and in the result.
        known: what an earlier survey found, by key.
        keep: called now and then, and when interrupted, with what has been found so far.
    """
    known = known or {}
    found: list[Entry] = []
    kept, cost = time.monotonic(), 0.0
    workers = min(8, os.cpu_count() or 1)
    jobs = list(zip(pictures, keys, strict=True))
    bar = tqdm(total=len(jobs), desc="examining pictures", unit="", disable=None, leave=False, dynamic_ncols=True)
    with warnings.catch_warnings(), ThreadPoolExecutor(workers) as pool, bar:
        warnings.filterwarnings("ignore", module="PIL")  # broken EXIF and the like; what matters is reported by name
        try:
            for start in range(0, len(jobs), CHUNK):
                chunk = jobs[start : start + CHUNK]
                found += pool.map(lambda job: examine(job[0], job[1], known.get(job[1])), chunk)
                bar.update(len(chunk))
                now = time.monotonic()
                if keep is not None and now - kept > max(SAVE_EVERY, SAVE_SHARE * cost):
                    keep(found)
                    kept, cost = time.monotonic(), time.monotonic() - now
        except KeyboardInterrupt:
            if keep is not None:
                keep(found)
            raise
    return found


def examine(picture: CaptionedPicture, key: str, known: Entry | None = None) -> Entry:
    """What one picture is, and its mask if it has one; `known` if that still holds."""
    entry = _examine(picture, key, known)
    if picture.mask is None or entry.reason:
        return replace(entry, mask_digest="", mask_stamp="")
    try:
        stamp = str(getattr(picture.mask, "stamp", str)())
        if stamp and entry.mask_stamp == stamp:
            return entry
        content = picture.mask()
        decode_mask(content, entry.size)
    except (OSError, ValueError) as error:
        reason = f"its mask cannot be used ({getattr(error, 'strerror', None) or error})"
        return replace(entry, use=False, reason=reason)
    return replace(entry, mask_digest=hashlib.sha256(content).hexdigest(), mask_stamp=stamp)


def _examine(picture: CaptionedPicture, key: str, known: Entry | None) -> Entry:
    sound = known if known is not None and not known.reason and known.digest and known.fingerprint else None
    try:
        stamp = str(getattr(picture.read, "stamp", str)())  # empty where only the bytes say what changed
        if sound is not None and stamp and sound.stamp == stamp:
            return replace(sound, name=key, use=True)
        content = picture.read()
    except (OSError, ValueError) as error:
        return Entry(key, use=False, reason=f"cannot be read ({getattr(error, 'strerror', None) or error})")
    digest = hashlib.sha256(content).hexdigest()
    if sound is not None and sound.digest == digest:
        return replace(sound, name=key, use=True, stamp=stamp)
    entry = Entry(key, digest=digest, stamp=stamp, bytes=len(content))
    try:
        decoded = decode(content, picture.name)
    except ValueError as error:
        return replace(entry, use=False, reason=f"cannot be read as a picture ({error})")
    print_of = fingerprint(decoded.image)
    return replace(entry, size=decoded.image.size, fingerprint=print_of, warnings=_warnings(picture.name, decoded))


def _warnings(name: str, decoded: Decoded) -> tuple[str, ...]:
    found = []
    expected = Image.registered_extensions().get(PurePath(name).suffix.lower())
    alike = {"MPO": "JPEG", "DIB": "BMP"}  # of one family, with the same suffixes
    if expected is not None and alike.get(decoded.format, decoded.format) != alike.get(expected, expected):
        found.append(f"is a {decoded.format} file, in spite of its name")
    if decoded.animated:
        found.append("has several frames or pages; the first is used")
    return tuple(found)


def sound_pictures(
    source: Source,
    file: Path,
    about: Mapping[str, str],
    max_bad_share: float,
    check: Callable[[Sequence[Entry]], None] | None = None,
    others: Sequence[Path] = (),
) -> tuple[list[CaptionedPicture], list[Finding]]:
    """Examine every picture of `source`: the usable ones, with digest and size, and what cannot be used.

    Args:
        file: what an earlier survey found is read from here, and what this one finds is kept here.
        about: for the first line of `file`: ``data`` and ``split``.
        check: may refuse what was found, before it is kept.
        others: manifests of other surveys of these pictures.

    Raises:
        ValueError: more than the share `max_bad_share` is unusable.
        NoPicturesError: all is.
    """
    known: dict[str, Entry] = {}
    try:
        known = read_manifest(file)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        logger.warning("%s; all pictures are examined again", error)
    keys = [source.key(picture.name) for picture in source.pictures]
    seen = dict(known)
    for other in others:
        seen = {**read_manifest(other), **seen}

    def keep(found: list[Entry]) -> None:
        write_manifest(file, {**known, **{entry.name: entry for entry in found}}.values(), about)

    entries = survey(source.pictures, keys, seen, keep)
    if check is not None:
        check(entries)
    everything = [*entries, *(Entry(source.key(f.name), use=False, reason=f.reason) for f in source.refused)]
    if [known.get(entry.name) for entry in everything] != everything or len(known) != len(everything):
        write_manifest(file, everything, about)
    good, bad = sort_out(source, entries)
    refused = source.refused + bad
    not_too_bad(about["data"], refused, len(refused), len(good), max_bad_share)
    return good, refused


def not_too_bad(data: str, refused: Sequence[Finding], bad: int, good: int, max_bad_share: float) -> None:
    """Name what cannot be used.

    Args:
        refused: the first ones of it.
        bad, good: how many there are of either.

    Raises:
        ValueError: more than the share `max_bad_share` is unusable.
        NoPicturesError: all is.
    """
    if bad and bad > max_bad_share * (good + bad):
        lines, left = alike(refused)
        left += bad - len(refused)
        named = "\n".join(f"  {line}" for line in lines)
        more = f"\n  and {left} more" if left else ""
        raise ValueError(
            f"{data}: {bad} of {good + bad} pictures cannot be used, more than a share of {max_bad_share:g} (in a "
            f"training: max_bad_share=...). 'latentdiff doctor' says more; repair or remove them."
            + "".join(f"\n{line}" for line in advice(refused, data))
            + f"\n{named}{more}"
        )
    log_findings(refused, "left out", bad)
    if not good:
        raise NoPicturesError(f"{data}: nothing is left to train on")


def alike(findings: Sequence[Finding], most: int = NAMED) -> tuple[list[str], int]:
    """A line for each finding, or for many with the same reason together; at most `most` lines, and how many findings
    are in none of them."""
    groups: dict[str, list[Finding]] = {}
    for finding in findings:
        groups.setdefault(finding.reason.replace(PurePath(finding.name).stem, ""), []).append(finding)
    rows: list[tuple[str, int]] = []
    for group in groups.values():
        reason = shorten(group[0].reason, 500)
        if len(group) > ALIKE:
            first = ", ".join(shorten(finding.name, 300) for finding in group[:ALIKE])
            rows.append((f"{len(group)} alike, {first} and so on; the first: {reason}", len(group)))
        else:
            rows += [(f"{shorten(one.name, 300)}: {shorten(one.reason, 500)}", 1) for one in group]
    return [line for line, _ in rows[:most]], sum(count for _, count in rows[most:])


def sort_out(source: Source, entries: list[Entry]) -> tuple[list[CaptionedPicture], list[Finding]]:
    """The usable pictures, with digest and size, and what is wrong with the others."""
    good, bad = [], []
    for picture, entry in zip(source.pictures, entries, strict=True):
        if entry.reason:
            bad.append(Finding(picture.name, entry.reason))
        else:
            good.append(replace(picture, digest=entry.digest, size=entry.size, mask_digest=entry.mask_digest))
    return good, bad


def leave_out(source: Source, manifest: dict[str, Entry]) -> None:
    """Take out of `source`, usable or not, what a manifest says not to use."""
    before = len(source.pictures)
    source.pictures, source.refused = without(source, {name for name, entry in manifest.items() if not entry.use})
    logger.info("left out as the manifest says: %d pictures", before - len(source.pictures))
    if manifest and not any(source.key(picture.name) in manifest for picture in source.pictures):
        logger.warning("the manifest names none of these pictures; is it of another folder?")


def without(source: Source, unwanted: Set[str]) -> tuple[list[CaptionedPicture], list[Finding]]:
    """Pictures and refused entries of `source` whose names are not `unwanted`."""
    pictures = [picture for picture in source.pictures if source.key(picture.name) not in unwanted]
    return pictures, [finding for finding in source.refused if source.key(finding.name) not in unwanted]


def log_findings(findings: Sequence[Finding], what: str, count: int | None = None) -> None:
    """Name the first `NAMED` of `findings` in warnings, and count the rest; `count` if these are not all."""
    for finding in findings[:NAMED]:
        logger.warning("%s: %s: %s", what, shorten(finding.name, 300), shorten(finding.reason, 500))
    count = len(findings) if count is None else count
    if count > NAMED:
        logger.warning("%s: %d more", what, count - NAMED)
