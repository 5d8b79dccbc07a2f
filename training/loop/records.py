"""What a run writes down while it trains: ``metrics.jsonl``, and the trackers' figures and pictures."""

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from latentdiff.interchange.atomic import failures_named, write_text_whole
from latentdiff.training.settings import RunSettings


class Records:
    """Rows of figures by step, in ``metrics.jsonl`` and with the trackers. Only the main process writes.

    Args:
        folder: that the file is in.
        step: from which the run goes on; rows after it are removed.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, settings: RunSettings, step: int) -> None:
        self.file, self.accelerator = folder / "metrics.jsonl", accelerator
        if accelerator.is_main_process and self.file.is_file():
            self._remove_after(step)
        if settings.report_to:
            config = {key: str(value) for key, value in settings.model_dump().items()}
            accelerator.init_trackers("latentdiff", config=config)

    def _remove_after(self, step: int) -> None:
        rows = self.file.read_text(encoding="utf-8").splitlines(keepends=True)
        write_text_whole(self.file, "".join(row for row in rows if step_of_row(row) <= step))

    def add(self, step: int, figures: dict[str, Any]) -> None:
        """One row."""
        if self.accelerator.is_main_process:
            with failures_named(self.file), self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **figures}) + "\n")
            self.accelerator.log(figures, step=step)

    def show(self, step: int, name: str, file: Path) -> None:
        """Give a picture that was written to the trackers that take pictures."""
        import numpy as np
        from PIL import Image

        for tracker in self.accelerator.trackers:
            if tracker.name == "wandb":
                tracker.log_images({name: [Image.open(file)]}, step=step)
            elif tracker.name == "tensorboard":
                array = np.asarray(Image.open(file).convert("RGB"))[None]  # (1, H, W, 3)
                tracker.log_images({name: array}, step=step, dataformats="NHWC")

    def close(self) -> None:
        for tracker in self.accelerator.trackers:
            tracker.finish()


def step_of_row(row: str) -> float:
    """The step of a row of figures; infinite for one that a stop has torn."""
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
