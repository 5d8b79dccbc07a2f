"""How a picture was drawn, in plain values: what its file records, and all that is needed to draw it again."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from PIL import Image
from pydantic import Field, ValidationError, model_validator

from latentdiff.interchange.picture_files import read_picture
from latentdiff.interchange.png import KEY, settings_of
from latentdiff.pipelines.batch.drawing_options import BATCH, MOST, GenerateOptions, Plain, first_problem

Seed = Annotated[int, Field(ge=0, lt=2**63)]
Digest = Annotated[str, Field(pattern=r"^(weights:)?[0-9a-f]{64}$")]


class UsedFile(Plain):
    """A file that the user named, and what was in it."""

    file: str
    sha256: Digest


class Lora(UsedFile):
    """scale: how strongly it acts."""

    scale: float = Field(1.0, allow_inf_nan=False)


class Embedding(UsedFile):
    """word: that it was loaded as, where the file does not say."""

    word: str | None = None


class Batch(Plain):
    """What was drawn in one call. The last bits of a picture depend on the batch around it."""

    prompts: list[str] = Field(min_length=1, max_length=MOST)
    """Or classes, or empty ones, of models without text."""
    seeds: list[Seed]
    variation_seeds: list[Seed] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        others = [self.seeds] + ([] if self.variation_seeds is None else [self.variation_seeds])
        if any(len(seeds) != len(self.prompts) for seeds in others):
            raise ValueError("there must be a seed for each prompt")
        return self


class Machine(Plain):
    """Where it was drawn; the last bits may differ elsewhere."""

    device: str
    processor: str
    threads: int = Field(ge=1)
    torch: str


class Settings(GenerateOptions):
    """What was asked for, but for prompts and seeds; what the model decides is filled in."""

    negative_prompt: str | None = Field()
    num_inference_steps: int = Field(ge=1)
    guidance_scale: float | None = Field(allow_inf_nan=False)
    variation_strength: float = 0.0
    width: int = Field(ge=1)
    """Of one picture."""
    height: int = Field(ge=1)
    image: UsedFile | None = None
    mask: UsedFile | None = None
    cut: bool = False
    """Whether the picture keeps its size but for what is cut off at its edges; else it is enlarged or made smaller."""
    model: str
    model_digest: Digest | None = None
    refiner_digest: Digest | None = None
    variant: str | None = None
    loras: list[Lora] = Field([])
    embeddings: list[Embedding] = Field([])
    scheduler: str
    precision: Literal["float32", "bfloat16", "float16", "int8"]
    runtime: Literal["openvino", "onnx"] | None = None
    """What ran the networks; None: torch."""
    version: str

    @model_validator(mode="after")
    def _check_pictures(self) -> Self:
        if self.mask is not None and self.image is None:
            raise ValueError("there is a mask and no image, the picture that it is of")
        return self


class Record(Settings):
    """How the pictures in one file were drawn."""

    prompts: list[str]
    """Of the pictures, each once in a row."""
    count: int = Field(ge=1)
    """Pictures of each prompt."""
    seed: Seed
    """Of the first picture."""
    scores: list[float] | None = None
    """CLIP scores of the pictures, where they were chosen from candidates."""
    withheld: list[int] = Field([])
    """Pictures that the model's safety checker made black, counted from 0."""
    batches: list[Batch] = Field(min_length=1, max_length=MOST)
    pictures: list[tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]]] = Field(
        min_length=1, max_length=MOST
    )
    """Of each picture in the file, its batch and its number in it."""
    columns: int = Field(1, ge=1)
    """Of the grid, row by row, if there are several."""
    filmstrip: int | None = Field(None, ge=1, le=MOST)
    """How many steps are shown, if the file is a filmstrip."""
    machine: Machine

    @model_validator(mode="after")
    def _check(self) -> Self:
        for batch, number in self.pictures:
            if batch >= len(self.batches) or number >= len(self.batches[batch].prompts):
                raise ValueError(f"there is no picture {number} in a batch {batch}")
        drawn, most = sum(len(batch.prompts) for batch in self.batches), max(MOST, BATCH * len(self.pictures))
        if drawn > most:  # with the least of candidates, a batch for each picture
            raise ValueError(f"{drawn} pictures would have to be drawn for the {len(self.pictures)} in the file")
        return self

    def dump(self) -> dict[str, Any]:
        """For a picture file; what is as usual is left out."""
        return self.model_dump(mode="json", exclude_defaults=True)


@dataclass(frozen=True)
class Drawn:
    """A picture that is finished: which it is, (batch, number), and what is known of it."""

    image: Image.Image
    place: tuple[int, int]
    withheld: bool = False
    """Made black by the model's safety checker."""
    spoilt: bool = False
    """Black, since a network gave values that are not finite."""
    score: float | None = None
    """By which it was chosen from candidates."""


def record_of(
    settings: Settings, batches: Sequence[Batch], pictures: Sequence[Drawn], machine: Machine, **more: Any
) -> Record:
    """The record of a file with these `pictures`; batches that none of them is of are left out.

    Args:
        more: further fields of `Record`.
    """
    places = [one.place for one in pictures]
    used = sorted({batch for batch, _ in places})
    prompts = [batches[batch].prompts[number] for batch, number in places]
    once = list(dict.fromkeys(prompts))
    batch, number = places[0]
    values = {
        "prompts": once,
        "count": -(-len(prompts) // len(once)),
        "seed": batches[batch].seeds[number],
        "scores": [one.score for one in pictures if one.score is not None] or None,
        "withheld": [i for i, one in enumerate(pictures) if one.withheld],
        "batches": [batches[i].model_dump() for i in used],
        "pictures": [(used.index(batch), number) for batch, number in places],
        "machine": machine.model_dump(),
    }
    return Record.model_validate({**settings.model_dump(), **values, **more})


def read_record(file: Path) -> tuple[Image.Image, Record]:
    """A picture that was drawn by this program, and how.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no picture, or not one of ours, or what it says of itself cannot be used.
    """
    image, _ = read_picture(file)
    values = settings_of(image)
    if values is None:
        held = "settings that cannot be read" if KEY in image.info else "no settings of latentdiff in it"
        raise ValueError(
            f"{file} has {held}; only a PNG that latentdiff drew, and that no other program has saved since, can be "
            f"drawn again"
        )
    try:
        record = Record.model_validate(values)
    except ValidationError as error:
        version = values.get("version", "of an unknown version")
        raise ValueError(
            f"{file} was drawn by latentdiff {version}, whose settings this version cannot draw again: "
            f"{first_problem(error)}"
        ) from None
    rows = 1 if record.filmstrip else -(-len(record.pictures) // record.columns)
    columns = 1 if record.filmstrip else min(record.columns, len(record.pictures))
    if columns * record.width > image.width or rows * record.height > image.height:
        shown = f"{len(record.pictures)} pictures" if len(record.pictures) > 1 else "pictures"
        raise ValueError(
            f"{file} has {image.width} x {image.height} pixels, and says that it shows {shown} of {record.width} x "
            f"{record.height}; it was changed"
        )
    return image, record
