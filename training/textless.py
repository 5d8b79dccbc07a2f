"""Denoisers without text: what they are told of a caption, their UNet, and the pipelines that draw with them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latentdiff import pipelines
from latentdiff.interchange.folders import find_model, read_json
from latentdiff.models import IdentityAutoencoder, UNet2DModel
from latentdiff.pipelines import ClassConditionalPipeline, UnconditionalPipeline
from latentdiff.training.config import DenoiserSettings, DiffusionSettings
from latentdiff.training.data import CaptionedPicture
from latentdiff.training.diffusion_run import Parts
from latentdiff.training.inputs import Autoencoder, pixels_per_latent

TEXTLESS_KINDS = {
    "ClassConditionalPipeline": "ClassConditionalPipeline",
    "DDPMPipeline": "UnconditionalPipeline",
    "DDIMPipeline": "UnconditionalPipeline",
    "LDMPipeline": "UnconditionalPipeline",
}  # as saved, and as loaded


@dataclass
class ClassLabels:
    """Captions as classes: their numbers, () long. The empty one is no class, and has the number after the last."""

    numbers: Mapping[str, int]

    def __call__(self, caption: str) -> dict[str, Tensor]:
        """Raises ValueError for a class that is not known."""
        if caption and caption not in self.numbers:
            raise ValueError(f"there is a held-out picture of {caption!r}, of which no training picture is; remove it")
        return {"class_labels": torch.tensor(self.numbers.get(caption, len(self.numbers)))}


def nothing(caption: str) -> dict[str, Tensor]:
    """What a denoiser that is told nothing reads of a caption."""
    return {}


def class_names(pictures: Sequence[CaptionedPicture]) -> list[str]:
    """The classes of pictures whose captions they are, sorted; numbers by what they are.

    Raises:
        ValueError: a picture is of several classes, or of none, or all are of one.
    """
    for picture in pictures:
        if len(picture.captions) != 1 or not picture.captions[0]:
            raise ValueError(
                f"{picture.name}: a picture is of one class, and this is of {len(picture.captions)}; name the column "
                f"with the class by caption_column="
            )
    found = {picture.captions[0] for picture in pictures}
    names = sorted(found, key=int if all(name.isdecimal() for name in found) else None)
    if len(names) < 2:
        raise ValueError(f"all pictures are of the class {names[0]!r}; with condition=none no class is needed")
    return names


def labels_of(pipeline: Any, pictures: Sequence[CaptionedPicture]) -> list[int]:
    """Numbers of the pictures' classes, which are their captions.

    Raises:
        ValueError: the model does not know one of them.
    """
    labels = []
    for picture in pictures:
        try:
            labels += pipeline.label_numbers(picture.captions[0])
        except ValueError as error:
            raise ValueError(f"{picture.name}: {error}; name the column with the class by --caption-column") from error
    return labels


@dataclass
class TextlessParts(Parts):
    """With ``classes``, of a class-conditional pipeline, else of an unconditional one."""

    classes: Sequence[str] = ()

    def pipeline(self) -> Any:
        codec = None if is_pixels(self.vae) else self.vae
        if not self.classes:
            return UnconditionalPipeline(self.unet, self.scheduler, codec)
        names = dict(enumerate(self.classes))
        return ClassConditionalPipeline(self.unet, self.scheduler, codec, id2label=names)

    def draw(self, prompts: list[str], settings: DiffusionSettings, device: torch.device) -> list[Any]:
        if not self.classes:
            return self._pictures(device, settings, batch_size=16)
        return self._pictures(device, settings, prompts, guidance_scale=settings.sample_guidance_scale)


def is_pixels(autoencoder: Any) -> bool:
    """Whether latents are pixels in [-1, 1]."""
    return isinstance(autoencoder, IdentityAutoencoder) and autoencoder.config.scaling_factor == 1


def build_textless_unet(settings: DenoiserSettings, autoencoder: Autoencoder, classes: int) -> UNet2DModel:
    """A new UNet for the autoencoder's latents; with `classes`, one embedding more than there are, for none of them."""
    channels, kind = autoencoder.config.latent_channels, settings.resample_type
    plain = "DownBlock2D" if kind == "conv" else "ResnetDownsampleBlock2D"
    down = ["AttnDownBlock2D" if attends else plain for attends in settings.attention_levels]
    return UNet2DModel(
        sample_size=settings.resolution // pixels_per_latent(autoencoder),
        in_channels=channels,
        out_channels=channels * (2 if settings.learns_variance else 1),
        down_block_types=tuple(down),
        up_block_types=tuple(block.replace("Down", "Up").replace("downs", "ups") for block in reversed(down)),
        block_out_channels=settings.block_out_channels,
        layers_per_block=settings.layers_per_block,
        attention_head_dim=settings.attention_head_dim,
        norm_num_groups=settings.norm_num_groups,
        resnet_time_scale_shift=settings.resnet_time_scale_shift,
        downsample_type=kind,
        upsample_type=kind,
        num_class_embeds=classes + 1 if classes else None,
    )


def textless_kind(model: str) -> str | None:
    """The class of `latentdiff.pipelines` that loads a folder with a model without text; None: it holds another.

    Raises:
        FileNotFoundError: there is no pipeline folder, here or among the packaged models.
    """
    folder = find_model(model)
    if folder is None or not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"{model}: no pipeline folder; train one with 'latentdiff train denoiser'")
    return TEXTLESS_KINDS.get(str(read_json(folder / "model_index.json").get("_class_name")))


def load_textless(model: str, dtype: torch.dtype = torch.float32) -> ClassConditionalPipeline | UnconditionalPipeline:
    """A model without text, from its folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is conditioned by text.
    """
    kind = textless_kind(model)
    if kind is None:
        raise ValueError(
            f"{model} is no model without text, such as condition=class or none trains, and this needs one"
        )
    return getattr(pipelines, kind).from_pretrained(find_model(model), dtype=dtype)
