"""From records to pictures: adapters loaded, source pictures found, batches drawn."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps

from latentdiff.interchange.fingerprint import file_digest
from latentdiff.interchange.pictures import read_picture
from latentdiff.interchange.png import image_grid
from latentdiff.pipelines.batch.options import GenerateOptions, defaults_of
from latentdiff.pipelines.batch.record import Batch, Embedding, Lora, Machine, Record, Settings, UsedFile
from latentdiff.pipelines.core.output import ImagesOutput
from latentdiff.pipelines.core.pictures import upright_rgb
from latentdiff.pipelines.core.previews import filmstrip


@dataclass(frozen=True)
class SourcePictures:
    """Pictures to draw from, as they are in their files: upright, RGB; the mask of one channel."""

    image: Image.Image | None = None
    mask: Image.Image | None = None

    def at(self, width: int, height: int) -> dict[str, Image.Image]:
        """As arguments of a call: brought to a size, cut at the edges where the shape differs."""
        named = {"image": self.image, "mask_image": self.mask}
        return {
            name: ImageOps.fit(one, (width, height), Image.Resampling.LANCZOS)
            for name, one in named.items()
            if one is not None
        }


def read_inputs(image: Path | None, mask: Path | None) -> tuple[SourcePictures, dict[str, Any]]:
    """Pictures to draw from, and what a record says of them.

    Raises:
        FileNotFoundError, ValueError: see `read_picture`; or picture and mask differ in size.
    """
    if mask is not None and image is None:
        raise ValueError(f"{mask}: a mask needs the picture that it is of")
    used: dict[str, Any] = {}
    found: dict[str, Image.Image] = {}
    for name, file in (("image", image), ("mask", mask)):
        if file is None:
            continue
        picture, digest = read_picture(file)
        found[name] = upright_rgb(picture)
        used[name] = UsedFile(file=str(file), sha256=digest)
    if "mask" in found:
        found["mask"] = found["mask"].convert("L")
        if found["mask"].size != found["image"].size:
            sizes = ["{} x {}".format(*found[name].size) for name in ("image", "mask")]
            raise ValueError(
                f"{image} has {sizes[0]} pixels and {mask} has {sizes[1]}; a mask must be as large as its picture"
            )
    return SourcePictures(**found), used


def input_size(
    image: Image.Image, width: int | None, height: int | None, usual: tuple[int, int], factor: int
) -> tuple[int, int]:
    """Width and height to draw from a picture at.

    Args:
        width, height: as asked for; if one is missing it is what keeps the picture's shape, if both are, the picture
            is brought to the area that the model was trained on.
        usual: that size, width and height.
        factor: that sides must be multiples of.
    """
    if width is not None and height is not None:
        return width, height
    if width is not None:
        scale = width / image.width
    elif height is not None:
        scale = height / image.height
    else:
        scale = (usual[0] * usual[1] / (image.width * image.height)) ** 0.5
    near = [max(1, round(side * scale / factor)) * factor for side in image.size]
    return near[0] if width is None else width, near[1] if height is None else height


def find_used(used: UsedFile, beside: Path) -> Path:
    """A file that a record names: where it says, or by its name in the folder `beside`.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is not what it was.
    """
    named = Path(used.file).expanduser()
    places = [named, beside / named.name]
    for place in places:
        if place.is_file() and file_digest(place) == used.sha256:
            return place
    if not any(place.is_file() for place in places):
        raise FileNotFoundError(
            f"{used.file}, which this picture was made with, is not there, nor beside the picture; put it back"
        )
    raise ValueError(f"{used.file} has changed since this picture was made with it; put the old one back")


def call_arguments(settings: Settings, batch: Batch, inputs: SourcePictures) -> dict[str, Any]:
    """What a pipeline is called with to draw `batch`."""
    usual = defaults_of(GenerateOptions)
    elsewhere = ("candidates", "reranker", "variation_strength", "height", "width")
    given = {name: getattr(settings, name) for name in usual if name not in elsewhere}
    arguments: dict[str, Any] = {
        "prompt": batch.prompts,
        "seed": batch.seeds,
        **{name: value for name, value in given.items() if value != usual[name]},
        **inputs.at(settings.width, settings.height),
    }
    if settings.image is None or settings.mask is not None:
        arguments |= {"height": settings.height, "width": settings.width}
    if batch.variation_seeds is not None:
        arguments |= {"variation_seed": batch.variation_seeds, "variation_strength": settings.variation_strength}
    return arguments


def draw_batch(pipeline: Any, settings: Settings, batch: Batch, inputs: SourcePictures) -> ImagesOutput:
    """The pictures of `batch`."""
    return pipeline(**call_arguments(settings, batch, inputs))


def draw_filmstrip(
    pipeline: Any, settings: Settings, batch: Batch, inputs: SourcePictures, frames: int
) -> tuple[Image.Image, ImagesOutput]:
    """The drawing of `batch` as one picture, a row for each of its pictures; and the pictures."""
    return filmstrip(pipeline.stream(**call_arguments(settings, batch, inputs)), frames)


def redraw(pipeline: Any, record: Record, inputs: SourcePictures) -> Image.Image:
    """What the file of `record` shows, drawn again."""
    if record.filmstrip is not None:
        return draw_filmstrip(pipeline, record, record.batches[0], inputs, record.filmstrip)[0]
    drawn = [draw_batch(pipeline, record, batch, inputs).images for batch in record.batches]
    return in_one([drawn[batch][number] for batch, number in record.pictures], record.columns)


def in_one(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """A single picture as it is, several as a grid."""
    return images[0] if len(images) == 1 else image_grid(images, columns)


def load_adapters(
    pipeline: Any, loras: Sequence[Lora], embeddings: Sequence[Embedding], beside: Path | None = None
) -> None:
    """Load LoRAs and new words into a pipeline.

    Args:
        beside: where else to look for their files, which then must be what they were.
    """
    for i, lora in enumerate(loras):
        file = Path(lora.file) if beside is None else find_used(lora, beside)
        pipeline.load_lora_weights(file, adapter_name=f"lora_{i}")
    if loras:
        pipeline.set_adapters([f"lora_{i}" for i in range(len(loras))], [lora.scale for lora in loras])
    for embedding in embeddings:
        file = Path(embedding.file) if beside is None else find_used(embedding, beside)
        pipeline.load_textual_inversion(file, token=embedding.word)


def this_machine(pipeline: Any) -> Machine:
    """Where `pipeline` draws."""
    device = pipeline.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return Machine(device=device.type, processor=name, threads=torch.get_num_threads(), torch=torch.__version__)
