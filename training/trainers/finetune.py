"""Fine-tuning a pipeline on the user's pictures: all weights, LoRA, DreamBooth, textual inversion."""

import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed

from latentdiff.codec import Codec
from latentdiff.diffusion.flow import RectifiedFlow
from latentdiff.diffusion.process import Process, known_processes, process_from_config
from latentdiff.pipelines import DiTPipeline, PixArtTextToImagePipeline, TextToImagePipeline
from latentdiff.pipelines.core.pipeline import FEW_STEPS
from latentdiff.pipelines.distributed import processes
from latentdiff.pipelines.registry import find_kind, kind_in
from latentdiff.pipelines.storage.places import find_place, local_place, open_place
from latentdiff.pipelines.tasks.dit import TransformerPipeline
from latentdiff.pipelines.tasks.sdxl import SDXLTextToImagePipeline
from latentdiff.text import max_tokens
from latentdiff.training.card.kinds import ModelKind, class_conditional_kind, short_captions, text_to_image_kind
from latentdiff.training.loop.output_folder import open_output
from latentdiff.training.objectives.diffusion import DenoiserObjective
from latentdiff.training.settings import AdaptedSettings, FinetuneSettings
from latentdiff.training.starting_networks import freeze, made_by, without_dropout
from latentdiff.training.trainers.adapted_data import classes_of, load_pictures
from latentdiff.training.trainers.diffusion import Data, train_diffusion
from latentdiff.training.trainers.diffusion_models import DiTModel, PixArtModel, SDXLModel, TextModel
from latentdiff.training.trainers.dreambooth import draw_class_pictures, mix, of_subject
from latentdiff.training.trainers.lora import add_lora, lora_rank, save_and_merge
from latentdiff.training.trainers.textual_inversion import Expand, add_word, check_captions, save_word, settle

logger = logging.getLogger(__name__)

USED_BY = {
    "adapter": ("lora", "dreambooth"),
    "lora_rank": ("lora", "dreambooth"),
    "lora_alpha": ("lora", "dreambooth"),
    "lora_targets": ("lora", "dreambooth"),
    "train_text_encoder": ("full", "lora", "dreambooth"),
    "class_prompt": ("dreambooth",),
    "class_pictures": ("dreambooth",),
    "prior_loss_weight": ("dreambooth",),
    "placeholder_token": ("textual-inversion",),
    "initializer_token": ("textual-inversion",),
    "num_vectors": ("textual-inversion",),
}
"""Settings that not every method knows."""
UNDISTILLED = {"num_inference_steps": 25, "guidance_scale": 2.0}
"""How a model draws that was distilled to at most `FEW_STEPS` steps without guidance, once it has been fine-tuned."""

OF_FEW_STEPS = ("LCMScheduler", "TCDScheduler", "FlowMatchLCMScheduler")
"""Schedulers that draw with distilled models alone."""

FAMILIES = (SDXLTextToImagePipeline, PixArtTextToImagePipeline, DiTPipeline)
"""What is fine-tuned besides Stable Diffusion's kind."""

OF_TRANSFORMERS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
"""Layers of a transformer's blocks that a LoRA is in by default."""

Finish = Callable[[], None]
"""Prepares the pipeline for saving, and saves the files beside it."""


