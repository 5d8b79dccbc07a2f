"""Checkpoints that are whole or absent: written under a temporary name, renamed, and only then are old ones removed."""

import json
import logging
import os
import shutil
from pathlib import Path

from accelerate import Accelerator

logger = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of a run: folders ``step-00001000`` with what Accelerate saves and ``state.json``."""

    def __init__(self, folder: Path, accelerator: Accelerator, keep: int = 2) -> None:
        self.folder, self.accelerator, self.keep = folder, accelerator, keep

    def save(self, step: int) -> None:
        """Save everything the accelerator has prepared or registered, as the checkpoint of `step`."""
        final = self.folder / f"step-{step:08d}"
        partial = self.folder / f".partial-{step:08d}"
        if final.exists():
            return
        if self.accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(partial))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            (partial / "state.json").write_text(json.dumps({"step": step}), encoding="utf-8")
            os.replace(partial, final)
            for old in self.whole()[: -self.keep]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def load_latest(self) -> int:
        """Load the newest whole checkpoint; returns its step, or 0 where there is none."""
        whole = self.whole()
        if not whole:
            return 0
        latest = whole[-1]
        try:
            self.accelerator.load_state(str(latest))
        except (RuntimeError, ValueError, KeyError) as error:
            raise ValueError(
                f"{latest}: does not fit the model these settings describe; use the settings of that run, "
                f"or another --output ({str(error).splitlines()[0]})"
            ) from error
        step = int(json.loads((latest / "state.json").read_text(encoding="utf-8"))["step"])
        logger.info("resumed from %s", latest)
        return step

    def whole(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(p for p in self.folder.iterdir() if p.name.startswith("step-") and (p / "state.json").is_file())
