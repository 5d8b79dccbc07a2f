"""Which kinds of pipeline there are: one row for each.

Everything that chooses a kind, loading, conversion, single files, export, the command line, evaluation, looks here. A
kind that lives elsewhere is made known by `register`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from latentdiff.imports import load_module
from latentdiff.interchange.folders import read_json
from latentdiff.interchange.packed import header_names, packed_index

DEFAULTS: dict[str, Any] = {"num_inference_steps": 50, "guidance_scale": 7.5}
"""Of a call, where neither the caller nor the model says otherwise; those of diffusers' StableDiffusionPipeline."""

LONGEST_SIDE = 65536
"""Pixels; a UNet may be told no longer one."""

DEFAULTS_KEY = "_generation_defaults"
"""The model's own, in its model_index.json; diffusers ignores keys that begin with _."""

Conditions = Literal["text", "picture", "class", "none"]


@dataclass(frozen=True)
class Kind:
    """One kind of pipeline. Nothing is imported before `load`."""

    name: str
    """Of its class."""
    module: str
    """Where the class is."""
    saved_as: tuple[str, ...]
    """``_class_name`` in the folders that it loads; the first is the usual one."""
    conditioned_by: Conditions
    further_channels: tuple[Literal["none", "picture", "mask and latents"], ...] = ("none",)
    """What its UNet may take besides the latents' channels."""
    pictures: tuple[str, ...] = ()
    """Arguments of a call that are pictures."""
    interchangeable: bool = False
    """Whether its folders are drawn from as other interchangeable kinds too, where other pictures are given: they have
    the same components."""
    family: str = "Stable Diffusion"
    """Kinds of one family are interchangeable with each other only."""
    single_file: bool = False
    """Whether it is loaded from single files too."""
    converted: bool = False
    """Whether Stable Diffusion's single files can hold it; other kinds are written in a layout of our own."""
    onnx: str | None = None
    """diffusers' class for it in ONNX."""
    draws_codes: bool = False
    """Whether it draws an autoencoder's codes by a transformer, and not by diffusion."""

    def load(self) -> Any:
        """The class."""
        return getattr(load_module(self.module), self.name)

    def fits(self, unet_channels: int, latent_channels: int) -> bool:
        """Whether a UNet with this many input channels is for such a pipeline."""
        sizes = {"none": 0, "picture": 3, "mask and latents": 1 + latent_channels}
        return unet_channels - latent_channels in [sizes[further] for further in self.further_channels]


