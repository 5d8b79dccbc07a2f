"""Fine-tuning from the page: in a process of its own, of which what it has written down is shown."""

import json
import math
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from latentdiff.interchange.user_files import MAX_PICTURE, MAX_TEXT, read_bytes
from latentdiff.pipelines.commands.models import INDEX
from latentdiff.pipelines.server.child import Child
from latentdiff.pipelines.server.folders import Folders
from latentdiff.pipelines.server.requests import RequestError, read_fields

POINTS = 500
"""Of a curve, at most."""
CURVES = ("loss", "val_loss")
SAMPLE = re.compile(r"step-\d{8}\.png")
SHEET = "reconstructions.png"


class LookRequest(BaseModel):
    """A folder of pictures to look at."""

    model_config = ConfigDict(extra="allow")  # to say what was meant; see `read_fields`

    data: str
    model: str | None = None


class FinetuneRequest(LookRequest):
    """What to fine-tune, on what, and for how long; what is left out is as the command has it."""

    output: str
    method: Literal["lora", "full"] = "lora"
    caption: str | None = Field(None, max_length=1000)
    max_steps: int | None = Field(None, ge=1, le=10_000_000)
    learning_rate: float | None = Field(None, gt=0, allow_inf_nan=False)
    batch_size: int | None = Field(None, ge=1, le=4096)
    sample_every: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=0)

    @property
    def settings(self) -> list[str]:
        """As arguments of the command."""
        names = ("caption", "max_steps", "learning_rate", "batch_size", "sample_every", "seed")
        given = {name: getattr(self, name) for name in names}
        return [f"{name}={value}" for name, value in given.items() if value is not None]


class Training:
    """One process at a time, which looks at pictures or fine-tunes; it goes on when the page is closed.

    Args:
        folders: that pictures and results must be within.
        model_at: where a model lies that is asked for by name; None: the first.
    """

    def __init__(self, folders: Folders, model_at: Callable[[str | None], Path]) -> None:
        self.folders, self.model_at = folders, model_at
        self.child: Child | None = None
        self.what: dict[str, Any] = {}
        self.output: Path | None = None
        self._starting = threading.Lock()
        self._scratch = tempfile.TemporaryDirectory(prefix="latentdiff-page-")
        self.names = {f"{self._scratch.name}{os.sep}": ""}
        """How places on this disk are shown, the longest first."""
        for name, root in sorted(folders.roots.items(), key=lambda one: -len(str(one[1]))):
            self.names |= {f"{root}{os.sep}": "" if name == "." else f"{name}/"}

    def look(self, values: Mapping[str, Any]) -> None:
        """Let ``latentdiff doctor`` look at a folder of pictures.

        Raises:
            RequestError: it cannot, or something runs already.
        """
        request = read_fields(LookRequest, values)
        data = self.folders.find(request.data, "data")
        sheet = Path(self._scratch.name, SHEET)
        command = ["doctor", str(data), "--model", self._model(request.model), "--sheet", str(sheet)]
        self._start(command, {"kind": "look", "data": self.folders.label(data)}, None)

    def finetune(self, values: Mapping[str, Any]) -> None:
        """Begin a fine-tuning, or go on with the one in its output.

        Raises:
            RequestError: it cannot be, or something runs already.
        """
        request = read_fields(FinetuneRequest, values)
        data = self.folders.find(request.data, "data")
        output = self.folders.find(request.output, "output", there=False)
        if output in self.folders.roots.values():
            raise RequestError("output: name a folder for the model within that one", "output")
        options = ["--data", str(data), "--output", str(output), "--model", self._model(request.model)]
        what: dict[str, Any] = {"kind": "finetune", "data": self.folders.label(data)}
        what["output"] = self.folders.label(output)
        what["asked"] = request.model_dump(exclude_none=True)  # a page that is opened later shows it in its form
        self._start(["finetune", *options, "--method", request.method, *request.settings], what, output)

    def _model(self, name: str | None) -> str:
        """Where a model lies."""
        place = self.model_at(name)
        self.names[str(place)] = place.name if name is None else name
        return str(place)

    def _start(self, command: list[str], what: dict[str, Any], output: Path | None) -> None:
        with self._starting:
            if self.running:
                doing = "a fine-tuning" if self.what["kind"] == "finetune" else "a look at pictures"
                raise RequestError(f"{doing} is running; wait for its end, or stop it", code="busy", status=409)
            self.child, self.what, self.output = Child(command), what, output

    @property
    def running(self) -> bool:
        return self.child is not None and self.child.status is None

    def stop(self) -> None:
        """Ask what runs to save and end."""
        if self.child is not None:
            self.child.stop()

    def close(self, seconds: float) -> bool:
        """Ask what runs to save and end, and wait for that; whether it has ended in time."""
        self.stop()
        ended = self.child is None or self.child.wait(seconds)
        self._scratch.cleanup()
        return ended

    def state(self) -> dict[str, Any]:
        """What runs or ran last, as the page shows it."""
        if self.child is None:
            return {"running": False}
        status = self.child.status
        ended = (
            None if status is None else "stopped" if self.child.asked_to_stop else "failed" if status else "finished"
        )
        return {
            **self.what,
            "running": status is None,
            "stopping": status is None and self.child.asked_to_stop,
            "draws": status is not None and self.output is not None and (self.output / INDEX).is_file(),
            "ended": None if status is None else ended,
            "said": self._shown(self.child.text),
            "curves": curves_in(self._training / "metrics.jsonl") if self.output else {},
            "samples": self.samples(),
        }

    def _shown(self, text: str) -> str:
        """What a command says, with paths as they are typed into the page."""
        for place, name in self.names.items():
            text = text.replace(place, name)
        return text

    @property
    def _training(self) -> Path:
        assert self.output is not None
        return self.output / "training"

    def samples(self) -> list[str]:
        """Names of the pictures that it has made so far."""
        if self.output is None:
            return [SHEET] if Path(self._scratch.name, SHEET).is_file() else []
        try:
            names = os.listdir(self._training / "samples")
        except OSError:
            return []
        return sorted(name for name in names if SAMPLE.fullmatch(name))

    def sample(self, name: str) -> bytes:
        """One of `samples`. Raises RequestError if there is none, or it lies elsewhere."""
        folder = Path(self._scratch.name) if self.output is None else self._training / "samples"
        file = folder / name
        if name not in self.samples() or Path(os.path.realpath(file)) != Path(os.path.realpath(folder)) / name:
            raise RequestError(f"there is no sample {name!r}", status=404)
        return read_bytes(file, MAX_PICTURE)


def curves_in(file: Path) -> dict[str, list[tuple[int, float]]]:
    """The curves that a run has written down so far: (step, value), evenly thinned."""
    try:
        rows = list(rows_in(read_bytes(file, MAX_TEXT)))
    except (OSError, ValueError):
        return {}
    found = {name: [(row["step"], row[name]) for row in rows if is_number(row.get(name))] for name in CURVES}
    return {name: points[:: -(-len(points) // POINTS)] for name, points in found.items() if points}


def rows_in(content: bytes) -> Iterator[dict[str, Any]]:
    """Rows with their steps; what a stop has torn is left out."""
    for line in content.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and is_number(row.get("step")):
            yield row


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
