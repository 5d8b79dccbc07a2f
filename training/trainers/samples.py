"""The samples of a run: the same prompts each time, beside the user's pictures and what was drawn before training."""

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from PIL import Image

from latentdiff.interchange.atomic import write_text_whole
from latentdiff.interchange.fingerprint import weights_digest
from latentdiff.interchange.folders import read_json
from latentdiff.interchange.picture_files import to_pictures
from latentdiff.interchange.png import image_grid, read_settings, save_picture
from latentdiff.training.batch.cache import digest
from latentdiff.training.data import CaptionedPicture, read_pixels
from latentdiff.training.loop.distributed import spread_modules
from latentdiff.training.loop.estimate import SOON
from latentdiff.training.loop.figures import comparison_sheet
from latentdiff.training.loop.run import TrainingRun
from latentdiff.training.settings import DiffusionSettings
from latentdiff.training.trainers.diffusion_models import SAMPLES, DiffusionModel, UnconditionalModel

logger = logging.getLogger(__name__)

FEW = 4  # samples that a dry run draws


class Samples:
    """What a run shows of its model.

    Args:
        pictures: that are trained on; captions and the originals beside the samples are theirs.
        idle: networks that leave a GPU after drawing: its memory is the denoiser's.
    """

    def __init__(
        self,
        run: TrainingRun,
        settings: DiffusionSettings,
        model: DiffusionModel,
        pictures: Sequence[CaptionedPicture],
        idle: Sequence[Any],
    ) -> None:
        self.run, self.settings, self.model, self.idle = run, settings, model, idle
        self.prompts: Sequence[str] = settings.sample_prompts or chosen_captions(run, pictures)
        self.count = len(self.prompts)
        if settings.is_dry_run:
            self.prompts = self.prompts[:FEW]
        self.rows: dict[str, Sequence[Image.Image | None]] = {}
        if run.accelerator.is_main_process:
            originals = [] if settings.sample_prompts else self._originals(pictures)
            self._add("picture", originals)
            self._add("before", [self._before(number) for number in range(len(self.prompts))])

    def draw_before(self) -> None:
        """Draw and keep what the model draws before training, as many as there is time for.

        What a start that was stopped has drawn by the same model is not drawn again.
        """
        about = {} if spread_modules(self.run.objective) else {"drawn_by": self._digest()}

        def keep(number: int, image: Image.Image) -> None:
            if self.run.accelerator.is_main_process:
                save_picture(image, self._file(number), {"caption": self.prompts[number], **about})

        kept = [self._before(number, about) for number in range(len(self.prompts))] if about else []
        with self.run.averaged():
            images = self._draw(SOON, list(takewhile(lambda one: one is not None, kept)), keep)
        if self.run.accelerator.is_main_process:
            self._add("before", images)

    def _digest(self) -> str:
        """Of the model as it is, and of how it draws."""
        model, settings = self.model, self.settings
        trained = {key: value for key, value in self.run.objective.named_parameters() if value.requires_grad}
        how = [settings.resolution, settings.sample_steps, settings.sample_guidance_scale, model.scheduler.config]
        given = [*map("=".join, sorted(model.given().items())), weights_digest(trained), *map(str, how)]
        return digest(*given)

    def draw(self) -> None:
        """A grid of the model as it is; of those that draw without prompts, of its pictures alone.

        What is drawn besides the settings' plan, soon after the beginning, is no more than there is time for.
        """
        images = self._draw(None if self.run.due(self.settings.sample_every) else SOON)
        if not self.run.accelerator.is_main_process:
            return
        if isinstance(self.model, UnconditionalModel):
            self.run.show("samples", image_grid([image for image in images if image is not None], 8))
        else:
            drawn = [number for number, image in enumerate(images) if image is not None]
            rows = {**self.rows, f"step {self.run.step}": images}
            chosen = {name: [row[number] for number in drawn] for name, row in rows.items() if row}
            self.run.show("samples", comparison_sheet(chosen, [self.prompts[number] for number in drawn]))

    def _draw(
        self,
        within: float | None,
        kept: Sequence[Image.Image | None] = (),
        keep: Callable[[int, Image.Image], None] = lambda number, image: None,
    ) -> list[Image.Image | None]:
        """A sample of each prompt; of those that do not fit into so many seconds, but for the first, None.

        kept: of the first prompts. keep: gets the others' numbers and samples as they come.
        """
        if isinstance(self.model, UnconditionalModel):
            return self.model.draw((), self.settings, self.run.device)
        images: list[Any] = list(kept)
        first = 1 if within is not None and self.run.accelerator.num_processes == 1 else len(self.prompts)
        wanted = min(first, len(self.prompts) - len(kept))
        began = time.monotonic()
        while wanted > 0:
            at = len(images)
            images += self.model.draw(self.prompts[at : at + wanted], self.settings, self.run.device, seed=at)
            for number in range(at, len(images)):
                keep(number, images[number])
            spent = time.monotonic() - began
            fitting = int(((within or 0.0) - spent) * (len(images) - len(kept)) / max(spent, 1e-9))
            wanted = min(fitting, len(self.prompts) - len(images))
        for network in self.idle:
            network.to("cpu")
        if len(images) < len(self.prompts) and self.run.accelerator.is_main_process:
            logger.info("%d of %d samples were drawn, for which there was time", len(images), len(self.prompts))
        self.run.shown_share = (len(images) - len(kept)) / self.count
        return images + [None] * (len(self.prompts) - len(images))

    def _add(self, name: str, images: Sequence[Image.Image | None]) -> None:
        if any(images):
            self.rows[name] = images

    def _file(self, number: int) -> Path:
        return self.run.folder / "before" / f"{number:02d}.png"

    def _before(self, number: int, about: Mapping[str, str] | None = None) -> Image.Image | None:
        """What was drawn of this prompt before a training that goes on; or, before any, of just this model."""
        file = self._file(number)
        found = read_settings(file) if self.run.step > 0 or about else None
        wanted = {"caption": self.prompts[number], **(about or {})}
        if found is None or any(found.get(key) != value for key, value in wanted.items()):
            return None
        with Image.open(file) as image:
            return image.convert("RGB")

    def _originals(self, pictures: Sequence[CaptionedPicture]) -> list[Image.Image | None]:
        """A picture of each caption, the next one where a caption comes again; None: it is gone."""
        side = self.settings.resolution
        left: dict[str, list[CaptionedPicture]] = {caption: [] for caption in self.prompts}
        for picture in pictures:
            if picture.captions[0] in left:
                left[picture.captions[0]].append(picture)
        chosen = [left[caption].pop(0) if left[caption] else None for caption in self.prompts]
        return [None if one is None else to_pictures(read_pixels(one, side, side)[None])[0] for one in chosen]


def chosen_captions(run: TrainingRun, pictures: Sequence[CaptionedPicture]) -> list[str]:
    """`sample_captions`, chosen once: a run that goes on draws the same, whatever pictures have come and gone."""
    file = run.folder / "sample_captions.json"
    with run.accelerator.main_process_first():
        if run.step > 0 and file.is_file():
            return [str(caption) for caption in read_json(file).get("captions", [])]
        captions = sample_captions(pictures)
        if run.accelerator.is_main_process:
            write_text_whole(file, json.dumps({"captions": captions}, indent=1, ensure_ascii=False) + "\n")
    return captions


def sample_captions(pictures: Sequence[CaptionedPicture], most: int = SAMPLES) -> list[str]:
    """Captions to draw samples of: different ones as long as there are any, spread over the pictures."""
    rounds: dict[str, int] = {}
    by_round: list[list[str]] = []
    for picture in pictures:
        caption = picture.captions[0]
        number = rounds[caption] = rounds.get(caption, -1) + 1
        if number == len(by_round):
            by_round.append([])
        by_round[number].append(caption)
    chosen: list[str] = []
    for captions in by_round:
        room = min(most - len(chosen), len(captions))
        chosen += [captions[i * len(captions) // room] for i in range(room)]
    return chosen