TASKS = "latentdiff.pipelines.tasks"
LIKE_STABLE_DIFFUSION: dict[str, Any] = {"interchangeable": True, "single_file": True, "converted": True}
LIKE_SDXL: dict[str, Any] = {"interchangeable": True, "family": "SDXL", "single_file": True}
OF_CODES: dict[str, Any] = {"interchangeable": True, "family": "codes", "draws_codes": True}
LIKE_PIXART: dict[str, Any] = {"interchangeable": True, "family": "PixArt", "single_file": True}
PIXART = ("PixArtAlphaPipeline",)
KINDS: list[Kind] = [
    Kind(
        "TextToImagePipeline",
        f"{TASKS}.text_to_image",
        ("StableDiffusionPipeline",),
        "text",
        onnx="OnnxStableDiffusionPipeline",
        **LIKE_STABLE_DIFFUSION,
    ),
    Kind(
        "ImageToImagePipeline",
        f"{TASKS}.image_to_image",
        ("StableDiffusionImg2ImgPipeline",),
        "text",
        pictures=("image",),
        onnx="OnnxStableDiffusionImg2ImgPipeline",
        **LIKE_STABLE_DIFFUSION,
    ),
    Kind(
        "InpaintPipeline",
        f"{TASKS}.inpaint",
        ("StableDiffusionInpaintPipeline",),
        "text",
        further_channels=("none", "mask and latents"),
        pictures=("image", "mask_image"),
        onnx="OnnxStableDiffusionInpaintPipeline",
        **LIKE_STABLE_DIFFUSION,
    ),
    Kind(
        "SuperResolutionPipeline",
        f"{TASKS}.super_resolution",
        ("StableDiffusionUpscalePipeline",),
        "text",
        further_channels=("picture",),
        pictures=("image",),
        single_file=True,
        converted=True,
    ),
    Kind(
        "ImageVariationPipeline",
        f"{TASKS}.variations",
        ("StableDiffusionImageVariationPipeline",),
        "picture",
        pictures=("image",),
        converted=True,
    ),
    Kind("SDXLTextToImagePipeline", f"{TASKS}.sdxl", ("StableDiffusionXLPipeline",), "text", **LIKE_SDXL),
    Kind(
        "SDXLImageToImagePipeline",
        f"{TASKS}.sdxl",
        ("StableDiffusionXLImg2ImgPipeline",),
        "text",
        pictures=("image",),
        **LIKE_SDXL,
    ),
    Kind(
        "SDXLInpaintPipeline",
        f"{TASKS}.sdxl",
        ("StableDiffusionXLInpaintPipeline",),
        "text",
        further_channels=("none", "mask and latents"),
        pictures=("image", "mask_image"),
        **LIKE_SDXL,
    ),
    Kind("PixArtTextToImagePipeline", f"{TASKS}.pixart", PIXART, "text", **LIKE_PIXART),
    Kind("PixArtImageToImagePipeline", f"{TASKS}.pixart", PIXART, "text", pictures=("image",), **LIKE_PIXART),
    Kind("PixArtInpaintPipeline", f"{TASKS}.pixart", PIXART, "text", pictures=("image", "mask_image"), **LIKE_PIXART),
    Kind("ClassConditionalPipeline", f"{TASKS}.class_conditional", ("ClassConditionalPipeline",), "class"),
    Kind("TokenPipeline", f"{TASKS}.tokens", ("TokenPipeline",), "text", **OF_CODES),
    Kind(
        "TokenInpaintPipeline",
        f"{TASKS}.tokens_inpaint",
        ("TokenInpaintPipeline",),
        "text",
        pictures=("image", "mask_image"),
        **OF_CODES,
    ),
    Kind("ClassTokenPipeline", f"{TASKS}.tokens_textless", ("ClassTokenPipeline",), "class", draws_codes=True),
    Kind(
        "UnconditionalTokenPipeline",
        f"{TASKS}.tokens_textless",
        ("UnconditionalTokenPipeline",),
        "none",
        draws_codes=True,
    ),
    Kind("DiTPipeline", f"{TASKS}.dit", ("DiTPipeline",), "class", family="DiT"),
    Kind("UnconditionalPipeline", f"{TASKS}.unconditional", ("DDPMPipeline", "DDIMPipeline", "LDMPipeline"), "none"),
]


def register(kind: Kind) -> None:
    """Make a kind known; one of the same name is replaced."""
    KINDS[:] = [one for one in KINDS if one.name != kind.name] + [kind]


def find_kind(name: str) -> Kind:
    """The kind whose class has this name.

    Raises:
        ValueError: there is none; the message lists them.
    """
    for kind in KINDS:
        if kind.name == name:
            return kind
    raise ValueError(f"there is no pipeline {name!r}; there are {', '.join(kind.name for kind in KINDS)}")


def kind_saved_as(class_name: str) -> Kind | None:
    """The kind that loads folders with this ``_class_name``."""
    return next((kind for kind in KINDS if class_name in kind.saved_as), None)


def kind_of_family(class_name: str, saved_as: object) -> Kind | None:
    """The kind that does for folders of another family what the class of that name does for its own.

    Args:
        saved_as: ``_class_name`` in the folder.

    Returns:
        None if both are of one family, or either is in none.
    """
    own = next((kind for kind in KINDS if kind.name == class_name), None) or kind_saved_as(class_name)
    theirs = kind_saved_as(str(saved_as))
    if own is None or theirs is None or own.family == theirs.family:
        return None
    if own.conditioned_by == theirs.conditioned_by == "class":
        return theirs
    if not (own.interchangeable and theirs.interchangeable):
        return None
    alike = (kind for kind in KINDS if kind.family == theirs.family and kind.interchangeable)
    return next((kind for kind in alike if kind.pictures == own.pictures), None)


