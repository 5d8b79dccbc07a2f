"""What trainers call: pictures that were examined, without those that cannot be used."""

import logging
from dataclasses import replace
from pathlib import Path

from latentdiff.training.data.captions import printable
from latentdiff.training.data.load import NAMED, log_findings, read_source
from latentdiff.training.data.manifest import Entry, read_manifest, write_manifest
from latentdiff.training.data.pictures import CaptionedPicture
from latentdiff.training.data.source import Finding, NoPicturesError, Source, Wanted
from latentdiff.training.data.survey import survey
from latentdiff.training.settings import Condition, DataSettings, RunSettings

logger = logging.getLogger(__name__)


def wanted_of(
    settings: DataSettings, split: str | None = None, condition: Condition = "text", cache_dir: Path | None = None
) -> Wanted:
    """What `settings` ask of their source."""
    return Wanted(
        split=settings.split if split is None else split,
        image_column=settings.image_column,
        caption_column=settings.caption_column,
        caption=settings.caption,
        condition=condition,
        streaming=settings.streaming,
        max_pictures=settings.max_pictures,
        cache_dir=cache_dir,
    )


def prepare_pictures(
    settings: RunSettings, split: str | None = None, condition: Condition = "text"
) -> list[CaptionedPicture]:
    """The usable pictures of ``settings.data``, each decoded once, with digest and size; always in the same order.

    What was found is kept in ``manifest-SPLIT.jsonl`` in the run's ``training/`` folder, so that a repeated run looks
    only at what changed. Pictures that cannot be used are counted and named, and left out. Those that
    ``settings.manifest`` says to leave out are left out too, and do not count as bad.

    Args:
        split: by default ``settings.split``.
        condition: what captions are for; with "none" every picture has the caption "".

    Raises:
        FileNotFoundError: there is no such source, split or manifest, or nothing in it can be used.
        ValueError: more than ``settings.max_bad_share`` of the pictures are unusable.
    """
    folder = Path(settings.output) / "training"
    cache_dir = Path(settings.cache_dir or folder) / "stream"
    wanted = wanted_of(settings, split, condition, cache_dir)
    source = read_source(settings.data, wanted)
    if settings.manifest is not None:
        leave_out(source, read_manifest(Path(settings.manifest).expanduser()))
    file = folder / f"manifest-{_file_part(wanted.split)}.jsonl"
    entries = survey_source(source, file, settings.data, wanted.split)
    good, bad = sort_out(source, entries)
    refused = source.refused + bad
    log_findings(refused, "left out")
    check_share(settings.data, len(good), refused, settings.max_bad_share)
    logger.info("%s (%s): %d pictures, %d left out", settings.data, wanted.split, len(good), len(refused))
    return good


def _file_part(split: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in split)[:60] or "all"


def survey_source(source: Source, file: Path, data: str, split: str) -> list[Entry]:
    """Examine every picture of `source`; what is known is read from `file`, and kept there."""
    known: dict[str, Entry] = {}
    try:
        known = read_manifest(file)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        logger.warning("%s; all pictures are examined again", error)
    about = {"data": data, "split": split}

    def keep(entries: list[Entry]) -> None:
        write_manifest(file, entries, about)

    keys = [source.key(picture.name) for picture in source.pictures]
    entries = survey(source.pictures, keys, known, keep)
    everything = [*entries, *(Entry(source.key(f.name), use=False, reason=f.reason) for f in source.refused)]
    if [known.get(entry.name) for entry in everything] != everything or len(known) != len(everything):
        write_manifest(file, everything, about)
    return entries


def sort_out(source: Source, entries: list[Entry]) -> tuple[list[CaptionedPicture], list[Finding]]:
    """The usable pictures, with digest and size, and what is wrong with the others."""
    good, bad = [], []
    for picture, entry in zip(source.pictures, entries, strict=True):
        if entry.reason:
            bad.append(Finding(picture.name, entry.reason))
        else:
            good.append(replace(picture, digest=entry.digest, size=entry.size))
    return good, bad


def leave_out(source: Source, manifest: dict[str, Entry]) -> None:
    """Take out of `source`, usable or not, what a manifest says not to use."""
    unwanted = {name for name, entry in manifest.items() if not entry.use}
    before = len(source.pictures)
    source.pictures = [picture for picture in source.pictures if source.key(picture.name) not in unwanted]
    source.refused = [finding for finding in source.refused if source.key(finding.name) not in unwanted]
    logger.info("left out as the manifest says: %d pictures", before - len(source.pictures))
    if manifest and not any(source.key(picture.name) in manifest for picture in source.pictures):
        logger.warning("the manifest names none of these pictures; is it of another folder?")


def check_share(data: str, good: int, refused: list[Finding], most: float) -> None:
    """Raises ValueError if more than the share `most` is unusable, NoPicturesError if all is."""
    total = good + len(refused)
    if refused and len(refused) > most * total:
        named = "\n".join(f"  {printable(f.name)}: {printable(f.reason)}" for f in refused[:NAMED])
        more = f"\n  and {len(refused) - NAMED} more" if len(refused) > NAMED else ""
        raise ValueError(
            f"{data}: {len(refused)} of {total} pictures cannot be used, more than max_bad_share={most:g} allows. "
            f"'latentdiff doctor' says more; repair or remove them, or allow more.\n{named}{more}"
        )
    if not good:
        raise NoPicturesError(f"{data}: nothing is left to train on")