def finetune(settings: FinetuneSettings) -> Path:
    """Fine-tune a model, or go on with a run that ``settings.output`` holds.

    ``settings.output`` becomes a pipeline folder, with the LoRA (merged in) or the new word's embedding beside it in a
    file of its own. The model it starts from is not changed.

    Returns:
        ``settings.output``.

    Raises:
        ValueError, FileNotFoundError: settings, pictures or models that cannot be used, and what to do.
        OSError: the hub was asked for the model and cannot be reached.
    """
    check_method(settings)
    check_output(settings)
    open_output(settings, unsettled=settings.unsettled)
    pipeline = load_model(settings.model, FAMILIES)
    check_family(settings, pipeline)
    pipeline.set_progress_bar_config(disable=True)
    settings = complete(settings, pipeline)
    open_output(settings)
    if pipeline.guides_itself and settings.method != "textual-inversion":
        raise ValueError(
            f"{settings.model}: its UNet was distilled and takes the guidance scale as a condition, which fine-tuning "
            f"would unlearn; fine-tune the model that it was made from, then 'latentdiff distill' that"
        )
    if is_distilled(settings, pipeline):
        pipeline.register_defaults(**UNDISTILLED)
        if type(pipeline.scheduler).__name__ in OF_FEW_STEPS:
            pipeline.scheduler = process_from_config(pipeline.scheduler.config).scheduler()
        own = "%s draws in few steps without guidance; fine-tuned it takes %d steps with a guidance of %g"
        logger.info(own, settings.model, *UNDISTILLED.values())
    process = taught_process(settings, pipeline)
    freeze(pipeline.vae, *text_encoders(pipeline), pipeline.unet)
    data = load_pictures(settings, pipeline)
    kind = kind_of(settings, pipeline, data, lora_rank(settings) > 0)
    kind = replace(kind, name=f"{kind.name}, fine-tuned ({settings.method})")
    if settings.method == "dreambooth":
        data = with_class_pictures(settings, pipeline, data)
    set_seed(settings.seed)  # the adapters' first weights
    finish = prepare(settings, pipeline, data)
    trains_text = settings.train_text_encoder or settings.method == "textual-inversion"
    model = replace(model_of(pipeline, trains_text), process=process)
    text_encoder = model.whole_text_encoder if trains_text else None
    objective = DenoiserObjective(model.network, model.process, settings.min_snr_gamma, text_encoder)

    def save() -> None:
        pipeline.unet = model.network  # the same, but where FSDP has spread its weights
        finish()
        pipeline.save_pretrained(settings.output)

    return train_diffusion(settings, model, data, objective, save, kind, settings.model)


def check_method(settings: FinetuneSettings) -> None:
    """Raises ValueError for a setting that would do nothing with this method."""
    for key, methods in USED_BY.items():
        usual = FinetuneSettings.model_fields[key].default
        if settings.method not in methods and getattr(settings, key) != usual:
            raise ValueError(f"{key} does nothing with method={settings.method}; it is for {', '.join(methods)}")


def check_output(settings: AdaptedSettings) -> None:
    """Raises ValueError if the output folder is the model to start from."""
    output, model = Path(settings.output), local_place(settings.model)
    if model is not None and output.exists() and output.resolve() == model.resolve():
        raise ValueError(f"{output} is the model to start from, which is not changed; choose another --output")


def check_family(settings: FinetuneSettings, pipeline: Any) -> None:
    """Raises ValueError for what cannot be done with a transformer, or with one that is told classes."""
    if not isinstance(pipeline, TransformerPipeline):
        return
    what = f"{settings.model} is a {type(pipeline).__name__}"
    if settings.train_text_encoder or settings.method == "textual-inversion":
        raise ValueError(f"{what}, whose text encoder, if any, is not trained; take method=full or method=lora")
    if isinstance(pipeline, DiTPipeline) and settings.method == "dreambooth":
        raise ValueError(f"{what}, which draws classes and reads no text; dreambooth needs a model of text")
    if settings.adapter not in ("lora", "dora"):
        raise ValueError(f"{what}; adapter={settings.adapter} is for UNets, take adapter=lora or dora")


def load_model(model: str, families: Sequence[type] = ()) -> TextToImagePipeline:
    """The model to start from, as the class that its folder, or single file, names.

    families: what it may be besides a `TextToImagePipeline`.

    Raises:
        ValueError: a class that has other components, or makes its conditions in its own way.
        FileNotFoundError, OSError: see ``from_pretrained``.
    """
    place = find_place(model)
    kind: Any = kind_in(place, textless=True).load()
    known: Any = next((family for family in families if issubclass(kind, family)), TextToImagePipeline)
    parts, usual = (inspect.signature(one.__init__).parameters.keys() for one in (kind, known))
    methods = ("conditioner", "condition", "encode_prompt")
    others = "".join(f", {find_kind(one.__name__).family}" for one in families)
    if parts != usual or any(getattr(kind, name, None) is not getattr(known, name, None) for name in methods):
        raise ValueError(
            f"{model} is a {kind.__name__}, which has components or conditions of its own; this knows models "
            f"with one text encoder, an autoencoder and a UNet{others}"
        )
    loaded: TextToImagePipeline = open_place(kind, place)
    if known is SDXLTextToImagePipeline and loaded.text_encoder is None:
        raise ValueError(f"{model} has the second text encoder alone, as SDXL's refiner, which is not trained here")
    return loaded


def text_encoders(pipeline: Any) -> list[Any]:
    """One, SDXL's two, or none, where classes are drawn."""
    return [part for name in ("text_encoder", "text_encoder_2") if (part := pipeline.components.get(name)) is not None]


