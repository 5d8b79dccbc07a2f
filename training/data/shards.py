"""WebDataset shards: tar files in which ``0001.jpg`` and ``0001.txt`` or ``0001.json`` belong together."""

import glob
import os
import re
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from latentdiff.training.data.caption_checks import LONGEST, check_weight, decode_text, shorten
from latentdiff.training.data.captioned_picture import CaptionedPicture, PartReader
from latentdiff.training.data.decode import PICTURE_SUFFIXES, why_unreadable
from latentdiff.training.data.folder import Splits, split_folders, split_in_name
from latentdiff.training.data.masks import MASK_SUFFIX
from latentdiff.training.data.source import CAPTION_SUFFIXES, TRAIN, NoPicturesError, Source, Wanted
from latentdiff.training.data.tables import json_object, metadata_of

LONGEST_NAME = 1_000  # characters of an entry's name with its folders
MOST_JSON = 2**22  # bytes of a sample's .json
UNPACK = "compressed; compressed shards must be unpacked first"
NO_TAR = {
    b"\x1f\x8b": f"gzip-{UNPACK}",
    b"BZh": f"bzip2-{UNPACK}",
    b"\xfd7zXZ\x00": f"xz-{UNPACK}",
    b"\x28\xb5\x2f\xfd": f"zstd-{UNPACK}",
    b"PK\x03\x04": "a zip file, no tar file; unpack it into a folder",
    b"PAR1": "a Parquet file, no tar file; lay it into a folder with a name ending in .parquet",
    b"version https://git-lfs": "a pointer of Git LFS, no tar file; fetch the file itself: git lfs pull",
}
"""What other files begin with."""
Parts = dict[str, tarfile.TarInfo]
Place = TypeVar("Place")


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
    shards: list[Path] = []
    for name in expand(str(folder)):
        found = [name] if os.path.isfile(name) else sorted(filter(os.path.isfile, glob.glob(name)))
        if not found:
            raise FileNotFoundError(f"{name}: no such shard")
        shards += map(Path, found)
    return list(dict.fromkeys(shards))


def expand(pattern: str) -> Iterator[str]:
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
        yield from expand(pattern[: brace.start()] + part + pattern[brace.end() :])


def find_folder_shards(folder: Path, wanted: Wanted) -> Source | None:
    """The pictures in the shards of a folder, or of its folders for splits; None: it has no shards.

    Raises:
        NoPicturesError: they are of other splits than the one that is wanted.
    """
    splits = split_folders(folder, wanted)
    found = _folder_shards(folder, splits)
    return read_shards(found, wanted, folder, splits) if found else None


def all_shards(source: str, wanted: Wanted) -> list[Path]:
    """The tar files of all splits that a folder or pattern means."""
    folder = Path(source).expanduser()
    return _folder_shards(folder, split_folders(folder, wanted)) if folder.is_dir() else find_shards(source)


def _folder_shards(folder: Path, splits: Splits) -> list[Path]:
    if metadata_of(folder) is not None:
        return []
    places = [folder, *(place for place in sorted(splits) if metadata_of(place) is None)]
    return [shard for place in places for shard in find_shards(str(place))]


def read_shards(shards: list[Path], wanted: Wanted, whole: Path | None = None, splits: Splits | None = None) -> Source:
    """The pictures in tar files. Each file is walked through once; a picture is then read from its own place.

    Args:
        whole: the folder that they are in, they or the folders for their splits.
        splits: these folders; shards elsewhere may say their split in their names.

    Raises:
        NoPicturesError: they are of other splits than the one that is wanted.
    """
    parent = whole or shards[0].parent
    folders = {shard: splits[shard.parent] for shard in shards if splits and shard.parent in splits}
    chosen = of_split({shard: shard.name for shard in shards}, folders, wanted, parent)
    source = Source(f"{parent.resolve()}{os.sep}")
    for shard in chosen:
        read_shard(shard.resolve(), wanted, source)
        if source.is_full(wanted):
            break
    return source


def of_split(names: Mapping[Place, str], folders: Mapping[Place, str], wanted: Wanted, parent: object) -> list[Place]:
    """The shards of the split that is wanted.

    Args:
        names: of the shards, which may say their split.
        folders: the split that the folder of a shard is of.
        parent: for the message.

    Raises:
        NoPicturesError: there are none.
    """
    split_of = {shard: folders.get(shard) or split_in_name(name) for shard, name in names.items()}
    if wanted.has_split(TRAIN) and TRAIN not in split_of.values():  # then only folders speak of splits, not names
        split_of = {shard: folders.get(shard, TRAIN) for shard in names}
    chosen = [shard for shard in names if wanted.has_split(split_of[shard])]
    if not chosen:
        others = ", ".join(sorted(set(split_of.values())))
        raise NoPicturesError(f"{parent}: no pictures of split {wanted.split!r}; its shards are of {others}")
    number, parts = wanted.part or (1, 1)
    if number > len(chosen):
        raise NoPicturesError(f"{parent}: {len(chosen)} shards cannot be split {parts} ways")
    return chosen[number - 1 :: parts]


