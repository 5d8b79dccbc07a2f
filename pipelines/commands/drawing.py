"""What ``generate`` does once it knows what is wanted: plan batches, draw, choose, write."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer
from PIL import Image

from latentdiff.interchange.png import save_picture
from latentdiff.pipelines.batch.drawing import SourcePictures, draw_batch, draw_filmstrip, in_one, this_machine
from latentdiff.pipelines.batch.record import Batch, Record, Settings, record_of
from latentdiff.pipelines.commands.options import BATCH


@dataclass(frozen=True)
class Drawn:
    """A picture that is finished: which it is, (batch, number), and what is known of it."""

    image: Image.Image
    place: tuple[int, int]
    withheld: bool = False
    score: float | None = None


def plan_batches(prompts: Sequence[str], count: int, seed: int, variation_seed: int | None) -> list[Batch]:
    """`count` pictures of each prompt, a few to a batch.

    Picture i has ``seed + i``; variations all have ``seed``, and the i-th has ``variation_seed + i``.
    """
    pictures = [prompt for prompt in prompts for _ in range(count)]
    for first in (seed, variation_seed or 0):
        if first + len(pictures) > 2**63:
            raise ValueError(f"the seed {first} is too large: the last picture's must be below 2**63")
    batches = []
    for i in range(0, len(pictures), BATCH):
        part = pictures[i : i + BATCH]
        numbers = range(i, i + len(part))
        varied = variation_seed is not None
        batches.append(
            Batch(
                prompts=part,
                seeds=[seed if varied else seed + n for n in numbers],
                variation_seeds=[variation_seed + n for n in numbers] if variation_seed is not None else None,
            )
        )
    return batches


def draw_all(pipeline: Any, settings: Settings, batches: Sequence[Batch], inputs: SourcePictures) -> Iterator[Drawn]:
    """All pictures of `batches`, each as soon as its batch is finished."""
    for b, batch in enumerate(batches):
        output = draw_batch(pipeline, settings, batch, inputs)
        flags = output.nsfw_content_detected or [False] * len(output.images)
        for i, image in enumerate(output.images):
            yield Drawn(image, (b, i), bool(flags[i]))


def best_of_each(
    pictures: Iterator[Drawn], prompts: Sequence[str], keep: int, settings: Settings, device: Any
) -> Iterator[Drawn]:
    """Of the candidates of each prompt the `keep` best, best first, as soon as all of them are there.

    device: where they are compared.
    """
    from latentdiff.pipelines.core.candidates import best_of, load_reranker
    from latentdiff.text.weights import without_weights

    reranker = load_reranker(settings.reranker, device)
    assert settings.candidates is not None
    for prompt in prompts:
        candidates = [next(pictures) for _ in range(settings.candidates)]
        images = [one.image for one in candidates]
        caption = without_weights(prompt) if settings.prompt_weights else prompt
        withheld = [one.withheld for one in candidates]
        best, scores = best_of(images, [caption], settings.candidates, keep, reranker, withheld)
        for number, score in zip(best, scores, strict=True):
            one = candidates[number]
            yield Drawn(one.image, one.place, one.withheld, score)


@dataclass
class Writer:
    """Puts finished pictures into files: each into its own, or all into one.

    Args:
        files: one for each picture, or one for all.
        digest: of the model; asked for when the first file is written.
    """

    pipeline: Any
    settings: Settings
    batches: Sequence[Batch]
    files: Sequence[Path]
    columns: int
    digest: Callable[[], str]
    drawn: list[Drawn] = field(default_factory=list)
    written: list[Path] = field(default_factory=list)

    def add(self, one: Drawn) -> None:
        self.drawn.append(one)
        if len(self.files) > 1:
            self._write([one], self.files[len(self.drawn) - 1])

    def finish(self) -> None:
        """Write what belongs together; after a stop, as much of it as there is."""
        if len(self.files) == 1 and self.drawn:
            self._write(self.drawn, self.files[0])

    def _write(self, drawn: Sequence[Drawn], file: Path) -> None:
        columns = min(self.columns, len(drawn))
        save_picture(in_one([one.image for one in drawn], columns), file, self.record(drawn, columns=columns).dump())
        self.written.append(file)

    def record(self, drawn: Sequence[Drawn], **more: Any) -> Record:
        scores = [one.score for one in drawn if one.score is not None]
        return record_of(
            self.settings.model_copy(update={"model_digest": self.digest()}),
            self.batches,
            [one.place for one in drawn],
            this_machine(self.pipeline),
            scores=scores or None,
            withheld=[i for i, one in enumerate(drawn) if one.withheld],
            **more,
        )

    def report(self) -> None:
        """Say what is special about a picture: its score, or that it was withheld."""
        single = len(self.files) > 1 or len(self.drawn) == 1
        for i, one in enumerate(self.drawn):
            file = self.files[i if len(self.files) > 1 else 0]
            name = str(file) if single else f"picture {i + 1} in {file}"
            if one.score is not None:
                typer.echo(f"{name}: CLIP score {one.score:.1f}, seed {self.seed_of(one)}")
            if one.withheld:
                typer.echo(f"{name}: withheld by the model's safety checker; it is black", err=True)

    def seed_of(self, one: Drawn) -> int:
        batch, number = one.place
        seeds = self.batches[batch].variation_seeds or self.batches[batch].seeds
        return seeds[number]


def draw_with_filmstrip(writer: Writer, inputs: SourcePictures, file: Path, frames: int) -> list[Drawn]:
    """The pictures of the only batch, and a filmstrip of their drawing in `file`."""
    strip, output = draw_filmstrip(writer.pipeline, writer.settings, writer.batches[0], inputs, frames)
    flags = output.nsfw_content_detected or [False] * len(output.images)
    drawn = [Drawn(image, (0, i), bool(flags[i])) for i, image in enumerate(output.images)]
    save_picture(strip, file, writer.record(drawn, filmstrip=frames).dump())
    return drawn
