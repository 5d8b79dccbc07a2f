"""From settings and records to pictures: source pictures found, adapters loaded, batches planned and drawn."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageOps
from pydantic import ValidationError

from latentdiff import __version__
from latentdiff.interchange.fingerprint import file_digest
from latentdiff.interchange.picture_files import read_picture
from latentdiff.interchange.png import image_grid, save_picture
from latentdiff.pipelines.batch.drawing_options import GenerateOptions, defaults_of, first_problem
from latentdiff.pipelines.batch.record import (
    Batch,
    Drawn,
    Embedding,
    Lora,
    Machine,
    Record,
    Settings,
    UsedFile,
    record_of,
)

if TYPE_CHECKING:
    from latentdiff.pipelines.core.output import ImagesOutput
    from latentdiff.pipelines.storage.loras import LoadedLora


@dataclass(frozen=True)
class SourcePictures:
    """Pictures to draw from, as they are in their files: upright, RGB; the mask of one channel."""

    image: Image.Image | None = None
    mask: Image.Image | None = None

    def at(self, width: int, height: int, cut: bool = False) -> dict[str, Image.Image]:
        """As arguments of a call: brought to a size, cut at the edges where the shape differs.

        cut: they keep their size but for what is cut off.
        """
        named = {"image": self.image, "mask_image": self.mask}
        there = {name: one for name, one in named.items() if one is not None}
        if not cut:
            return {name: ImageOps.fit(one, (width, height), Image.Resampling.LANCZOS) for name, one in there.items()}
        boxes = {name: ((one.width - width) // 2, (one.height - height) // 2) for name, one in there.items()}
        return {name: there[name].crop((x, y, x + width, y + height)) for name, (x, y) in boxes.items()}


def read_inputs(image: Path | None, mask: Path | None) -> tuple[SourcePictures, dict[str, UsedFile]]:
    """Pictures to draw from, and what a record says of them.

    Raises:
        FileNotFoundError, ValueError: see `read_picture`; or picture and mask differ in size.
    """
    if mask is not None and image is None:
        raise ValueError(f"{mask}: a mask needs the picture that it is of")
    used: dict[str, UsedFile] = {}
    found: dict[str, Any] = {}
    for name, file in (("image", image), ("mask", mask)):
        if file is not None:
            picture, digest = read_picture(file)
            found[name] = picture
            used[name] = UsedFile(file=str(file), sha256=digest)
    return paired(found, {name: one.file for name, one in used.items()}), used


def paired(found: Mapping[str, Image.Image], names: Mapping[str, str]) -> SourcePictures:
    """Pictures as they are in their files, ``image`` and perhaps its ``mask``, made upright.

    Args:
        names: how messages name them.

    Raises:
        ValueError: they differ in size.
    """
    if not found:
        return SourcePictures()
    from latentdiff.pipelines.core.input_pictures import upright_pair, upright_rgb

    image, mask = upright_pair(found["image"], found.get("mask"))
    if mask is not None:
        mask = upright_rgb(mask).convert("L")
        if mask.size != image.size:
            sizes = ["{} x {}".format(*one.size) for one in (image, mask)]
            raise ValueError(
                f"{names['image']} has {sizes[0]} pixels and {names['mask']} has {sizes[1]}; a mask must be as large "
                f"as its picture"
            )
    return SourcePictures(image, mask)


def settings_of(
    pipeline: Any, model: str, asked: Mapping[str, Any], inputs: SourcePictures = SourcePictures()
) -> Settings:
    """The settings of pictures: what was asked for, and the model's own where nothing was.

    Args:
        model: its name, for the record.
        asked: fields of `Settings`; None is as if it were not there.

    Raises:
        ValueError: an unknown name or a value that cannot be used.
    """
    given = {name: value for name, value in asked.items() if value is not None}
    if inputs.image is not None:
        placed = pipeline.placement(inputs.image, given.get("height"), given.get("width"))
        given |= {"width": placed.width, "height": placed.height}
        given["cut"] = placed.enlarged == 1.0 and inputs.image.size != (placed.width, placed.height)
        takes = inspect.signature(type(pipeline).__call__).parameters
        if "strength" in takes:
            given.setdefault("strength", takes["strength"].default)
    height, width = pipeline.picture_size(given.get("height"), given.get("width"))
    runtime = getattr(pipeline.unet, "runtime", None)
    values = {
        "negative_prompt": None,
        "guidance_scale": None,
        **pipeline.defaults,
        **given,
        "model": model,
        "scheduler": type(pipeline.scheduler).__name__,
        "precision": str(pipeline.unet.dtype).removeprefix("torch.") if runtime is None else runtime.precision,
        "runtime": None if runtime is None else runtime.name,
        "height": height,
        "width": width,
        "version": __version__,
    }
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise ValueError(first_problem(error)) from None


def plan_batches(prompts: Sequence[str], count: int, seed: int, variation_seed: int | None, size: int) -> list[Batch]:
    """`count` pictures of each prompt, `size` to a batch.

    Picture i has ``seed + i``; variations all have ``seed``, and the i-th has ``variation_seed + i``.

    Raises:
        ValueError: the seeds would become too large.
    """
    pictures = [prompt for prompt in prompts for _ in range(count)]
    for first in (seed, variation_seed or 0):
        check_seeds(first, len(pictures))
    batches = []
    for i in range(0, len(pictures), size):
        part = pictures[i : i + size]
        numbers = range(i, i + len(part))
        if variation_seed is None:
            batches.append(Batch(prompts=part, seeds=[seed + n for n in numbers]))
        else:
            varied = [variation_seed + n for n in numbers]
            batches.append(Batch(prompts=part, seeds=[seed] * len(part), variation_seeds=varied))
    return batches


def check_seeds(first: int, count: int) -> None:
    """Raises ValueError unless the seeds of `count` pictures, from `first` on, can all be seeds."""
    if first < 0:
        raise ValueError(f"a seed is a whole number from 0, not {first}")
    if first + count > 2**63:
        raise ValueError(f"the seed {first} is too large: the last picture's must be below 2**63")


def call_arguments(pipeline: Any, settings: Settings, batch: Batch, inputs: SourcePictures) -> dict[str, Any]:
    """What a pipeline is called with to draw `batch`, whose prompts are classes, or nothing, where it has no text."""
    takes = inspect.signature(type(pipeline).__call__).parameters
    items: dict[str, Any] = {"batch_size": len(batch.prompts)}
    if "class_labels" in takes:
        items = {"class_labels": batch.prompts}
    elif "batch_size" not in takes:
        items = {"prompt": batch.prompts}
    usual = defaults_of(GenerateOptions)
    elsewhere = ["candidates", "reranker", "variation_strength", "height", "width", "refiner"]
    if not getattr(pipeline, "takes_scores", False):
        elsewhere += ["aesthetic_score", "negative_aesthetic_score"]
    given = {name: getattr(settings, name) for name in usual if name not in elsewhere}
    arguments: dict[str, Any] = {
        **items,
        "seed": batch.seeds,
        **{name: value for name, value in given.items() if value != usual[name]},
        **inputs.at(settings.width, settings.height, settings.cut),
    }
    if "height" in takes:
        arguments |= {"height": settings.height, "width": settings.width}
    if batch.variation_seeds is not None:
        arguments |= {"variation_seed": batch.variation_seeds, "variation_strength": settings.variation_strength}
    return arguments


def draw_batch(pipeline: Any, settings: Settings, batch: Batch, inputs: SourcePictures, number: int = 0) -> list[Drawn]:
    """The pictures of `batch`, which is the batch with this `number`; a refiner, if there is one, ends them."""
    arguments = call_arguments(pipeline, settings, batch, inputs)
    if settings.refiner is None:
        return drawn_of(pipeline(**arguments), number)
    latents = pipeline(**arguments, output_type="latent").images
    refiner = refiner_of(pipeline, settings)
    return drawn_of(refiner(**refined_arguments(refiner, settings, batch), image=latents), number)


def refiner_of(pipeline: Any, settings: Settings) -> Any:
    """Raises ValueError if there is none."""
    if (refiner := getattr(pipeline, "refiner", None)) is None:
        raise ValueError(
            f"the pipeline has no refiner, and {settings.refiner} should draw the last steps; set .refiner"
        )
    if unknown := refiner.unknown_words(pipeline):
        raise ValueError(
            f"the pipeline was taught {', '.join(unknown)}, and its refiner was not; refiner.learn_words(pipeline) "
            f"teaches it"
        )
    return refiner


def refined_arguments(refiner: Any, settings: Settings, batch: Batch) -> dict[str, Any]:
    """What a refiner is called with besides the latents, ``image``, to end what another model began."""
    refined = call_arguments(refiner, settings, batch, SourcePictures())
    for name in ("height", "width", "strength", "denoising_end", "variation_seed", "variation_strength"):
        refined.pop(name, None)
    if refiner.text_encoder is None:
        refined = {name: value for name, value in refined.items() if not name.endswith("prompt_2")}
    return {**refined, "denoising_start": settings.denoising_end}


def draw_filmstrip(
    pipeline: Any, settings: Settings, batch: Batch, inputs: SourcePictures, frames: int
) -> tuple[Image.Image, list[Drawn]]:
    """The drawing of `batch` as one picture, a row for each of its pictures; and the pictures."""
    from latentdiff.pipelines.core.previews import filmstrip

    strip, output = filmstrip(pipeline.stream(**call_arguments(pipeline, settings, batch, inputs)), frames)
    return strip, drawn_of(output, 0)


def drawn_of(output: "ImagesOutput", batch: int) -> list[Drawn]:
    """What a call gave, picture by picture."""
    withheld = output.nsfw_content_detected or [False] * len(output.images)
    spoilt = output.nan_detected or [False] * len(output.images)
    return [Drawn(image, (batch, i), bool(withheld[i]), spoilt[i]) for i, image in enumerate(output.images)]


@dataclass
class PictureWriter:
    """Puts finished pictures into files: each into its own, or all into one. Files of spoilt ones are not written.

    Args:
        files: one for each picture, or one for all.
        columns: of the grid, where there is one file for all.
        digest, refiner_digest: of the models; asked for when the first file is written.
    """

    pipeline: Any
    settings: Settings
    batches: Sequence[Batch]
    files: Sequence[Path]
    columns: int
    digest: Callable[[], str]
    refiner_digest: Callable[[], str] | None = None
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
        if all(one.spoilt for one in drawn):
            return
        columns = min(self.columns, len(drawn))
        save_picture(in_one([one.image for one in drawn], columns), file, self.record(drawn, columns=columns).dump())
        self.written.append(file)

    def record(self, drawn: Sequence[Drawn], **more: Any) -> Record:
        """Of a file with these pictures; `more` as in `record_of`."""
        refiner = None if self.refiner_digest is None else self.refiner_digest()
        settings = self.settings.model_copy(update={"model_digest": self.digest(), "refiner_digest": refiner})
        return record_of(settings, self.batches, drawn, this_machine(self.pipeline), **more)

    def seed_of(self, one: Drawn) -> int:
        batch, number = one.place
        return (self.batches[batch].variation_seeds or self.batches[batch].seeds)[number]

    def name_of(self, number: int) -> str:
        """How to call the picture with this number among those that are drawn."""
        if len(self.files) > 1:
            return str(self.files[number])
        return f"picture {number + 1} in {self.files[0]}" if len(self.drawn) > 1 else str(self.files[0])


def redraw(pipeline: Any, record: Record, inputs: SourcePictures) -> Image.Image:
    """What the file of `record` shows, drawn again."""
    if record.filmstrip is not None:
        return draw_filmstrip(pipeline, record, record.batches[0], inputs, record.filmstrip)[0]
    drawn = [draw_batch(pipeline, record, batch, inputs) for batch in record.batches]
    return in_one([drawn[batch][number].image for batch, number in record.pictures], record.columns)


def in_one(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """A single picture as it is, several as a grid."""
    return images[0] if len(images) == 1 else image_grid(images, columns)


def load_adapters(
    pipeline: Any, loras: Sequence[Lora], embeddings: Sequence[Embedding], beside: Path | None = None
) -> "list[LoadedLora]":
    """Load LoRAs and new words into a pipeline; what became of each LoRA.

    Args:
        beside: where else to look for their files, which then must be what they were.
    """
    loaded = []
    for i, lora in enumerate(loras):
        file = Path(lora.file) if beside is None else find_used(lora, beside)
        loaded.append(pipeline.load_lora_weights(file, adapter_name=f"lora_{i}"))
    if loras:
        pipeline.set_adapters([f"lora_{i}" for i in range(len(loras))], [lora.scale for lora in loras])
    for embedding in embeddings:
        file = Path(embedding.file) if beside is None else find_used(embedding, beside)
        pipeline.load_textual_inversion(file, token=embedding.word)
    return loaded


def find_used(used: UsedFile, beside: Path) -> Path:
    """A file that a record names: where it says, or by its name in the folder `beside`.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is not what it was.
    """
    named = Path(used.file).expanduser()
    places = [place for place in (named, beside / named.name) if place.is_file()]
    for place in places:
        if file_digest(place) == used.sha256:
            return place
    if not places:
        raise FileNotFoundError(
            f"{used.file}, which this picture was made with, is not there, nor beside the picture; put it back"
        )
    raise ValueError(f"{used.file} has changed since this picture was made with it; put the old one back")


def this_machine(pipeline: Any) -> Machine:
    """Where `pipeline` draws."""
    if isinstance(known := getattr(pipeline, "machine", None), Machine):
        return known
    import torch

    device = pipeline.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return Machine(device=device.type, processor=name, threads=torch.get_num_threads(), torch=torch.__version__)