def is_distilled(settings: FinetuneSettings, pipeline: TextToImagePipeline) -> bool:
    """Whether fine-tuning starts from a UNet that draws in few steps without guidance, and makes it one that does not.

    The loss teaches a UNet to draw in many steps with guidance. A new word leaves the UNet as it is.
    """
    return draws_in_few_steps(pipeline) and settings.method != "textual-inversion"


def draws_in_few_steps(pipeline: TextToImagePipeline) -> bool:
    """Whether a model was distilled: it draws in few steps without guidance by default."""
    steps, guidance_scale = (pipeline.defaults[name] for name in ("num_inference_steps", "guidance_scale"))
    return guidance_scale <= 1 and steps <= FEW_STEPS


def own_resolution(settings: AdaptedSettings, pipeline: TextToImagePipeline) -> int:
    """The resolution of the settings, or the model's own where they leave it open.

    Raises:
        ValueError: the model cannot be trained from, or not at this resolution.
    """
    takes, gives = pipeline.unet.config.in_channels, pipeline.vae.config.latent_channels
    if takes != gives:
        raise ValueError(
            f"{settings.model}: its UNet takes {takes} channels and the autoencoder's latents have {gives}; UNets for "
            f"inpainting and the like cannot be fine-tuned"
        )
    factor = pipeline.vae_scale_factor
    if settings.resolution % factor:
        raise ValueError(f"resolution {settings.resolution} is not divisible by the autoencoder's factor {factor}")
    patch = pipeline.unet.config.get("patch_size", 1)
    if settings.resolution % (factor * patch):
        raise ValueError(f"resolution {settings.resolution} makes latents that do not divide into patches of {patch}")
    height, width = pipeline.picture_size(None, None)
    if not settings.resolution and height != width:
        raise ValueError(f"{settings.model} draws {width}x{height} pictures; give a resolution=")
    return settings.resolution or height


def complete(settings: FinetuneSettings, pipeline: TextToImagePipeline) -> FinetuneSettings:
    """`settings` with what depends on the model.

    Raises:
        ValueError: the model cannot be fine-tuned, or not at this resolution.
    """
    changes: dict[str, Any] = {"resolution": own_resolution(settings, pipeline)}
    given = settings.model_fields_set
    changes |= targets_of(settings, pipeline)
    drawing = UNDISTILLED if is_distilled(settings, pipeline) else pipeline.defaults
    if "sample_steps" not in given:
        changes["sample_steps"] = drawing["num_inference_steps"]
    if "sample_guidance_scale" not in given:
        changes["sample_guidance_scale"] = drawing["guidance_scale"]
    if settings.method == "textual-inversion":
        if settings.caption is None:
            changes["caption"] = settings.placeholder_token
        if "caption_dropout" not in given:
            changes["caption_dropout"] = 0.0  # without the new word there is nothing to learn
    if "min_snr_gamma" not in given and settings.process == "model":
        own = own_process(pipeline)
        if isinstance(own, RectifiedFlow) or getattr(own, "zero_terminal_snr", False):
            changes["min_snr_gamma"] = None  # under which pure noise would count as nothing
    return settings.completed(**changes)


def targets_of(settings: AdaptedSettings, pipeline: Any) -> dict[str, Any]:
    """The layers that a LoRA is in by default, where they are not a UNet's."""
    other = "lora_targets" not in settings.model_fields_set and isinstance(pipeline, TransformerPipeline)
    return {"lora_targets": OF_TRANSFORMERS} if other else {}


def own_process(pipeline: Any) -> Process:
    """The process that a pipeline's scheduler samples from; with variances, where the network has learned them, which
    the schedulers of many released folders leave out.
    """
    config, network = pipeline.scheduler.config, pipeline.unet.config
    if network.get("out_channels") == 2 * network.in_channels:
        config = {**config, "variance_type": "learned_range"}
    return process_from_config(config)


def kind_of(settings: AdaptedSettings, pipeline: Any, data: Data, is_lora: bool) -> ModelKind:
    """What is trained, for its card."""
    if isinstance(pipeline, DiTPipeline):
        return replace(class_conditional_kind([data.pictures[0].captions[0]]), lora=is_lora)
    prompts = [*settings.sample_prompts, *short_captions(data.pictures)]
    return text_to_image_kind(
        prompts,
        lora=is_lora,
        saved_as=pipeline.saved_class_name,
        told=pipeline.diffusers_options,
        scaled=hasattr(pipeline.scheduler, "init_noise_sigma"),
    )


