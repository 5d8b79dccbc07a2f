"""The survey: every picture is decoded once before training, and what was found is kept."""

import hashlib
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import PurePath

from PIL import Image
from tqdm.auto import tqdm

from latentdiff.training.data.decode import Decoded, decode
from latentdiff.training.data.duplicates import fingerprint
from latentdiff.training.data.manifest import Entry
from latentdiff.training.data.pictures import CaptionedPicture

CHUNK = 512  # pictures handed to the threads at once
SAVE_SHARE = 20  # keeping results in between takes at most this fraction of the time, as 1 / n
SAVE_EVERY = 60.0  # seconds, at least


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
    """What one picture is; `known` if that still holds."""
    sound = known if known is not None and not known.reason and known.digest and known.fingerprint else None
    try:
        stamp = stamp_of(picture)
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
        decoded = decode(content)
    except ValueError as error:
        return replace(entry, use=False, reason=f"cannot be read as a picture ({error})")
    print_of = fingerprint(decoded.image)
    return replace(entry, size=decoded.image.size, fingerprint=print_of, warnings=_warnings(picture.name, decoded))


def stamp_of(picture: CaptionedPicture) -> str:
    """What changes when the picture does and is quick to find out; empty where only the bytes say it."""
    stamp = getattr(picture.read, "stamp", None)
    return "" if stamp is None else str(stamp())


def _warnings(name: str, decoded: Decoded) -> tuple[str, ...]:
    found = []
    expected = Image.registered_extensions().get(PurePath(name).suffix.lower())
    alike = {"MPO": "JPEG", "DIB": "BMP"}  # of one family, with the same suffixes
    if expected is not None and alike.get(decoded.format, decoded.format) != alike.get(expected, expected):
        found.append(f"is a {decoded.format} file, in spite of its name")
    if decoded.animated:
        found.append("has several frames or pages; the first is used")
    return tuple(found)
