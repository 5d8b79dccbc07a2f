"""``--refiner``: a second model of SDXL (Podell et al. 2023, Sec. 2.5), which goes on with the first one's latents."""

from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from latentdiff.pipelines.batch.drawing_options import RefinerOptions
from latentdiff.pipelines.commands.model_options import Device, Precision, load_pipeline
from latentdiff.pipelines.registry import kind_in
from latentdiff.pipelines.storage.places import find_place

DENOISING_END = 0.8
"""Where it goes on, if nobody says; the model was trained on the last fifth of the way from noise."""
IMAGE_TO_IMAGE = "SDXLImageToImagePipeline"

Options = TypeVar("Options", bound=RefinerOptions)


@dataclass(frozen=True)
class Refiner:
    """Where the second model is, its weights' variant, and its digest when that is known."""

    name: str
    place: Path
    variant: str | None
    digest: "Future[str]"

    @classmethod
    def at(cls, name: str, place: Path, variant: str | None) -> "Refiner":
        """Raises ValueError if it is no model of SDXL."""
        from latentdiff.interchange.fingerprint import digest_in_background

        if kind_in(place, ["image"]).name != IMAGE_TO_IMAGE:
            raise ValueError(f"--refiner: {name} is not a model of SDXL")
        return cls(name, place, variant, digest_in_background(place, variant))

    def join(
        self, pipeline: Any, device: Device, precision: Precision, scheduler: str | None = None, own: str | None = None
    ) -> None:
        """Load it, and let it draw the last steps of `pipeline`, with the same sampler and the same new words.

        Args:
            device, precision, scheduler: as of `pipeline`.
            own: device with its number, if `device` is not enough.

        Raises:
            ValueError: their latents differ, or it cannot learn the words.
        """
        loaded_as = (device, precision, scheduler, IMAGE_TO_IMAGE, own, self.variant)
        refiner: Any = load_pipeline(self.place, *loaded_as)
        refiner.set_progress_bar_config(**pipeline._progress_bar_config)
        for name in ("latent_channels", "scaling_factor"):
            ours, theirs = (one.vae.config[name] for one in (pipeline, refiner))
            if ours != theirs:
                raise ValueError(
                    f"--refiner: the latents of {self.name} have a {name} of {theirs}, and the model's {ours}; the "
                    f"refiner cannot go on with them"
                )
        try:
            refiner.learn_words(pipeline)
        except ValueError as error:
            raise ValueError(f"--refiner: {self.name} cannot learn the new words of the model: {error}") from None
        sampler = type(pipeline.scheduler)
        if type(refiner.scheduler) is not sampler:
            refiner.scheduler = sampler.from_config(refiner.scheduler.config)
        pipeline.refiner = refiner


def find_refiner(drawing: Options, variant: str | None, other: Path | None = None) -> tuple[Refiner | None, Options]:
    """The refiner that a command asks for; and the command's options, with where the refiner goes on.

    Args:
        variant: of both models' weight files.
        other: a mask or a filmstrip.

    Raises:
        FileNotFoundError, ValueError: it is not there, is none, or is not for what is asked for besides.
    """
    if drawing.refiner is None:
        if drawing.denoising_end is not None:
            raise ValueError("--denoising-end needs --refiner, the model that draws the rest")
        return None, drawing
    if other is not None:
        raise ValueError(f"--refiner draws whole pictures, without --mask and --filmstrip; leave one out ({other})")
    refiner = Refiner.at(drawing.refiner, find_place(drawing.refiner, variant), variant)
    return refiner, drawing.model_copy(update={"denoising_end": drawing.denoising_end or DENOISING_END})
