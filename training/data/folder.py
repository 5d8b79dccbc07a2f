"""Pictures in a folder: its splits, its tables, and captions in text files beside the pictures."""

import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from latentdiff.training.data.caption_checks import LONGEST, decode_text, shorten
from latentdiff.training.data.captioned_picture import CaptionedPicture, FileReader
from latentdiff.training.data.decode import is_picture, why_unreadable
from latentdiff.training.data.masks import MASK_SUFFIX
from latentdiff.training.data.source import (
    CAPTION_SUFFIXES,
    NO_CAPTION,
    SPLITS,
    TRAIN,
    Source,
    Wanted,
    inside,
    normal,
    same_split,
)
from latentdiff.training.data.tables import METADATA, Listing

DEEPEST = 100  # folders within folders
Splits = dict[Path, str]  # folders or files, and which split they are


def read_folder(folder: Path, wanted: Wanted) -> Source:
    """The pictures below `folder`.

    Where a folder has a metadata file, the pictures in it and below it are those that the file lists, and those that
    metadata files further below list. Elsewhere each has its caption in a ``.txt`` or ``.caption`` file beside it;
    without one, its class is the name of the folder that it is in, as in the `datasets` library's ImageFolder; and the
    output of a training is passed over.

    Raises:
        ValueError: a metadata file cannot be read as a whole, or no row of it has a file name, or a caption where one
            is needed.
    """
    root = folder.resolve()
    reader = _FolderReader(root, wanted)
    reader.visit(root, listed=False)
    return reader.source


def split_folders(root: Path, wanted: Wanted) -> Splits:
    """The folders that are splits by their names, in `root` or in the only folder that it has.

    Only if all folders there are, or they would be kinds of things; and if "train" is among them, or something beside
    them is of no split, or else "train" would be empty. But "validation" is a split beside any others.
    """
    place, others = root, False
    while True:
        entries = [entry for entry in os.scandir(place) if not entry.name.startswith(".")]
        folders = [entry.name for entry in entries if _is_folder(entry) and not is_run(Path(entry.path))]
        files = {entry.name for entry in entries if not _is_folder(entry)}
        others = others or not files.isdisjoint(METADATA)
        found = {place / name: same_split(name) for name in folders}
        if found and all(name.lower() in SPLITS for name in folders):
            break
        stop = any(is_picture(name) or name.endswith(".tar") for name in files) or "validation" in folders
        if stop or len(folders) != 1:
            return {folder: split for folder, split in found.items() if folder.name == "validation"}
        place = place / folders[0]
    others = others or any(is_picture(name) or name.endswith(".tar") for name in files)
    if others or TRAIN in found.values() or not wanted.has_split(TRAIN):
        return found
    return {folder: split for folder, split in found.items() if folder.name == "validation"}


def split_in_name(name: str) -> str:
    """The split that a file's name speaks of, as in ``val-0001.tar``."""
    return next((SPLITS[word] for word in re.split(r"[^a-z]+", name.lower()) if word in SPLITS), TRAIN)


def is_run(folder: Path) -> bool:
    """Whether a training writes there: curves and samples, no pictures to train on."""
    return os.path.isfile(folder / "training" / "settings.yaml")


