"""Held-out pictures that a model is measured on, and where the figures go."""

import logging
from pathlib import Path

from latentdiff.interchange.folders import read_json
from latentdiff.training.data import CaptionedPicture, NoPicturesError, read_source
from latentdiff.training.data.prepare import check_share, sort_out, survey_source, wanted_of
from latentdiff.training.settings import Condition, DataSettings, HeldOutSettings

logger = logging.getLogger(__name__)


def check_report(file: Path) -> None:
    """Raises FileExistsError if `file` is there and was not written by latentdiff."""
    if not file.exists():
        return
    try:
        ours = str(read_json(file).get("made_by", "")).startswith("latentdiff")
    except (OSError, ValueError):
        ours = False
    if not ours:
        raise FileExistsError(f"{file} exists and was not written by latentdiff evaluate; choose another --output")


def held_out_pictures(
    settings: HeldOutSettings, folder: Path, condition: Condition = "text"
) -> tuple[list[CaptionedPicture], int]:
    """The usable pictures of the split, and the number of those left out.

    Raises:
        NoPicturesError: there are none, and what to do.
    """
    chosen = ("data", "split", "image_column", "caption_column")
    data = DataSettings.load(None, {name: getattr(settings, name) for name in chosen})
    try:
        source = read_source(settings.data, wanted_of(data, condition=condition))
    except NoPicturesError as error:
        raise NoPicturesError(
            f"{error}; give held-out pictures a split of that name, or choose one with --split: figures of "
            f"--split train, which a model has seen, flatter it"
        ) from error
    folder.mkdir(parents=True, exist_ok=True)
    entries = survey_source(source, folder / "pictures.jsonl", settings.data, settings.split)
    good, bad = sort_out(source, entries)
    refused = source.refused + bad
    for finding in refused[:20]:
        logger.warning("left out: %s: %s", finding.name, finding.reason)
    check_share(settings.data, len(good), refused, data.max_bad_share)
    return good, len(refused)
