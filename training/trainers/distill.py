"""Distillation: a student that draws in few steps learns from a model that draws in many."""

import copy
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import Tensor

from latentdiff.conditioning import Conditioning
from latentdiff.diffusion.process import Process
from latentdiff.interchange.fingerprint import weights_digest
from latentdiff.interchange.user_files import faults_named
from latentdiff.models import UNet2DConditionModel
from latentdiff.models.discriminator import FeatureDiscriminator
from latentdiff.pipelines import DiTPipeline, TextToImagePipeline
from latentdiff.pipelines.batch.prompt_files import read_prompts
from latentdiff.pipelines.tasks.dit import TransformerPipeline
from latentdiff.text import encode_prompts
from latentdiff.training.batch.two_encoders import caption_conditioner
from latentdiff.training.card.card import last_part
from latentdiff.training.card.kinds import distilled_kind
from latentdiff.training.loop.output_folder import open_output
from latentdiff.training.objectives.adversarial import (
    AdversarialObjective,
    FeatureDiscriminatorObjective,
    feature_widths,
)
from latentdiff.training.objectives.consistency import ConsistencyObjective
from latentdiff.training.objectives.distillation import DistillationObjective
from latentdiff.training.objectives.distribution_matching import DistributionMatchingObjective, FollowerObjective
from latentdiff.training.objectives.objective import Objective, RealAndFake
from latentdiff.training.objectives.progressive import ProgressiveObjective
from latentdiff.training.objectives.trajectory import TrajectoryObjective
from latentdiff.training.settings import DistillationSettings
from latentdiff.training.starting_networks import freeze
from latentdiff.training.trainers.adapted_data import captions_alone, load_pictures, with_drawings
from latentdiff.training.trainers.autoencoder import Alarms
from latentdiff.training.trainers.diffusion import train_diffusion
from latentdiff.training.trainers.diffusion_models import DiffusionModel
from latentdiff.training.trainers.finetune import (
    FAMILIES,
    check_output,
    draws_in_few_steps,
    kind_of,
    load_model,
    model_of,
    own_resolution,
    targets_of,
    text_encoders,
)
from latentdiff.training.trainers.lora import add_lora, save_and_merge
from latentdiff.training.trainers.samples import sample_captions

logger = logging.getLogger(__name__)

SCALE_WIDTH = 256  # of an embedded guidance scale, as in diffusers' example


def distill(settings: DistillationSettings) -> Path:
    """Distill a model, or go on with a run that ``settings.output`` holds.

    ``settings.output`` becomes a pipeline folder that draws in few steps, here and in diffusers, with the LoRA (merged
    in) beside it in a file of its own, if one was trained. The teacher is not changed.

    Returns:
        ``settings.output``.

    Raises:
        ValueError, FileNotFoundError: settings, pictures, prompts or models that cannot be used, and what to do.
        OSError: the hub was asked for the teacher and cannot be reached.
    """
    check_output(settings)
    prompts = [one.prompt for one in read_prompts(Path(settings.prompts))] if settings.prompts else []
    open_output(settings, unsettled=settings.unsettled)
    pipeline = load_model(settings.model, FAMILIES)
    pipeline.set_progress_bar_config(disable=True)
    model = model_of(pipeline, trains_text=False)
    scheduler = scheduler_of(settings, model.process)
    check_teacher(settings, pipeline, model.process)
    if isinstance(pipeline, DiTPipeline) and prompts:
        pipeline.label_numbers(prompts)  # refuses what is no class
    settings = complete(settings, pipeline)
    freeze(pipeline.vae, *text_encoders(pipeline), pipeline.unet)
    open_output(settings)
    if settings.method == "trajectory" and prompts:
        data = captions_alone(settings, pipeline, prompts)
        settings = settings.completed(sample_prompts=settings.sample_prompts or tuple(sample_captions(data.pictures)))
    else:
        data = load_pictures(with_drawings(settings, pipeline, prompts), pipeline)
    set_seed(settings.seed)  # the adapters' first weights
    teacher, empty = pipeline.unet, empty_prompt(pipeline)
    pipeline.unet = student_of(settings, teacher)
    pipeline.scheduler = scheduler
    digest = weights_digest(teacher.state_dict())
    student = replace(model, network=pipeline.unet, scheduler=scheduler, teacher_digest=digest)
    objective, adversary = objectives_of(settings, student, teacher, empty)

    def save() -> None:
        pipeline.unet = student.network
        if settings.lora_rank:
            save_and_merge(pipeline, Path(settings.output))
        pipeline.register_defaults(
            num_inference_steps=settings.few_steps, guidance_scale=settings.sample_guidance_scale
        )
        pipeline.save_pretrained(settings.output)

    note = note_of_teacher(settings, pipeline)
    kind = kind_of(settings, pipeline, data, settings.lora_rank > 0)
    kind = distilled_kind(kind, settings.method, settings.few_steps, settings.sample_guidance_scale, note)
    if not objective.takes_latents:
        kind = replace(kind, learned_from="captions")
    rate = settings.discriminator_learning_rate
    if settings.method == "dmd":
        rate = settings.follower_learning_rate or 2 * settings.learning_rate
    versus = (adversary, rate, Alarms("the student").add)
    output = train_diffusion(settings, student, data, objective, save, kind, settings.model, *versus)
    if note:  # whoever comes back hours later has not read the beginning
        logger.warning("%s", note)
    return output