def kind_taking(pictures: Iterable[str], saved_as: str | None = None, shown: Mapping[str, str] | None = None) -> Kind:
    """The kind with a prompt whose call takes exactly these pictures: that of a folder, or one that reads its folders.

    Args:
        saved_as: ``_class_name`` in the folder; None: there is none.
        shown: how messages call pictures that they do not call as a call's arguments.

    Raises:
        ValueError: the folder's kind takes other pictures, and no other kind stands for it; or no kind is called so,
            nor any of diffusers' pipelines.
    """
    wanted = set(pictures)
    own = None if saved_as is None else kind_saved_as(saved_as)
    if saved_as is not None and own is None:
        import diffusers

        if not hasattr(diffusers, saved_as):
            raise ValueError(
                f"the folder is of a {saved_as}, and there is no such kind of pipeline; if an extension has it, load "
                f"that with --extension before the command"
            )
    if own is not None and own.conditioned_by == "text":
        if set(own.pictures) == wanted:
            return own
        if not own.interchangeable:
            takes = named(own.pictures, shown) or "no picture"
            raise ValueError(
                f"a {own.name} takes {takes} besides the prompt, and {named(wanted, shown) or 'none'} was given"
            )
        relatives = [kind for kind in KINDS if kind.interchangeable and kind.family == own.family]
        if not any(set(kind.pictures) == wanted for kind in relatives):
            takes = " or with ".join(named(kind.pictures, shown) or "no picture" for kind in relatives)
            missing = next((set(kind.pictures) - wanted for kind in relatives if wanted < set(kind.pictures)), set())
            more = f"; give {named(missing, shown)} too" if missing else ""
            raise ValueError(f"a {own.name} draws with {takes}, and {named(wanted, shown)} was given{more}")
    fitting = [kind for kind in KINDS if kind.conditioned_by == "text" and set(kind.pictures) == wanted]
    family = KINDS[0].family if own is None else own.family
    return next((kind for kind in fitting if kind.interchangeable and kind.family == family), fitting[0])


def named(pictures: Iterable[str], shown: Mapping[str, str] | None) -> str:
    return " and ".join((shown or {}).get(one, one) for one in sorted(pictures))


def kind_in(
    place: Path, pictures: Iterable[str] = (), textless: bool = False, shown: Mapping[str, str] | None = None
) -> Kind:
    """The kind that draws with a prompt and these pictures from a folder, or from a single file.

    Args:
        textless: take a folder's kind without a prompt too, if there are no pictures.
        shown: how messages call pictures that they do not call as a call's arguments.

    Raises:
        ValueError: see `kind_taking`; the message names the folder.
    """
    file = place / "model_index.json"
    index = (packed_index(place) if place.is_file() else read_json(file) if file.is_file() else None) or {}
    saved_as = index.get("_class_name")
    own = kind_saved_as(saved_as) if textless and isinstance(saved_as, str) else None
    if own is not None and own.conditioned_by in ("class", "none"):
        if pictures:
            raise ValueError(f"{place}: a {own.name} draws without text, and starts from no picture")
        return own
    if not index and place.is_file() and holds_sdxl(place):
        saved_as = "StableDiffusionXLPipeline"
    try:
        return kind_taking(pictures, saved_as if isinstance(saved_as, str) else None, shown)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


def holds_sdxl(file: Path) -> bool:
    """Whether a safetensors file is of Stable Diffusion XL, with the second text encoder that only it has, and its
    refiner has alone.
    """
    if file.suffix != ".safetensors":
        return False
    return any(
        name.startswith(("conditioner.embedders.1.", "conditioner.embedders.0.model.")) for name in header_names(file)
    )


def kinds_of_unet(unet_channels: int, latent_channels: int) -> list[Kind]:
    """The kinds in single files whose UNet takes this many channels."""
    known = [kind for kind in KINDS if kind.single_file and kind.converted]
    return [kind for kind in known if kind.fits(unet_channels, latent_channels)]