def read_shard(shard: Path, wanted: Wanted, source: Source) -> None:
    """Add the pictures in a tar file to a source."""
    try:
        with tarfile.open(shard, "r:") as archive:
            samples = _samples(archive, shard, source)
            for key, parts in samples.items():
                if source.is_full(wanted):
                    return
                try:
                    source.add(_sample(archive, shard, parts, wanted), wanted)
                except (ValueError, OSError, tarfile.TarError) as error:
                    source.refuse(f"{shard}/{key}", error)
    except (tarfile.TarError, OSError, EOFError) as error:
        source.refuse(str(shard), what_else(shard) or f"cannot be read as a tar file ({error})")


def what_else(file: Path) -> str | None:
    """What a file is that is no tar file; None: that cannot be told."""
    try:
        with file.open("rb") as stream:
            head = stream.read(4096)
    except OSError:
        return None
    if not head:
        return "is empty (0 bytes), no tar file"
    for begin, what in NO_TAR.items():
        if head.startswith(begin):
            return f"is {what}"
    text = head.decode("utf-8-sig", "replace").rstrip("\ufffd").strip()  # a character may be cut at the end
    page = re.match(r"<!doctype html|<html", text, re.IGNORECASE)
    if not page and not re.fullmatch(r"[^\x00-\x08\x0e-\x1f\ufffd]+", text):
        return None
    title = re.search(r"<title[^>]*>\s*([^<]+?)\s*</title", text, re.IGNORECASE)
    said = shorten(title[1] if page and title else text, 200)
    kind = "a web page" if page else "XML" if text[0] == "<" else "JSON" if text[0] in "{[" else "text"
    return f"is {kind}, no tar file ({said}); the address of the file itself is needed, and perhaps leave to read it"


def _samples(archive: tarfile.TarFile, shard: Path, source: Source) -> dict[str, Parts]:
    """What belongs together: {key: {suffix: entry}}, in the order of the file."""
    samples: dict[str, Parts] = {}
    too_long = 0
    try:
        for member in archive:
            folder, _, base = member.name.rpartition("/")
            key, _, suffix = base.partition(".")
            if len(member.name) > LONGEST_NAME:
                too_long += 1
            elif member.isreg() and key and not member.issparse():
                samples.setdefault(f"{folder}/{key}" if folder else key, {})[f".{suffix.lower()}"] = member
            elif not member.isdir() and key:
                source.warn(f"{shard}/{member.name}", "is no plain file, and is not used")
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        source.refuse(str(shard), f"is cut off or damaged after {len(samples)} samples ({error})")
    if too_long:
        source.refuse(str(shard), f"has {too_long} entries with names of more than {LONGEST_NAME:,} characters")
    return samples


def _sample(archive: tarfile.TarFile, shard: Path, parts: Parts, wanted: Wanted) -> CaptionedPicture:
    pictures = [suffix for suffix in parts if suffix in PICTURE_SUFFIXES]
    if not pictures:
        raise ValueError(f"no picture, only {shorten(', '.join(parts), 200)}")
    readable = [suffix for suffix in pictures if why_unreadable(f"x{suffix}") is None]
    if not readable:
        raise ValueError(why_unreadable(f"x{pictures[0]}"))
    picture = parts[readable[0]]
    if picture.offset_data + picture.size > shard.stat().st_size:
        raise ValueError("the picture is cut off")
    reader = PartReader(str(shard), picture.offset_data, picture.size)
    mask = parts.get(MASK_SUFFIX) if wanted.masks and wanted.mask_column is None else None
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
        raise ValueError(f".json: no {wanted.caption_column!r}; it has {shorten(', '.join(fields), 200)}")
    captions = wanted.captions(caption)
    found_mask = None if mask is None else PartReader(str(shard), mask.offset_data, mask.size)
    weight = check_weight(fields.get("weight"))
    return CaptionedPicture(f"{shard}/{picture.name}", reader, captions, weight, mask=found_mask)


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo, most: int) -> bytes:
    if member.size > most:
        raise ValueError(f"{shorten(member.name)}: {member.size:,} bytes are too many")
    file = archive.extractfile(member)
    return b"" if file is None else file.read()