def scheduler_of(settings: DistillationSettings, process: Process) -> Any:
    """The scheduler that steps as the method teaches.

    Raises:
        ValueError: there is none for the teacher's process.
    """
    with faults_named(settings.model):
        if settings.method in ("progressive", "trajectory"):
            scheduler = process.first_order_scheduler()
        else:
            among = process.num_timesteps if settings.method in ("adversarial", "dmd") else settings.solver_steps
            scheduler = process.renoising_scheduler(settings.few_steps, among)
    if "steps_offset" in scheduler.config:  # where it changes nothing, but diffusers' pipelines warn of any other
        scheduler.register_to_config(steps_offset=1)
    return scheduler


def check_teacher(settings: DistillationSettings, pipeline: TextToImagePipeline, process: Process) -> None:
    """Raises ValueError for a teacher from which the method cannot learn."""
    unet, is_transformer = pipeline.unet, isinstance(pipeline, TransformerPipeline)
    if pipeline.guides_itself:
        raise ValueError(
            f"{settings.model}: its UNet takes the guidance scale as a condition, so it was distilled already; give "
            f"the model that it was made from"
        )
    if not is_transformer and unet.config.out_channels != unet.config.in_channels:  # those leave out variances
        raise ValueError(
            f"{settings.model}: its UNet predicts {unet.config.out_channels} channels for latents with "
            f"{unet.config.in_channels}; a teacher predicts the picture, the noise or v and no variances"
        )
    if settings.method in ("lcm", "consistency") and settings.solver_steps > process.num_timesteps:
        raise ValueError(
            f"solver_steps={settings.solver_steps} are more than the teacher's {process.num_timesteps} timesteps"
        )
    if settings.method == "adversarial" and not (is_transformer or isinstance(unet, UNet2DConditionModel)):
        raise ValueError(
            f"{settings.model}: the discriminator looks into a UNet, and this teacher is a {type(unet).__name__}; "
            f"take another method"
        )
    if settings.method == "progressive" and 2 * settings.start_steps > process.num_timesteps:
        raise ValueError(
            f"start_steps={settings.start_steps}: the teacher takes twice as many, and has {process.num_timesteps}"
        )
    if settings.method == "trajectory" and settings.few_steps * settings.teacher_substeps > process.num_timesteps:
        raise ValueError(
            f"teacher_substeps={settings.teacher_substeps} in each of few_steps={settings.few_steps} are more than the "
            f"teacher's {process.num_timesteps} timesteps"
        )
    if note := note_of_teacher(settings, pipeline):
        logger.warning("%s", note)


def note_of_teacher(settings: DistillationSettings, pipeline: TextToImagePipeline) -> str:
    """What comes of a teacher that was distilled itself; empty of any other."""
    if not draws_in_few_steps(pipeline):
        return ""
    steps = pipeline.defaults["num_inference_steps"]
    gain = (
        f"In {settings.few_steps} steps this student is at best as good as that, so nothing is gained."
        if settings.few_steps >= steps
        else f"A student of {settings.few_steps} may be quicker, and not better."
    )
    return (
        f"{last_part(settings.model)} draws in {steps} steps without guidance, so it was distilled already: what it "
        f"makes of a little less noise is no step of a solver. {gain} A student learns more from the model that its "
        f"teacher was made from, one of many steps."
    )


def complete(settings: DistillationSettings, pipeline: TextToImagePipeline) -> DistillationSettings:
    """`settings` with what depends on the teacher.

    Raises:
        ValueError: the teacher cannot be learned from at this resolution, or its UNet takes no guidance scale; or the
            stages do not fit.
    """
    own = max(1.0, float(pipeline.defaults["guidance_scale"]))
    scales = chosen_scales(settings, pipeline, own)
    changes: dict[str, Any] = {
        "resolution": own_resolution(settings, pipeline),
        "guidance_scale": scales,
        "sample_steps": settings.few_steps,
        **targets_of(settings, pipeline),
        "sample_guidance_scale": 1.0 if len(scales) == 1 else min(max(own, scales[0]), scales[1]),
    }
    if draws_in_few_steps(pipeline):
        changes["teacher_steps"] = pipeline.defaults["num_inference_steps"]
    if settings.method == "progressive":
        stages = settings.model_copy(update={"guidance_scale": scales}).stages
        changes["max_steps"] = needed = len(stages) * settings.stage_steps
        if "max_steps" in settings.model_fields_set and settings.max_steps <= needed - settings.stage_steps:
            raise ValueError(
                f"max_steps={settings.max_steps} end before the last of {len(stages)} stages of "
                f"stage_steps={settings.stage_steps} begins; give max_steps={needed}, shorter stages, or fewer by a "
                f"smaller start_steps"
            )
    for name in settings.model_fields_set & {"sample_steps", "sample_guidance_scale", "teacher_steps", "max_steps"}:
        if name != "sample_guidance_scale" or len(scales) == 2:  # a scale that is built in needs no guidance
            changes.pop(name, None)
    return settings.completed(**changes)


