"""Trains the judge on distorted drawings of all icon sets but one; its score on that one is the ceiling."""

import itertools
import logging
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Generator, Tensor, nn

from .captions import Concept
from .colour import colour_name
from .distort import Distorter
from .drawings import Drawing, Job, on_white, render
from .grammar import says_colour
from .judge import SIZE, Judge, normalise, pretrained_network
from .measures import Figure, share

logger = logging.getLogger(__name__)

FEWEST = 3  # drawings to learn from that make a rarer thing a class
COMMON = 2.0  # concepts of this weight need only one


@dataclass(frozen=True)
class Drawings:
    """Real drawings: (N, H, W, 4) straight alpha, and of each its class and icon set."""

    rgba: NDArray[np.uint8]
    labels: NDArray[np.int64]
    sets: tuple[str, ...]
    classes: tuple[str, ...]

    def of(self, left_out: str, others: bool) -> "Drawings":
        """Those of the set `left_out`, or those of all others.

        Raises:
            ValueError: there are none.
        """
        chosen = [i for i, name in enumerate(self.sets) if (name != left_out) == others]
        if not chosen:
            raise ValueError(f"no drawings{' besides those' if others else ''} of the icon set {left_out!r}")
        return Drawings(self.rgba[chosen], self.labels[chosen], tuple(self.sets[i] for i in chosen), self.classes)


@dataclass(frozen=True)
class TrainingSettings:
    """`steps`, if given, are trained in whatever time they take: such a run repeats."""

    seconds: float = 1200.0
    steps: int | None = None
    batch_size: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 0.02
    smoothing: float = 0.1
    first_block: int = 3  # earlier blocks of the network keep the weights they come with
    seed: int = 0
    device: str = "cpu"


@dataclass(frozen=True)
class Score:
    """The shares of drawings whose thing is the judge's first guess, and among its first five."""

    first: Figure
    five: Figure

    def __str__(self) -> str:
        shares = [f"{100 * one.value:.1f} ± {100 * one.error:.1f} %" for one in (self.first, self.five)]
        return f"{shares[0]} at first guess, {shares[1]} within five, of {self.first.count} drawings"


def choose_classes(concepts: Mapping[str, Concept], hexcodes: Sequence[str]) -> tuple[str, ...]:
    """The hexcodes of the concepts that there are drawings enough to learn from; `hexcodes` has each drawing's."""
    count = Counter(hexcodes)
    return tuple(
        hexcode
        for hexcode, concept in concepts.items()
        if count[hexcode] >= FEWEST or (concept.weight >= COMMON and count[hexcode])
    )


def turnable_classes(concepts: Mapping[str, Concept], classes: Sequence[str]) -> Tensor:
    """(K,) whether a thing stays the same in another colour, which it does not when a name of it says one."""
    return torch.tensor([not any(map(says_colour, concepts[hexcode].names)) for hexcode in classes])


def plain_drawings(jobs: Sequence[Job], workers: int = 1) -> list[Drawing]:
    """The jobs drawn, without copies in other colours; those that draw nothing are left out."""
    if workers <= 1:
        return [drawing for drawing in map(plain_drawing, jobs) if drawing]
    with ProcessPoolExecutor(workers) as pool:
        return [drawing for drawing in pool.map(plain_drawing, jobs, chunksize=16) if drawing]


def plain_drawing(job: Job) -> Drawing | None:
    try:
        rgba = render(job.icon, SIZE)
    except ValueError as error:
        logger.warning("left out: %s %s: %s", job.set_name, job.concept.hexcode, error)
        return None
    colour = None if job.concept.flag == "n" else colour_name(rgba)
    return Drawing(job.set_name, job.style, job.concept, job.group, job.weight, job.split, colour, False, rgba)


def drawings_of(jobs: Sequence[Job], classes: Sequence[str], workers: int = 1) -> Drawings:
    """Those of `jobs` that are of a class, drawn.

    Raises:
        ValueError: there are none.
    """
    index = {hexcode: number for number, hexcode in enumerate(classes)}
    found = plain_drawings([job for job in jobs if job.concept.hexcode in index], workers)
    if not found:
        raise ValueError(f"none of {len(jobs)} drawings is of the judge's {len(classes)} classes")
    labels = np.array([index[drawing.concept.hexcode] for drawing in found])
    sets = tuple(drawing.set_name for drawing in found)
    return Drawings(np.stack([drawing.rgba for drawing in found]), labels, sets, tuple(classes))


