"""Settings of ``latentdiff distill``."""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from latentdiff.training.settings.base import when
from latentdiff.training.settings.finetune import AdaptedSettings
from latentdiff.training.settings.run import RunSettings

HUBER_C = 0.03  # of a whole picture, for trajectory

USED_BY = {
    "solver_steps": ("lcm", "consistency"),
    "loss": ("lcm", "consistency"),
    "huber_c": ("lcm", "consistency", "trajectory"),
    "target_decay": ("lcm", "consistency"),
    "start_steps": ("progressive",),
    "stage_steps": ("progressive",),
    "guidance_scale": ("lcm", "trajectory", "progressive", "adversarial", "dmd"),
    **dict.fromkeys(("distillation_weight", "discriminator_weight", "discriminator_start"), ("adversarial",)),
    **dict.fromkeys(("discriminator_channels", "discriminator_learning_rate", "r1_weight"), ("adversarial",)),
    "follower_learning_rate": ("dmd",),
    **dict.fromkeys(("teacher_substeps", "trajectory_repeats", "own_states_after"), ("trajectory",)),
    **dict.fromkeys(("prompt_pictures", "noise_offset"), ("lcm", "consistency", "progressive", "adversarial", "dmd")),
}
"""Settings that not every method knows."""


class DistillationSettings(AdaptedSettings):
    """Settings of ``latentdiff distill``."""

    fixed: ClassVar[tuple[str, ...]] = (
        *(*RunSettings.fixed, "method", "lora_rank", "lora_alpha", "lora_targets", "few_steps", "guidance_scale"),
        *("solver_steps", "start_steps", "stage_steps", "discriminator_channels"),
        *("teacher_substeps", "trajectory_repeats", "own_states_after"),
    )
    unsettled = ("guidance_scale", "max_steps", "lora_targets")

    data: str = Field(
        "",
        description="as in training: folder of pictures, shards or dataset; not with prompts",
        json_schema_extra=when(
            "Pictures like those that the teacher was trained on, when you have them: real ones are what "
            "adversarial and consistency learn from. Leave it out with prompts."
        ),
    )
    prompts: str | None = Field(
        None,
        description="file of prompts (.txt, .jsonl, .csv): the teacher draws the pictures to learn from; with "
        "trajectory none are needed",
        json_schema_extra=when(
            "When there are no pictures: a file with as many and as different prompts as will be asked for, "
            "hundreds at least. With trajectory no pictures are drawn of them, for it needs none."
        ),
    )
    prompt_pictures: int = Field(
        1000,
        ge=1,
        description="how many pictures the teacher draws of the prompts",
        json_schema_extra=when(
            "More for long runs, so that few are learned by heart: a tenth of all pictures that the run sees, or "
            "more. Each costs the teacher teacher_steps steps with guidance, before the training begins."
        ),
    )
    teacher_steps: int = Field(
        25,
        ge=1,
        description="steps in which it draws them; default: 25, or what it is made for",
        json_schema_extra=when(
            "To 50 if the teacher's own pictures need it; fewer save time before the training. Look at "
            "training/teacher_pictures."
        ),
    )
    model: str = Field(
        description="the teacher: a packaged model, a pipeline folder, a .safetensors file, a hub id",
        json_schema_extra=when(
            "It is always given: a model that draws in many steps. What is distilled already (emoji) teaches a "
            "student of as many steps nothing."
        ),
    )
    method: Literal["lcm", "trajectory", "consistency", "progressive", "adversarial", "dmd"] = Field(
        "lcm",
        description="how the student learns; docs/few-steps.md says when to take which",
        json_schema_extra=when(
            "trajectory first: best here at two to eight steps for equal time, without pictures. lcm if steps and "
            "guidance are to be chosen when drawing, or as a LoRA for other models. adversarial for one step, with "
            "real pictures. progressive to be like its paper; dmd if pictures may differ from the teacher's; "
            "consistency without guidance."
        ),
    )
    few_steps: int = Field(
        4,
        ge=1,
        le=64,
        description="steps that the student draws in by default",
        json_schema_extra=when(
            "4 is where most methods come near the teacher; 8 is closer to it, 1 or 2 quicker and softer. "
            "trajectory and progressive learn this number alone; lcm draws in others too."
        ),
    )
    guidance_scale: tuple[float, ...] = Field(
        (),
        description="of the teacher, which the student takes over: one number for all pictures, or two, between which "
        "it can be chosen when drawing; default: the teacher's own, with lcm of all weights from 1 to twice that",
        json_schema_extra=when(
            "To the scale at which you like the teacher's pictures, 7.5 for Stable Diffusion 1, for one that is "
            "built in: the smallest student's task. Two numbers if it is to be chosen when drawing, such as [6, 16] "
            "of diffusers' script (whose w is one less); this takes longer to learn, and a LoRA cannot."
        ),
    )
    solver_steps: int = Field(
        50,
        ge=2,
        description="lcm, consistency: steps of the teacher's solver from noise to clean",
        json_schema_extra=when(
            "50 is the paper's and diffusers'. Fewer means longer jumps, learned sooner and less exactly; 100 the "
            "reverse. It has to be few_steps at least."
        ),
    )
    loss: Literal["huber", "l2"] = Field(
        "huber",
        description="lcm, consistency: distance of two answers",
        json_schema_extra=when(
            "huber is what diffusers' examples take. l2 if the run is too slow at the beginning and its loss is "
            "calm; outliers then count more."
        ),
    )
    huber_c: float = Field(
        0.001,
        gt=0,
        description="below it huber is squared, above it linear; default with trajectory, of whole pictures: 0.03",
        json_schema_extra=when(
            "0.001 is diffusers' and seldom needs a change. Raise it, tenfold, if the loss does not fall any more "
            "but jumps: near the end it is then squared and calmer."
        ),
    )
    target_decay: float = Field(
        0.95,
        ge=0,
        lt=1,
        description="lcm, consistency: of the averaged student that gives the target; 0, as with a LoRA and without a "
        "teacher: the student itself",
        json_schema_extra=when(
            "0.95 is diffusers'. Raise it, to 0.99, if the loss falls while samples get worse or swing; 0 saves a "
            "copy of the UNet and is what newer consistency training does (Song & Dhariwal 2023)."
        ),
    )
    start_steps: int = Field(
        32,
        ge=1,
        description="progressive: the student's steps in the first of its halvings",
        json_schema_extra=when(
            "As many steps as the teacher needs for good pictures, rounded to few_steps times a power of two: 32 "
            "for most. Fewer saves a stage of the run each time it is halved."
        ),
    )
    stage_steps: int = Field(
        1000,
        ge=1,
        description="progressive: updates between two halvings",
        json_schema_extra=when(
            "Raise it until val_loss is flat at the end of each stage; 50,000 is the paper's, some hundreds show "
            "whether it works. The run is as long as all stages."
        ),
    )
    teacher_substeps: int = Field(
        4,
        ge=1,
        description="trajectory: guided steps of the teacher that each of the student's ends with",
        json_schema_extra=when(
            "2 to 8: few_steps times it should be the number of steps in which the teacher draws well. Here two did "
            "as well as four for a student of four steps in the same time, since each costs the teacher a guided "
            "step."
        ),
    )
    trajectory_repeats: int = Field(
        1,
        ge=1,
        description="trajectory: how often every step of a trajectory is learned from before new ones are drawn; more "
        "is quicker, and of small batches learned by heart",
        json_schema_extra=when(
            "Leave it at 1 if time allows. 3 saves most of the teacher's time, but small batches are learned by "
            "heart: the loss falls within a cycle and jumps up at the next."
        ),
    )
    own_states_after: float = Field(
        0.5,
        ge=0,
        le=1,
        description="trajectory: share of max_steps after which the student's own steps lead from state to state, and "
        "no longer the teacher's; 1: never",
        json_schema_extra=when(
            "Lower it, to 0.25, in long runs, where the student makes errors of its own soon; 1 in very short ones. "
            "Such errors lead to states that the teacher never meets."
        ),
    )
    distillation_weight: float = Field(
        1.0,
        ge=0,
        description="adversarial: of the distance to the teacher's answer",
        json_schema_extra=when(
            "Raise it, or lower discriminator_weight, if pictures are sharp and wrong; lower it if they stay soft "
            "although the discriminator tells them apart. ADD has 2.5 with a weight of 1 for the discriminator."
        ),
    )
    discriminator_weight: float = Field(
        0.1,
        ge=0,
        description="adversarial: of the discriminator's part in the loss",
        json_schema_extra=when(
            "Raise it, to 0.5, if pictures stay soft and discriminator_accuracy is between 0.6 and 0.9; lower it if "
            "colours or shapes break. At 0 it is the distance to the teacher alone."
        ),
    )
    discriminator_start: int = Field(
        0,
        ge=0,
        description="adversarial: steps before the discriminator begins",
        json_schema_extra=when(
            "Some hundred steps, if the first ones break the student; 0 otherwise, since it begins as a working model."
        ),
    )
    discriminator_channels: int = Field(
        64,
        ge=1,
        description="adversarial: width of the discriminator's heads",
        json_schema_extra=when(
            "128 or 256 for large teachers, if discriminator_accuracy stays near 0.5 for long. It costs little "
            "beside the teacher."
        ),
    )
    discriminator_learning_rate: float | None = Field(
        None,
        gt=0,
        description="adversarial; default: learning_rate",
        json_schema_extra=when(
            "Twice to ten times learning_rate if discriminator_accuracy stays near 0.5; lower if it comes above "
            "0.95, of which the run warns."
        ),
    )
    r1_weight: float = Field(
        0.0,
        ge=0,
        description="adversarial: penalty on the discriminator's slope at real features",
        json_schema_extra=when(
            "1 if the discriminator wins (accuracy above 0.95); it then becomes less sure near real pictures. It "
            "costs a second backward pass through the heads. ADD's 1e-5 is for heads of another kind."
        ),
    )
    follower_learning_rate: float | None = Field(
        None,
        gt=0,
        description="dmd: of the denoiser that follows the student; default: twice learning_rate",
        json_schema_extra=when(
            "Raise it if score_difference grows and pictures get stronger in colour and plainer, which means that "
            "the follower lags behind the student; DMD2 lets it make five updates for each."
        ),
    )
    batch_size: int = Field(
        16,
        ge=1,
        json_schema_extra=when(
            "As large as fits; 16 to 64. These losses are noisy, so gradient_accumulation_steps helps more than in "
            "fine-tuning. diffusers' script has 12 a GPU, LCM's paper 72 in all."
        ),
    )
    max_steps: int = Field(
        2000,
        ge=1,
        description="updates in all; default with progressive: as the stages need",
        json_schema_extra=when(
            "Some hundreds show which method suits; thousands with batches of 64 and more come near the teacher "
            "(the packaged model: 3,000 of 64). With progressive leave it out."
        ),
    )
    learning_rate: float = Field(
        1e-5,
        gt=0,
        description="default: 1e-5, a LoRA 1e-4; small models take more",
        json_schema_extra=when(
            "1e-6 (diffusers' script for all weights of Stable Diffusion) to 1e-5; small models such as the "
            "packaged one 1e-4; a LoRA 1e-4. Too high shows as burnt colours within some hundred steps."
        ),
    )
    ema_decay: float = Field(
        0.99,
        ge=0,
        lt=1,
        json_schema_extra=when(
            "0.95 is diffusers' for short runs, 0.99 to 0.999 for thousands of steps. The averaged student is the "
            "one that is saved and drawn with."
        ),
    )
    caption_dropout: float = Field(
        0.0,
        ge=0,
        le=1,
        json_schema_extra=when(
            "Leave it at 0: guidance comes from the teacher, and a student with one scale built in is never asked "
            "without a prompt. 0.1 if it will be asked with an empty one."
        ),
    )
    min_snr_gamma: None = Field(None, description="does nothing in distillation")

    @model_validator(mode="after")
    def _check_method(self) -> Self:
        for key, methods in USED_BY.items():
            if self.method not in methods and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} does nothing with method={self.method}; it is for {', '.join(methods)}")
        if bool(self.data) == bool(self.prompts):
            raise ValueError("give pictures to learn from, --data, or a file of prompts, --prompts; one of the two")
        if self.lora_rank:
            self.follow(learning_rate=1e-4)
        if self.lora_rank or self.method == "consistency":
            self.follow(target_decay=0.0)
        if self.method == "trajectory":
            self.follow(huber_c=HUBER_C)
        self._check_guidance()
        if self.method == "progressive":
            self._check_stages()
        if self.method in ("lcm", "consistency") and self.few_steps > self.solver_steps:
            raise ValueError(f"few_steps={self.few_steps} are more than solver_steps={self.solver_steps}")
        return self

    def _check_guidance(self) -> None:
        scales = self.guidance_scale
        if len(scales) > 2 or list(scales) != sorted(scales) or any(not 1 <= scale <= 100 for scale in scales):
            raise ValueError(
                f"guidance_scale={list(scales)}: give one number, or two, the smaller first; each from 1, which is "
                f"none, to 100"
            )
        if self.lora_rank and len(set(scales)) == 2:
            raise ValueError("guidance_scale: a LoRA cannot take a scale when it draws; give one number")

    def _check_stages(self) -> None:
        times, rest = divmod(self.start_steps, self.few_steps)
        if rest or times.bit_count() != 1:
            raise ValueError(
                f"start_steps={self.start_steps} must be few_steps={self.few_steps}, or that doubled again and again"
            )

    @property
    def stages(self) -> tuple[int, ...]:
        """progressive: the student's steps in each stage; 0: the stage that takes the teacher's guidance over."""
        halved = [self.start_steps >> i for i in range((self.start_steps // self.few_steps).bit_length())]
        return (*([] if self.guidance_scale == (1.0,) else [0]), *halved)
