"""WebDataset shards: tar files in which ``0001.jpg`` and ``0001.txt`` or ``0001.json`` belong together."""

import glob
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latentdiff.training.data.captions import LONGEST, check_weight, decode_text, printable
from latentdiff.training.data.pictures import CaptionedPicture, PartReader
from latentdiff.training.data.source import CAPTION_SUFFIXES, PICTURE_SUFFIXES, NoPicturesError, Source, Wanted
from latentdiff.training.data.tables import json_object

MOST_JSON = 2**22  # bytes of a sample's .json
Parts = dict[str, tarfile.TarInfo]


def find_shards(source: str) -> list[Path]:
    """The tar files that `source` means: a folder's, one file, or a pattern with ``{000..099}``, ``{a,b}``, ``*``.

    Raises:
        FileNotFoundError: a pattern that ends in ``.tar`` and matches nothing.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return sorted(path for path in folder.glob("*.tar") if path.is_file() and not path.name.startswith("."))
    if not source.endswith(".tar"):
        return []
    if "://" in source:
        raise FileNotFoundError(f"{source}: shards are read from the disk; download them first")
    shards: list[Path] = []
    for name in _expand(str(folder)):
        found = [name] if os.path.isfile(name) else sorted(glob.glob(name))
        if not found:
            raise FileNotFoundError(f"{name}: no such shard")
        shards += map(Path, found)
    return list(dict.fromkeys(shards))


def _expand(pattern: str) -> Iterator[str]:
    """A pattern without its braces: ``{08..10}`` counts, ``{a,b}`` lists."""
    brace = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", pattern)
    if brace is None:
        yield pattern
        return
    first, last, listed = brace.groups()
    if listed is not None:
        parts = listed.split(",")
    else:
        parts = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    for part in parts:
        yield from _expand(pattern[: brace.start()] + part + pattern[brace.end() :])


def read_shards(shards: list[Path], wanted: Wanted, whole: Path | None = None) -> Source:
    """The pictures in tar files. Each file is walked through once; a picture is then read from its own place.

    Args:
        whole: the folder they are in, or that their folder is one split of.

    Raises:
        NoPicturesError: another split than "train" is asked for, and they are not in a folder of that name.
    """
    parent = shards[0].parent
    if wanted.split != "train" and whole in (None, parent):
        raise NoPicturesError(f"{parent}: no pictures of split {wanted.split!r}; shards know no splits")
    source = Source(f"{(whole or parent).resolve()}{os.sep}")
    for shard in shards:
        _read_shard(shard.resolve(), wanted, source)
        if source.is_full(wanted):
            break
    return source


def _read_shard(shard: Path, wanted: Wanted, source: Source) -> None:
    try:
        with tarfile.open(shard, "r:") as archive:
            samples = _samples(archive, shard, source)
            for key, parts in samples.items():
                if source.is_full(wanted):
                    return
                try:
                    source.pictures.append(_sample(archive, shard, parts, wanted))
                except (ValueError, OSError, tarfile.TarError) as error:
                    source.refuse(f"{shard}/{key}", error)
    except (tarfile.TarError, OSError, EOFError) as error:
        source.refuse(str(shard), f"cannot be read as a tar file ({error}); compressed shards must be unpacked first")


def _samples(archive: tarfile.TarFile, shard: Path, source: Source) -> dict[str, Parts]:
    """What belongs together: {key: {suffix: entry}}, in the order of the file."""
    samples: dict[str, Parts] = {}
    try:
        for member in archive:
            folder, _, base = member.name.rpartition("/")
            key, _, suffix = base.partition(".")
            if member.isreg() and key and not member.issparse():
                samples.setdefault(f"{folder}/{key}" if folder else key, {})[f".{suffix.lower()}"] = member
            elif not member.isdir() and key:
                source.warn(f"{shard}/{member.name}", "is no plain file, and is not used")
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        source.refuse(str(shard), f"is cut off or damaged after {len(samples)} samples ({error})")
    return samples


def _sample(archive: tarfile.TarFile, shard: Path, parts: Parts, wanted: Wanted) -> CaptionedPicture:
    picture = next((parts[suffix] for suffix in parts if suffix in PICTURE_SUFFIXES), None)
    if picture is None:
        raise ValueError(f"no picture, only {', '.join(map(printable, parts))}")
    if picture.offset_data + picture.size > shard.stat().st_size:
        raise ValueError("the picture is cut off")
    reader = PartReader(str(shard), picture.offset_data, picture.size)
    fields: dict[str, Any] = {}
    if ".json" in parts:
        found = json_object(_content(archive, parts[".json"], MOST_JSON))
        if isinstance(found, str):
            raise ValueError(f".json: {found}")
        fields = found
    caption = fields.get(wanted.caption_column)
    suffixes = ((".cls",) if wanted.condition == "class" else ()) + CAPTION_SUFFIXES
    suffix = next((suffix for suffix in suffixes if suffix in parts), None)
    if caption is None and suffix is not None and wanted.condition != "none":
        caption = decode_text(_content(archive, parts[suffix], 4 * LONGEST + 4)).strip()
    elif caption is None and fields and not wanted.may_lack_captions:
        raise ValueError(f".json: no {wanted.caption_column!r}; it has {printable(', '.join(fields)[:200])}")
    captions = wanted.captions(caption)
    return CaptionedPicture(f"{shard}/{picture.name}", reader, captions, check_weight(fields.get("weight")))


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo, most: int) -> bytes:
    if member.size > most:
        raise ValueError(f"{printable(member.name)}: {member.size:,} bytes are too many")
    file = archive.extractfile(member)
    return b"" if file is None else file.read()
