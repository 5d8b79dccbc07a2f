"""Settings of ``latentdiff distill``."""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

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
    unsettled = ("guidance_scale", "max_steps")

    data: str = Field("", description="as in training: folder of pictures, shards or dataset; not with prompts")
    prompts: str | None = Field(
        None,
        description="file of prompts (.txt, .jsonl, .csv): the teacher draws the pictures to learn from; with "
        "trajectory none are needed",
    )
    prompt_pictures: int = Field(1000, ge=1, description="how many pictures the teacher draws of the prompts")
    teacher_steps: int = Field(
        25, ge=1, description="steps in which it draws them; default: 25, or what it is made for"
    )
    model: str = Field(description="the teacher: a packaged model, a pipeline folder, a .safetensors file, a hub id")
    method: Literal["lcm", "trajectory", "consistency", "progressive", "adversarial", "dmd"] = Field(
        "lcm", description="how the student learns; docs/few-steps.md says when to take which"
    )
    few_steps: int = Field(4, ge=1, le=64, description="steps that the student draws in by default")
    guidance_scale: tuple[float, ...] = Field(
        (),
        description="of the teacher, which the student takes over: one number for all pictures, or two, between which "
        "it can be chosen when drawing; default: the teacher's own, with lcm of all weights from 1 to twice that",
    )
    solver_steps: int = Field(
        50, ge=2, description="lcm, consistency: steps of the teacher's solver from noise to clean"
    )
    loss: Literal["huber", "l2"] = Field("huber", description="lcm, consistency: distance of two answers")
    huber_c: float = Field(
        0.001,
        gt=0,
        description="below it huber is squared, above it linear; default with trajectory, of whole pictures: 0.03",
    )
    target_decay: float = Field(
        0.95,
        ge=0,
        lt=1,
        description="lcm, consistency: of the averaged student that gives the target; 0, as with a LoRA and without a "
        "teacher: the student itself",
    )
    start_steps: int = Field(32, ge=1, description="progressive: the student's steps in the first of its halvings")
    stage_steps: int = Field(1000, ge=1, description="progressive: updates between two halvings")
    teacher_substeps: int = Field(
        4, ge=1, description="trajectory: guided steps of the teacher that each of the student's ends with"
    )
    trajectory_repeats: int = Field(
        1,
        ge=1,
        description="trajectory: how often every step of a trajectory is learned from before new ones are drawn; more "
        "is quicker, and of small batches learned by heart",
    )
    own_states_after: float = Field(
        0.5,
        ge=0,
        le=1,
        description="trajectory: share of max_steps after which the student's own steps lead from state to state, and "
        "no longer the teacher's; 1: never",
    )
    distillation_weight: float = Field(1.0, ge=0, description="adversarial: of the distance to the teacher's answer")
    discriminator_weight: float = Field(0.1, ge=0, description="adversarial: of the discriminator's part in the loss")
    discriminator_start: int = Field(0, ge=0, description="adversarial: steps before the discriminator begins")
    discriminator_channels: int = Field(64, ge=1, description="adversarial: width of the discriminator's heads")
    discriminator_learning_rate: float | None = Field(None, gt=0, description="adversarial; default: learning_rate")
    r1_weight: float = Field(
        0.0, ge=0, description="adversarial: penalty on the discriminator's slope at real features"
    )
    follower_learning_rate: float | None = Field(
        None, gt=0, description="dmd: of the denoiser that follows the student; default: twice learning_rate"
    )
    batch_size: int = Field(16, ge=1)
    max_steps: int = Field(2000, ge=1, description="updates in all; default with progressive: as the stages need")
    learning_rate: float = Field(1e-5, gt=0, description="default: 1e-5, a LoRA 1e-4; small models take more")
    ema_decay: float = Field(0.99, ge=0, lt=1)
    caption_dropout: float = Field(0.0, ge=0, le=1)
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
