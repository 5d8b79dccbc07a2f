"""What a run writes down while it trains: ``metrics.jsonl``, its curves, and the trackers' figures and pictures."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image

from latentdiff.interchange.atomic import atomic_file
from latentdiff.interchange.png import save_picture
from latentdiff.training.loop.figures import curves
from latentdiff.training.settings import RunSettings

logger = logging.getLogger(__name__)


class Records:
    """Rows of figures by step, in ``metrics.jsonl`` and with the trackers. Only the main process writes.

    Args:
        folder: that the file is in.
        step: from which the run goes on; rows after it are removed.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, settings: RunSettings, step: int) -> None:
        self.weighted = weighting(settings)
        self.folder, self.file, self.accelerator = folder, folder / "metrics.jsonl", accelerator
        if accelerator.is_main_process and self.file.is_file():
            self._remove_after(step)
        if settings.report_to:
            config = {key: str(value) for key, value in settings.model_dump().items()}
            accelerator.init_trackers("latentdiff", config=config)

    def _remove_after(self, step: int) -> None:
        rows = self.file.read_bytes().splitlines(keepends=True)
        with atomic_file(self.file) as partial:
            partial.write_bytes(b"".join(row for row in rows if step_of_row(row) <= step))

    def add(self, step: int, figures: dict[str, Any]) -> None:
        """One row. A full disk costs rows and does not end the run."""
        if not self.accelerator.is_main_process:
            return
        row = json.dumps({"step": step, **figures}).encode() + b"\n"
        try:
            with self.file.open("ab+") as file:
                if size := file.tell():
                    file.seek(size - 1)
                    row = row if file.read() == b"\n" else b"\n" + row  # after one that a full disk has cut
                file.write(row)
        except OSError as error:
            logger.warning("%s: the figures of step %d could not be written (%s)", self.file, step, error.strerror)
        self.accelerator.log(figures, step=step)

    def show(self, step: int, name: str, picture: Image.Image) -> None:
        """Keep a picture in ``samples``, and give it to the trackers that take some. A full disk costs the picture."""
        import numpy as np

        file = self.sheet(step)
        try:
            save_picture(picture, file)
        except OSError as error:
            logger.warning("%s could not be written (%s)", file, error.strerror)
        for tracker in self.accelerator.trackers:
            if tracker.name == "wandb":
                tracker.log_images({name: [picture]}, step=step)
            elif tracker.name == "tensorboard":
                array = np.asarray(picture.convert("RGB"))[None]  # (1, H, W, 3)
                tracker.log_images({name: array}, step=step, dataformats="NHWC")

    def sheet(self, step: int) -> Path:
        """The file of a step's picture."""
        return self.folder / "samples" / f"step-{step:08d}.png"

    def draw_curves(self) -> None:
        """Draw what was recorded so far, as ``curves.png``. A full disk costs the picture."""
        if not (self.accelerator.is_main_process and self.file.is_file()):
            return
        rows = [json.loads(row) for row in self.file.read_bytes().splitlines() if math.isfinite(step_of_row(row))]
        sheet = curves(rows, self.weighted)
        try:
            if sheet is not None:
                save_picture(sheet, self.folder / "curves.png")
        except OSError as error:
            logger.warning("%s could not be written (%s)", self.folder / "curves.png", error.strerror)

    def close(self) -> None:
        self.draw_curves()
        for tracker in self.accelerator.trackers:
            tracker.finish()


def weighting(settings: RunSettings) -> str:
    """By what a denoiser's training loss is weighted, other than its held-out loss; empty: by nothing."""
    if getattr(settings, "p2_gamma", 0.0):
        return "P2"
    return "" if getattr(settings, "min_snr_gamma", None) is None else "min-SNR"


def step_of_row(row: bytes) -> float:
    """The step of a row of figures; infinite for one that a stop has torn, or that is damaged otherwise."""
    try:
        return float(json.loads(row)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def memory_in_use(device: torch.device) -> int:
    """Bytes that this process holds: of the GPU (the most so far) if there is one, else of the main memory."""
    import psutil

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)