def taught_process(settings: FinetuneSettings, pipeline: TextToImagePipeline) -> Process:
    """The process that the settings name, for which the pipeline gets a scheduler; or that of its own scheduler.

    Raises:
        ValueError: there is no such process, or it does not take these arguments.
    """
    own = own_process(pipeline)
    if settings.process == "model":
        return own
    process: Process = made_by(known_processes(), "process", settings.process, **settings.process_options)
    channels, gives = pipeline.unet.config.in_channels, pipeline.unet.config.get("out_channels")
    if gives and process.prediction_channels(channels) != gives:
        raise ValueError(
            f"{settings.model}: its network gives {gives} channels for latents of {channels}, variances among them, "
            f"and process={settings.process} has no use for these; leave process out to go on as the model was trained"
        )
    if process.scheduler_config() != own.scheduler_config():
        pipeline.scheduler = process.scheduler()
        if type(process) is not type(own):
            logger.info("%s is of the %s process, and is taught that of %s", settings.model, own.name, process.name)
    return process


def model_of(pipeline: Any, trains_text: bool) -> Any:
    """The networks of `pipeline`, and the process that its scheduler samples from."""
    networks = (Codec(pipeline.vae), pipeline.unet, pipeline.scheduler, own_process(pipeline))
    if isinstance(pipeline, DiTPipeline):
        return DiTModel(*networks, classes_of(pipeline))
    parts = (
        *networks,
        pipeline.tokenizer,
        pipeline.text_encoder,
        Expand(pipeline.tokenizer) if trains_text else None,
        type(pipeline),
    )
    if pipeline.for_sdxl:
        return SDXLModel(*parts, drawn_with=pipeline)
    return (PixArtModel if isinstance(pipeline, PixArtTextToImagePipeline) else TextModel)(*parts)


def with_class_pictures(settings: FinetuneSettings, pipeline: TextToImagePipeline, data: Data) -> Data:
    """The pictures under the subject's caption, and as many draws of the class's."""
    caption = str(settings.caption)
    pipeline.to(processes().device)
    priors = draw_class_pictures(settings, pipeline)
    pipeline.to("cpu")
    return Data(mix(of_subject(data.pictures, caption), priors), of_subject(data.held_out, caption), data.are_masked)


def prepare(settings: FinetuneSettings, pipeline: TextToImagePipeline, data: Data) -> Finish:
    """Make what the method trains require gradients; returns how the result is saved."""
    unet, encoders = pipeline.unet, text_encoders(pipeline)
    trained = encoders if settings.train_text_encoder else []
    if settings.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    for encoder in encoders:
        without_dropout(encoder)
    if settings.method == "textual-inversion":
        return prepare_word(settings, pipeline, data)
    if lora_rank(settings):
        add_lora(settings, unet, *trained, kind=settings.adapter)
    else:
        unet.requires_grad_(True)
        for encoder in trained:
            for name, parameter in encoder.named_parameters():
                parameter.requires_grad_("pooler" not in name)  # what pools has no part in the text states
    if len(trained) > 1:
        leave_out_unused(trained[0])
    if not lora_rank(settings):
        return lambda: None
    return partial(save_and_merge, pipeline, Path(settings.output), settings.adapter)


def prepare_word(settings: FinetuneSettings, pipeline: Any, data: Data) -> Finish:
    """A new word for each tokenizer, with an embedding in each text encoder."""
    word, encoders = str(settings.placeholder_token), text_encoders(pipeline)
    tokenizers = [pipeline.tokenizer, *([pipeline.tokenizer_2] if len(encoders) > 1 else [])]
    extended = [add_word(settings, *pair) for pair in zip(tokenizers, encoders, strict=True)]
    for tokenizer, encoder in zip(tokenizers, encoders, strict=True):
        check_captions(data.pictures, word, tokenizer, max_tokens(tokenizer, encoder))

    def save_new_word() -> None:
        save_word(extended, word, Path(settings.output))
        for one, encoder in zip(extended, encoders, strict=True):
            settle(one, encoder)

    return save_new_word


def leave_out_unused(first: Any) -> None:
    """The last layer of SDXL's first text encoder, and what follows it, make no states: they cannot be trained."""
    last = f"layers.{first.config.num_hidden_layers - 1}."
    for name, parameter in first.named_parameters():
        if last in name or "final_layer_norm" in name:
            parameter.requires_grad_(False)