def train_judge(
    jobs: Sequence[Job], concepts: Mapping[str, Concept], left_out: str, settings: TrainingSettings, workers: int = 1
) -> tuple[Judge, Score]:
    """A judge that has not seen the set `left_out`, and what it recognises of that set.

    Raises:
        ValueError: no drawings of that set, or none besides.
    """
    classes = choose_classes(concepts, [job.concept.hexcode for job in jobs if job.set_name != left_out])
    drawings = drawings_of(jobs, classes, workers)
    unseen, seen = drawings.of(left_out, others=False), drawings.of(left_out, others=True)
    trainer = Trainer(seen, turnable_classes(concepts, classes), settings)
    judge = Judge(trainer.train(), classes, left_out)
    return judge, score(judge, unseen)


def score(judge: Judge, drawings: Drawings) -> Score:
    """How well the judge knows drawings of its classes, on white."""
    opinions, _ = judge.look([on_white(rgba) for rgba in drawings.rgba])
    labels = torch.from_numpy(drawings.labels)[:, None]
    right = opinions.topk(min(5, opinions.shape[1])).indices == labels
    return Score(share(right[:, 0].tolist()), share(right.any(1).tolist()))


class Trainer:
    """Fine-tunes the network for a given time, the learning rate rising and falling with the time that has passed."""

    def __init__(self, drawings: Drawings, turnable: Tensor, settings: TrainingSettings) -> None:
        self.settings, self.device = settings, torch.device(settings.device)
        torch.manual_seed(settings.seed)  # of the new head
        self.network = pretrained_network(len(drawings.classes)).to(self.device).to(memory_format=torch.channels_last)
        self.drawings = torch.from_numpy(drawings.rgba).to(self.device)
        self.labels = torch.from_numpy(drawings.labels).to(self.device)
        self.turnable = turnable.to(self.device)
        self.distorter = Distorter(SIZE, settings.seed)
        self.generator = Generator().manual_seed(settings.seed)
        self.frozen = frozen_part(self.network, settings.first_block)
        decayed = [p for p in self.network.parameters() if p.requires_grad and p.ndim > 1]
        others = [p for p in self.network.parameters() if p.requires_grad and p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate)

    def train(self) -> nn.Module:
        losses: list[Tensor] = []
        for number, passed in enumerate(self.progress()):
            for group in self.optimizer.param_groups:
                group["lr"] = self.settings.learning_rate * warmed_cosine(passed)
            losses.append(self.step())
            if number % 50 == 49:
                loss = float(torch.stack(losses).mean())
                logger.info("step %d, %.0f%% done, loss %.3f", number + 1, 100 * passed, loss)
                losses = []
        return self.network

    def progress(self) -> Iterator[float]:
        """How much of the training is done, from 0 to 1, before each step."""
        start, steps = time.monotonic(), self.settings.steps
        for number in itertools.count():
            passed = (time.monotonic() - start) / self.settings.seconds if steps is None else number / steps
            if passed >= 1:
                return
            yield passed

    def step(self) -> Tensor:
        index = torch.randint(len(self.labels), (self.settings.batch_size,), generator=self.generator).to(self.device)
        labels = self.labels[index]
        with torch.no_grad():
            drawings = self.drawings[index].permute(0, 3, 1, 2).float() / 255  # (B, 4, H, W)
            pixels = normalise(self.distorter(drawings, self.turnable[labels]))
        self.network.train()
        for module in self.frozen:
            module.eval()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            logits = self.network(pixels.contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.settings.smoothing)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def frozen_part(network: nn.Module, first_block: int) -> list[nn.Module]:
    """The stem and the blocks before `first_block`, their weights fixed; nothing where it is 0."""
    if first_block == 0:
        return []
    modules: Any = network
    frozen = [modules.conv_stem, modules.bn1, *modules.blocks[:first_block]]
    for module in frozen:
        module.requires_grad_(False)
    return frozen


def warmed_cosine(passed: float, warmup: float = 0.05) -> float:
    """1 at the end of the warm-up, 0 at the end of the time."""
    if passed < warmup:
        return passed / warmup
    return 0.5 * (1 + math.cos(math.pi * (passed - warmup) / (1 - warmup)))