def chosen_scales(
    settings: DistillationSettings, pipeline: TextToImagePipeline, own: float
) -> tuple[float] | tuple[float, float]:
    """The guidance scale that the student learns, or the least and the largest. own: the teacher's.

    Raises:
        ValueError: there are two, and the UNet can be told none.
    """
    scales, is_told = settings.guidance_scale or (own,), isinstance(pipeline.unet, UNet2DConditionModel)
    if settings.method == "consistency":
        scales = (1.0,)
    elif not settings.guidance_scale and settings.method == "lcm" and not settings.lora_rank and is_told:
        scales = (1.0, 2 * own) if own > 1 else (1.0,)
    if scales[0] == scales[-1]:
        return (scales[0],)
    if not is_told:
        raise ValueError(
            f"{settings.model}: a {type(pipeline.unet).__name__} takes no guidance scale; give one guidance_scale"
        )
    return (scales[0], scales[1])


def empty_prompt(pipeline: Any) -> Tensor | Conditioning:
    """What guidance keeps away from: text states (1, L, D), and of SDXL its pooled embedding too, or its zeros; of
    PixArt the mask too, and of a DiT the label of no class.
    """
    if isinstance(pipeline, DiTPipeline):
        return Conditioning(labels=torch.tensor([pipeline.null_label]))
    with torch.no_grad():
        if isinstance(pipeline, TransformerPipeline):
            return pipeline.conditioner(pipeline.device)([""])
        if pipeline.for_sdxl:
            return caption_conditioner(pipeline, pipeline.device)([""])
    return encode_prompts([""], pipeline.tokenizer, pipeline.text_encoder)


def student_of(settings: DistillationSettings, teacher: Any) -> Any:
    """A copy of the teacher, in which what is to be trained requires a gradient; it begins as the unguided teacher.

    Where the scale can be chosen when drawing, it takes it as a condition (Meng et al. 2023).
    """
    if len(settings.guidance_scale) == 2:
        student = type(teacher).from_config(teacher.config, time_cond_proj_dim=SCALE_WIDTH)
        student.load_state_dict(teacher.state_dict(), strict=False)
        torch.nn.init.zeros_(student.time_embedding.cond_proj.weight)
    else:
        student = copy.deepcopy(teacher)
    if settings.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    if settings.lora_rank:
        add_lora(settings, student)
    else:
        student.requires_grad_(True)
    return student


def objectives_of(
    settings: DistillationSettings, model: DiffusionModel, teacher: Any, empty: Tensor | Conditioning
) -> tuple[DistillationObjective, Objective[RealAndFake] | None]:
    """What the settings' method minimises, and what its adversary does, if it has one."""
    guidance = (settings.guidance_scale[0], settings.guidance_scale[-1])
    common = (model.process, guidance, empty)
    if settings.method == "trajectory":
        share = settings.own_states_after
        objective = TrajectoryObjective(
            model.network,
            teacher,
            *common,
            steps=settings.few_steps,
            substeps=settings.teacher_substeps,
            repeats=settings.trajectory_repeats,
            own_from=share * settings.max_steps if share < 1 else None,
            huber_c=settings.huber_c,
        )
        return objective, None
    if settings.method == "progressive":
        return ProgressiveObjective(model.network, *common, settings.stages, settings.stage_steps), None
    if settings.method == "adversarial":
        discriminator = FeatureDiscriminator(feature_widths(teacher), settings.discriminator_channels)
        adversary = FeatureDiscriminatorObjective(discriminator, settings.r1_weight)
        return AdversarialObjective(model.network, teacher, *common, discriminator, settings), adversary
    if settings.method == "dmd":
        follower = copy.deepcopy(teacher if settings.lora_rank else model.network).requires_grad_(True)
        matching = DistributionMatchingObjective(model.network, teacher, *common, follower, settings)
        return matching, FollowerObjective(follower, model.process)
    return ConsistencyObjective(model.network, teacher, *common, settings), None
