"""Held-out pictures that a model is measured on, models without text, and the reports that the figures go into."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from latentdiff import __version__
from latentdiff.interchange.atomic import write_text_whole
from latentdiff.interchange.folders import find_model, read_json
from latentdiff.pipelines import ClassConditionalPipeline, UnconditionalPipeline
from latentdiff.pipelines.registry import Kind, kind_saved_as
from latentdiff.training.card.card import last_part
from latentdiff.training.data import CaptionedPicture, NoPicturesError, Wanted, read_source
from latentdiff.training.data.survey import sound_pictures
from latentdiff.training.settings import Condition, DataSettings, HeldOutSettings


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


def write_report(
    file: Path,
    settings: HeldOutSettings,
    pictures: Sequence[CaptionedPicture],
    left_out: int,
    figures: Mapping[str, Any],
    **model: Any,
) -> dict[str, Any]:
    """Write a report as JSON, whole or not at all, and return it: `figures`, and of which model and pictures they are.

    Args:
        left_out: number of pictures that could not be used.
        model: what is said of it besides its name.
    """
    data = {"name": last_part(settings.data), "split": settings.split, "pictures": len(pictures), "left_out": left_out}
    about = {"made_by": f"latentdiff {__version__}", "model": {"name": last_part(settings.model), **model}}
    report = {**about, "data": data, **figures}
    write_text_whole(file, json.dumps(report, indent=2, ensure_ascii=False) + "\n", sync=True)
    return report


def held_out_pictures(
    settings: HeldOutSettings, folder: Path, condition: Condition = "text"
) -> tuple[list[CaptionedPicture], int]:
    """The usable pictures of the split, and the number of those left out.

    Raises:
        NoPicturesError: there are none, and what to do.
    """
    wanted = Wanted(
        split=settings.split,
        image_column=settings.image_column,
        caption_column=settings.caption_column,
        condition=condition,
    )
    try:
        source = read_source(settings.data, wanted)
    except NoPicturesError as error:
        raise NoPicturesError(
            f"{error}; give held-out pictures a split of that name, or choose one with --split: figures of "
            f"--split train, which a model has seen, flatter it"
        ) from error
    folder.mkdir(parents=True, exist_ok=True)
    about = {"data": settings.data, "split": settings.split}
    most = DataSettings.model_fields["max_bad_share"].default
    good, refused = sound_pictures(source, folder / "pictures.jsonl", about, most)
    return good, len(refused)


def textless_kind(model: str) -> Kind | None:
    """The kind of pipeline that loads a folder with a model without text; None: it holds another.

    Raises:
        FileNotFoundError: there is no pipeline folder, here or among the packaged models.
    """
    folder = find_model(model)
    if folder is None or not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"{model}: no pipeline folder; train one with 'latentdiff train denoiser'")
    kind = kind_saved_as(str(read_json(folder / "model_index.json").get("_class_name")))
    return kind if kind is not None and kind.conditioned_by in ("class", "none") else None


def load_textless(model: str, dtype: torch.dtype = torch.float32) -> ClassConditionalPipeline | UnconditionalPipeline:
    """A model without text, from its folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is conditioned by text.
    """
    kind = textless_kind(model)
    if kind is None:
        raise ValueError(
            f"{model} is no model without text, such as condition=class or none trains, and this needs one"
        )
    return kind.load().from_pretrained(find_model(model), dtype=dtype)
