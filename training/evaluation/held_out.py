"""Held-out pictures, the loss on them and reports of it; and models without text, which are measured on them."""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from latentdiff import __version__
from latentdiff.diffusion.process import Clock
from latentdiff.interchange.atomic import write_text_whole
from latentdiff.interchange.folders import read_json
from latentdiff.interchange.user_files import read_yaml
from latentdiff.pipelines import ClassConditionalPipeline, UnconditionalPipeline
from latentdiff.pipelines.registry import kind_in
from latentdiff.pipelines.storage.places import find_place, local_place, open_place
from latentdiff.training.batch.batch_types import DiffusionBatch
from latentdiff.training.card.card import last_part
from latentdiff.training.data import CaptionedPicture, NoPicturesError, Wanted, read_source
from latentdiff.training.data.load import FEWEST, hold_out
from latentdiff.training.data.source import TRAIN, same_split
from latentdiff.training.data.survey import sound_pictures
from latentdiff.training.settings import Condition, DataSettings, HeldOutSettings
from latentdiff.training.settings.learning import HELD_OUT_SHARE

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
        picture_folder=settings.picture_folder,
    )
    try:
        source = read_source(settings.data, wanted)
    except NoPicturesError as error:
        share = trained_without(settings.model) if same_split(settings.split) == "validation" else 0.0
        explained = NoPicturesError(
            f"{error}; give held-out pictures a split of that name (a folder 'validation' beside 'train', or a column "
            f"'split'; training holds some out by itself where there are {FEWEST} at least), or choose one with "
            f"--split: figures of --split train, which a model has seen, flatter it"
        )
        if not share:
            raise explained from error
        source = read_source(settings.data, replace(wanted, split=TRAIN))
    else:
        share = 0.0
    folder.mkdir(parents=True, exist_ok=True)
    about = {"data": settings.data, "split": settings.split}
    most = DataSettings.model_fields["max_bad_share"].default
    good, refused = sound_pictures(source, folder / "pictures.jsonl", about, most)
    if share:
        total, good = len(good), hold_out(good, share, condition)[1]
        if not good:
            raise explained
        logger.info("no split 'validation': the %d of %d pictures that training holds out by itself", len(good), total)
    return good, len(refused)


def trained_without(model: str) -> float:
    """The share of its pictures that a model's training held out by itself, as its settings say; see `hold_out`.

    A model without settings of ours, such as a packaged one, was trained on others: the share is the usual one.
    """
    found = trained_with(model)
    if found is None:
        return HELD_OUT_SHARE
    share = found.get("held_out_share", 0.0)  # 0.0: from before there was one
    return float(share) if isinstance(share, int | float) else 0.0


def was_trained_on(settings: HeldOutSettings) -> bool:
    """Whether the pictures are those of the model's training, as its own settings say."""
    try:
        data = (trained_with(settings.model) or {}).get("data")
    except FileNotFoundError:  # the pipeline was given itself
        return False
    if same_split(settings.split) != TRAIN or not isinstance(data, str):
        return False
    return os.path.realpath(os.path.expanduser(data)) == os.path.realpath(os.path.expanduser(settings.data))


def trained_with(model: str) -> dict[str, Any] | None:
    """The settings that a model's training left; None if there are none."""
    place = local_place(model)
    file = None if place is None else place / "training" / "settings.yaml"
    if file is None or not file.is_file():
        return None
    found = read_yaml(file)
    return found if isinstance(found, dict) else {}


def load_textless(model: str, dtype: torch.dtype = torch.float32) -> ClassConditionalPipeline | UnconditionalPipeline:
    """A model without text: a pipeline folder, a single file, or on the hub.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is conditioned by text.
    """
    place = find_place(model)
    if place.is_dir() and not (place / "model_index.json").is_file():
        raise FileNotFoundError(f"{model}: no pipeline folder; train one with 'latentdiff train denoiser'")
    kind = kind_in(place, textless=True)
    if kind.conditioned_by not in ("class", "none"):
        raise ValueError(
            f"{model} is no model without text, such as 'latentdiff train denoiser' makes with condition=class or "
            f"none, and this needs one; 'latentdiff evaluate' measures any model"
        )
    loaded: ClassConditionalPipeline | UnconditionalPipeline = open_place(kind.load(), place, dtype=dtype)
    return loaded


class HeldOutLoss:
    """Measures an objective on fixed batches.

    The loss is the plain mean squared error of what the process predicts (noise, v or x_0), whatever weights or bound
    training has, so that runs with the same process can be compared.

    Args:
        process: whose timesteps are divided.
        bands: into how many ranges of equal length.
    """

    def __init__(self, process: Clock, bands: int = 4) -> None:
        if not 1 <= bands <= process.num_timesteps:
            raise ValueError(f"bands must lie in [1, {process.num_timesteps}], not {bands}")
        self.process = process
        self.edges = [process.num_timesteps * i // bands for i in range(bands + 1)]

    @torch.no_grad()
    def __call__(
        self, objective: Any, batches: Sequence[DiffusionBatch], accelerator: Accelerator | None = None
    ) -> dict[str, float]:
        """Measure. Each process takes its share of the batches, and all get the result; all must call it.

        Nothing random is drawn, and every module is left in the mode, training or evaluation, in which it was.

        Args:
            objective: an `Objective` with a held-out loss, as Accelerate has wrapped it or not.
            batches: on its device, the same on every process.
            accelerator: None is one process.

        Returns:
            By name, such as ``val_loss``, the mean over all pictures, and as ``val_loss_<first>_<last>`` that of each
            band of timesteps that has any. Empty without batches.
        """
        rank, count = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
        names: tuple[str, ...] = ()
        sums = torch.zeros(0)  # (figures and the number of pictures, bands)
        modes = {module: module.training for module in objective.modules()}
        objective.eval()
        try:
            # Wrapped modules may talk to the other processes in every forward, so all do equally many.
            for start in range(0, len(batches), count):
                counts = start + rank < len(batches)
                batch = batches[start + rank if counts else 0]
                figures = objective(batch, held_out=True).figures
                if not names:
                    names = tuple(figures)
                    sums = torch.zeros(len(names) + 1, len(self.edges) - 1, dtype=torch.float64)
                if counts:
                    self._add(sums, batch, torch.stack([figures[name].double().cpu() for name in names]))
        finally:
            for module, mode in modes.items():
                module.training = mode
        if accelerator is not None and count > 1 and names:
            sums = accelerator.reduce(sums.to(accelerator.device), "sum").cpu()
        return self._means(names, sums)

    def _add(self, sums: Tensor, batch: DiffusionBatch, found: Tensor) -> None:
        """found: (figures, B)"""
        times = self.process.model_time(batch.times(self.process, held_out=True)).cpu()
        bands = torch.bucketize(times, torch.tensor(self.edges[1:]), right=True)
        sums.index_add_(1, bands, torch.cat([found, torch.ones_like(found[:1])]))

    def _means(self, names: Sequence[str], sums: Tensor) -> dict[str, float]:
        if not names:
            return {}
        *rows, counts = sums.tolist()
        means = {name: sum(row) / sum(counts) for name, row in zip(names, rows, strict=True)}
        for name, row in zip(names, rows, strict=True):
            for i, (total, number) in enumerate(zip(row, counts, strict=True)):
                if number:
                    means[f"{name}_{self.edges[i]}_{self.edges[i + 1] - 1}"] = total / number
        return means