class _FolderReader:
    def __init__(self, root: Path, wanted: Wanted) -> None:
        self.root, self.wanted = root, wanted
        self.source = Source(f"{root}{os.sep}")
        self.splits = split_folders(root, wanted)
        self.followed: set[Path] = set()  # where links to folders lead, each once
        self.listing = Listing(self.source, root, wanted, self.split_of)

    def split_of(self, place: Path) -> str:
        """By the folder that a path is in, which a table on Windows wrote with backslashes."""
        if not self.splits:
            return TRAIN
        place = Path(os.path.normpath(str(place).replace("\\", "/")))
        return next((split for folder, split in self.splits.items() if place.is_relative_to(folder)), TRAIN)

    def visit(self, folder: Path, listed: bool) -> None:
        """Add the pictures in `folder` and below. Files are taken in order of their names, hidden ones are left out.

        Args:
            listed: whether a table above lists what is here.
        """
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            return self.source.refuse(str(folder), f"cannot be read ({error.strerror})")
        table = self.listing.read_any(folder)
        listed = listed or table is not None
        alike: dict[str, list[str]] = defaultdict(list)  # files that differ in their suffix only
        for entry in entries if not listed else ():
            alike[_stem(entry.name)].append(entry.name)
        for entry in entries:
            if self.source.is_full(self.wanted):
                return None
            if entry.name.startswith("."):
                continue
            if _is_folder(entry):
                if not listed and is_picture(entry.name):
                    self.source.refuse(entry.path, "is a folder, not a picture")
                self._descend(Path(entry.path), entry.is_symlink(), listed)
            elif not listed and is_picture(entry.name) and not _is_mask(entry.name, alike):
                masks = alike.get(f"{_stem(entry.name)}.mask", ())
                mask = next((name for name in masks if name.endswith(MASK_SUFFIX) and _is_mask(name, alike)), None)
                self._add(Path(entry.path), alike[_stem(entry.name)], mask)

    def _descend(self, folder: Path, is_link: bool, listed: bool) -> None:
        if not listed and is_run(folder):
            return self.source.warn(str(folder), "is the output of a training, and is not looked into")
        if is_link:
            target = folder.resolve()
            allowed = any(target.is_relative_to(one) for one in self.listing.allowed[1:])
            if not allowed or target in self.followed or self.root.is_relative_to(target):
                if not listed:
                    reason = "is a link to a folder, and is not followed; picture_folder=FOLDER allows where it leads"
                    self.source.warn(str(folder), reason)
                return
            self.followed.add(target)
        if len(folder.parts) - len(self.root.parts) > DEEPEST:
            self.source.warn(str(folder), f"is not looked into: it is more than {DEEPEST} folders deep")
        else:
            self.visit(folder, listed)

    def _add(self, picture: Path, alike: Sequence[str], mask: str | None) -> None:
        """alike: the files beside it with the same name but for the suffix, in order. mask: the file of its mask."""
        split = self.split_of(picture)
        if not self.wanted.has_split(split):
            self.source.know_split(split)
            return
        by_suffix = {os.path.splitext(name)[1].lower(): name for name in alike}
        beside = next((by_suffix[suffix] for suffix in CAPTION_SUFFIXES if suffix in by_suffix), None)
        if why := why_unreadable(picture.name):
            if any(is_picture(name) and not why_unreadable(name) for name in alike):
                return  # such as a raw picture beside the one that was made of it
            if beside is None and not self.wanted.may_lack_captions:
                self.source.warn(str(picture), why)
            else:
                self.source.refuse(str(picture), why)
            return
        try:
            path = inside(picture.parent, picture.name, self.listing.allowed)
            caption = self._caption(path, beside)
            wanted = mask is not None and self.wanted.masks and self.wanted.mask_column is None
            mask_path = inside(picture.parent, str(mask), self.listing.allowed) if wanted else None
            read_mask = None if mask_path is None else FileReader(str(mask_path))
            self.source.pictures.append(CaptionedPicture(str(path), FileReader(str(path)), caption, mask=read_mask))
        except ValueError as error:
            self.source.refuse(str(picture), error)

    def _caption(self, picture: Path, beside: str | None) -> tuple[str, ...]:
        wanted, folder = self.wanted, picture.parent
        if beside is not None and wanted.condition != "none":
            return self._read_caption(folder / beside)
        if wanted.condition == "class" and folder != self.root and folder not in self.splits:
            return wanted.captions(folder.name)
        if not wanted.may_lack_captions:
            file = shorten(picture.with_suffix(".txt").name)
            lacks = "no class; lay it into a folder named like it," if wanted.condition == "class" else f"{NO_CAPTION};"
            raise ValueError(f"{lacks} write one into {file} beside it, or a metadata.jsonl for the folder")
        return wanted.captions(None)

    def _read_caption(self, file: Path) -> tuple[str, ...]:
        name = shorten(file.name)
        path = inside(file.parent, file.name, self.listing.allowed)
        try:
            if path.stat().st_size > 4 * LONGEST + 4:  # a character takes at most four bytes
                size = f"{path.stat().st_size:,} bytes"
                raise ValueError(f"a caption of {size}; at most {LONGEST:,} characters are taken")
            return self.wanted.captions(decode_text(path.read_bytes()).strip(), name)
        except OSError as error:
            raise ValueError(f"{name}: cannot be read ({error.strerror})") from None
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


def _stem(name: str) -> str:
    return normal(os.path.splitext(name)[0])


def _is_mask(name: str, alike: Mapping[str, Sequence[str]]) -> bool:
    """Whether a file is the mask of a picture beside it, and no picture with a caption of its own.

    alike: names of files in its folder by what `_stem` makes of them.
    """
    if not name.endswith(MASK_SUFFIX):
        return False
    captions = {f"{name.removesuffix('.png')}{suffix}" for suffix in CAPTION_SUFFIXES}
    others = alike.get(normal(name.removesuffix(MASK_SUFFIX)), ())
    return captions.isdisjoint(alike[_stem(name)]) and any(map(is_picture, others))


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # links that lead in a circle
        return False
