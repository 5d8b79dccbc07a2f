"""What to do about pictures without captions: what lies beside them was perhaps meant."""

import os
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

from latentdiff.training.data.caption_checks import shorten
from latentdiff.training.data.decode import is_picture
from latentdiff.training.data.source import CAPTION_SUFFIXES, NO_CAPTION, Finding
from latentdiff.training.data.tables import METADATA

NAMED = 3  # of each kind
TABLES = (".csv", ".json", ".jsonl", ".parquet", ".tsv", ".txt")


def advice(refused: Iterable[Finding], data: str) -> list[str]:
    """Sentences about the entries among `refused` that lack a caption; none if none does.

    refused: with the whole paths of pictures as names.
    data: the folder, as it was given.
    """
    lacking = lacking_captions(refused)
    if not lacking:
        return []
    folders = list(dict.fromkeys(picture.parent for picture in lacking))
    found = [*_texts(lacking), *(line for folder in folders[:NAMED] for line in _tables(folder))][:NAMED]
    if len(folders) > 1:
        more = [f"{len(folders) - NAMED} more"] if len(folders) > NAMED else []
        names = ", ".join([*(shorten(folder.name) for folder in folders[:NAMED]), *more])
        found.insert(
            0,
            f"Are the folders ({names}) classes? A training with condition=class takes their names for them: "
            f"latentdiff train denoiser --data {shlex.quote(data)} --autoencoder emoji --output runs/classes "
            "condition=class",
        )
    return [
        *found,
        "One caption for all pictures that have none, in a training: caption='a photo of sks dog', say. 'latentdiff "
        "caption' writes one for each.",
    ]


def lacking_captions(refused: Iterable[Finding]) -> list[Path]:
    """The pictures among `refused` that lack a caption and are not of a table."""
    found = (Path(finding.name) for finding in refused if finding.reason.startswith(NO_CAPTION))
    return [picture for picture in found if is_picture(picture.name)]


def _texts(pictures: Sequence[Path]) -> list[str]:
    """Such as ``1.jpeg.txt`` beside ``1.jpeg``."""
    wrong = (
        (picture, name)
        for picture in pictures
        for suffix in CAPTION_SUFFIXES
        if os.path.lexists(picture.with_name(name := f"{picture.name}{suffix}"))
    )
    first = next(wrong, None)
    if first is None:
        return []
    right = first[0].with_suffix(Path(first[1]).suffix).name
    return [f"{shorten(first[1])} is not read; did you mean {shorten(right)}? Rename it, and all of its kind."]


def _tables(folder: Path) -> list[str]:
    """Tables in a folder, or in the one above it, under other names than those that are read."""
    found = []
    for place in (folder, folder.parent):
        try:
            names = sorted(entry.name for entry in os.scandir(place) if entry.is_file())
        except OSError:
            continue
        words = ("caption", "metadata", "label", "prompt")
        for name in names:
            stem, suffix = os.path.splitext(name.lower())
            if name in METADATA or suffix not in TABLES or not any(word in stem for word in words):
                continue
            right = f"metadata{suffix}" if suffix in (".csv", ".parquet") else "metadata.jsonl"
            found.append(
                f"{shorten(name)} is not read; did you mean {right}? A table of that name has the columns file_name "
                f"and text (or caption_column=)."
            )
    return found
