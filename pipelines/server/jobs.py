"""What a client asked for, and what it hears while it is drawn."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from latentdiff.pipelines.batch.draw import SourcePictures
from latentdiff.pipelines.batch.record import Drawn, Record, Settings


@dataclass(frozen=True)
class Preview:
    """What a picture looks like after a step."""

    number: int
    """Of the picture in its job."""
    step: int
    total: int
    image: Image.Image


@dataclass(frozen=True)
class Finished:
    """A picture that is done."""

    number: int
    drawn: Drawn
    record: Record


@dataclass(frozen=True)
class Failed:
    """The job's end, where it could not be drawn."""

    error: Exception


Event = Preview | Finished | Failed


@dataclass(eq=False)
class Job:
    """Pictures of one prompt, with seeds of their own.

    Args:
        kind: name of the class that draws it.
        previews: how many steps to show of each picture; the steps are evenly spread.
        listener: is told of every event, in the drawing thread.
        deadline: when nobody waits any more, by `time.monotonic`.
        clip: the CLIP model that compares its pictures with the prompt; None: they are not compared.
    """

    kind: str
    settings: Settings
    prompt: str
    seeds: list[int]
    listener: Callable[[Event], None]
    inputs: SourcePictures = field(default_factory=SourcePictures)
    previews: int = 0
    deadline: float = float("inf")
    clip: str | None = None
    remarks: list[str] = field(default_factory=list)
    """What its client is told besides: that it draws hardly as it was meant."""
    begun: int = 0
    """Pictures that were given to a batch."""
    _cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Nobody waits for it any more; a batch of which that is true of all is stopped after the step."""
        self._cancelled.set()

    @property
    def unwanted(self) -> bool:
        return self._cancelled.is_set() or time.monotonic() > self.deadline

    def fits(self, other: "Job") -> bool:
        """Whether the two can be drawn in one call: all is the same but prompts, seeds and what they start from."""
        return self is other or (self.kind == other.kind and shape_of(self.settings) == shape_of(other.settings))


def shape_of(settings: Settings) -> tuple[Any, ...]:
    """What has to be the same within a batch; negative prompts and pictures may differ, where there are any."""
    own = {"negative_prompt": None, "image": None, "mask": None, "cut": False}
    there = (settings.negative_prompt is None, settings.image is None, settings.mask is None)
    return *there, settings.model_copy(update=own)


@dataclass(frozen=True)
class Row:
    """A picture in a batch: which one of which job."""

    job: Job
    number: int
