"""Which pictures are trained on, and what every training run has."""

import os
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, PrivateAttr, model_validator

from latentdiff.training.settings.base import Settings

HELD_OUT_SHARE = 0.05
PATHS = frozenset(
    (
        *("data", "picture_folder", "output", "autoencoder", "text_encoder", "model", "manifest", "teacher", "prompts"),
        *("cache_dir", "perceptual_network"),
    )
)
"""Settings that may be paths."""
PROPORTIONAL = ("warmup_steps", "decay_steps", "discriminator_start", "gumbel_steps")
"""Settings that say when in a run something begins or ends."""
Condition = Literal["text", "class", "none"]
"""What a model is conditioned on: the caption, the caption as the name of a class, or nothing."""


class DataSettings(Settings):
    """Which pictures, and how they are brought to size."""

    data: str = Field(description="folder of pictures, WebDataset shards (*.tar), or a datasets folder or name")
    split: str = Field("train", description="split of a datasets dataset, and value of an optional 'split' column")
    image_column: str = Field("image", description="column of a dataset with the pictures")
    caption_column: str = Field("text", description="column of a dataset or table with the captions")
    caption: str | None = Field(None, description="caption of every picture that has none of its own")
    picture_folder: str | None = Field(None, description="a folder outside data that paths in its tables may lead to")
    streaming: bool = Field(False, description="read a datasets dataset as a stream, once, keeping a local copy")
    max_pictures: int | None = Field(None, ge=1, description="take this many of the first")
    manifest: str | None = Field(None, description="what 'latentdiff doctor' wrote: which pictures to leave out")
    max_bad_share: float = Field(0.1, ge=0, le=1, description="stop if a larger share of the pictures is unusable")
    resolution: int = Field(64, ge=8, le=16_384, description="side of a square picture, root of the area of any other")
    buckets: bool = Field(False, description="keep aspect ratios: several sizes of about the same area")
    crop: Literal["center", "random"] = Field(
        "center", description="which part of a picture is kept where it is of another shape"
    )
    random_flip: bool | Literal["auto"] = Field(
        "auto",
        description="mirror pictures at random; auto: but those whose captions speak of left, right or text",
    )


class MaskSettings(DataSettings):
    """What of the pictures the loss looks at."""

    mask_column: str | None = Field(
        None, description="column of a dataset or table with the pictures' masks; null: NAME.mask.png beside NAME.jpg"
    )
    masked_loss: bool | Literal["auto"] = Field(
        "auto",
        description="look at each picture where its mask is white; auto: where the pictures have masks",
    )

    @model_validator(mode="after")
    def _check_masks(self) -> Self:
        if self.mask_column is not None:
            if self.masked_loss is False:
                raise ValueError("mask_column does nothing with masked_loss=false; leave one of them out")
            self.follow(masked_loss=True)
        return self


class DoctorSettings(MaskSettings):
    """Settings of ``latentdiff doctor``."""

    resolution: int = Field(128, ge=8, le=16_384, description="default: --model's own; 128, as of the packaged model")
    condition: Condition = Field("text", description="what captions are for; see DenoiserSettings")


def yaml_no(value: Any) -> Any:
    """YAML reads a bare ``no`` as False; where "no" is a choice, that is what was meant."""
    return "no" if value is False else value


class RunSettings(DataSettings):
    """What every training run has. Steps are optimizer steps; the batch size is that of one process's one pass."""

    fixed: ClassVar[tuple[str, ...]] = ("seed", "optimizer", "ema_snapshots")
    """What an unfinished run began with and cannot go on without: anything else would be another training."""
    unsettled: ClassVar[tuple[str, ...]] = ()
    """Settings that a model may change, so that they say nothing before it is loaded."""

    held_out_share: float = Field(
        HELD_OUT_SHARE,
        ge=0,
        lt=1,
        description="share of pictures to measure on and not to train on, where none is of a split 'validation'",
    )
    output: str = Field(description="folder that receives the model; its training/ holds checkpoints and samples")
    batch_size: int = Field(32, ge=1, description="pictures in one pass of one process; more takes more memory")
    gradient_accumulation_steps: int = Field(
        1, ge=1, description="passes in one step, for a larger batch in the same memory"
    )
    max_steps: int = Field(
        10_000,
        ge=1,
        description="steps in all, each one update of the weights; fewer than --config says shorten its warm-up too",
    )
    optimizer: Literal["adamw", "adamw8bit", "adafactor", "sgd", "muon", "prodigy", "schedulefree"] = Field(
        "adamw",
        description="adamw8bit and adafactor take less memory; muon is for the matrices of linear layers, with adamw "
        "for the rest; prodigy finds its learning rate; schedulefree averages by itself",
    )
    learning_rate: float = Field(
        2e-4, gt=0, description="how far a step goes; lower it if the loss explodes or pictures fall apart"
    )
    warmup_steps: int = Field(
        100,
        ge=0,
        description="steps over which the learning rate rises from 0; by default fewer where max_steps has no room",
    )
    decay_steps: int = Field(0, ge=0, description="the learning rate falls to zero over this many last steps")
    decay_shape: Literal["linear", "cosine"] = Field(
        "linear", description="how the learning rate falls over decay_steps"
    )
    lr_scheduler: (
        Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"] | None
    ) = Field(
        None,
        description="diffusers' schedules over all steps after the warm-up, in place of decay_steps; constant has no "
        "warm-up by default",
    )
    lr_num_cycles: int = Field(1, ge=1, description="falls of lr_scheduler=cosine_with_restarts")
    lr_power: float = Field(1.0, gt=0, description="of lr_scheduler=polynomial")
    weight_decay: float = Field(0.01, ge=0, description="how strongly weights are pulled to 0")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="memory of Adam's mean of gradients")
    adam_beta2: float = Field(0.99, gt=0, lt=1, description="memory of Adam's mean of squared gradients")
    max_grad_norm: float = Field(1.0, gt=0, description="longer gradients are shortened to this norm")
    ema_decay: float = Field(0.999, ge=0, lt=1, description="of the averaged weights that are saved; 0: no average")
    ema_snapshots: int = Field(
        0,
        ge=0,
        description="steps between averages kept for 'latentdiff average', which makes one of any length; 0: none",
    )
    ema_warmup: bool = Field(True, description="let the average follow faster at first: (1 + step) / (10 + step)")
    mixed_precision: Annotated[Literal["no", "bf16", "fp16"], BeforeValidator(yaml_no)] = Field(
        "no", description="bf16 or fp16: faster and less memory on a GPU that has it"
    )
    gradient_checkpointing: bool = Field(False, description="less memory, about a third more time")
    compile: bool = Field(False, description="torch.compile the network that is trained")
    seed: int = Field(0, ge=0, description="of everything random")
    num_workers: int = Field(0, ge=0, description="processes that read pictures ahead; 0: none")
    on_bad_loss: Literal["stop", "skip"] = Field("stop", description="when a loss is not finite, or explodes")
    explosion: float = Field(1000.0, gt=1, description="a loss this many times the recent mean is a bad one")
    checkpoint_every: int = Field(500, ge=1, description="steps between checkpoints, from which a stopped run goes on")
    keep_checkpoints: int = Field(2, ge=1, description="how many checkpoints are kept, the newest ones")
    sample_every: int = Field(500, ge=1, description="draw samples and measure on held-out pictures this often")
    log_every: int = Field(10, ge=1, description="steps between records of the loss")
    report_to: tuple[Literal["tensorboard", "wandb"], ...] = Field((), description="trackers that are told too")
    push_to_hub: str | None = Field(None, description="'owner/name' on the hub that gets the finished model")
    cache_dir: str | None = Field(
        None,
        description="where encoded pictures and captions and copies of streams are kept; default: one folder for all "
        "your runs ('latentdiff cache' shows it), and output for streams",
    )
    max_minutes: float | None = Field(None, gt=0, description="stop cleanly after this long; run again to go on")

    _place: Path | None = PrivateAttr(None)

    @property
    def folder(self) -> Path:
        """What a run keeps beside its model; of a dry run, a place that passes."""
        return self._place or Path(self.output) / "training"

    @property
    def given(self) -> list[str]:
        """Which of them were given; the others follow from the defaults, the model or the data."""
        return [key for key in type(self).model_fields if key in self.model_fields_set and key != "output"]

    @property
    def is_dry_run(self) -> bool:
        """Whether nothing may be written in `output`."""
        return self._place is not None

    def in_place(self, folder: Path) -> Self:
        """These, for a dry run that writes into `folder` and tells nobody."""
        copy = self.completed(push_to_hub=None, report_to=(), cache_dir=None)
        copy._place = folder
        return copy

    @classmethod
    def values_of(cls, file: str | os.PathLike[str] | None, overrides: dict[str, Any] | None) -> dict[str, Any]:
        """As `Settings.values_of`; where `overrides` shorten a file's run, what it counts in steps shrinks with it."""
        values, whole = super().values_of(file, overrides), super().values_of(file, None)
        steps, planned = values.get("max_steps"), whole.get("max_steps")
        if isinstance(steps, int) and isinstance(planned, int) and 0 < steps < planned:
            for key in set(PROPORTIONAL) & set(whole) - set(cls._by_name(overrides or {})):
                if isinstance(whole[key], int):
                    values[key] = whole[key] * steps // planned
        return values

    def follow(self, **defaults: Any) -> None:
        """Take these defaults; prodigy's learning rate is a share of the one that it finds."""
        if "learning_rate" in defaults and self.optimizer == "prodigy":
            defaults["learning_rate"] = 1.0
        super().follow(**defaults)

    @model_validator(mode="after")
    def _check_learning(self) -> Self:
        """What the optimizer and the schedule change in each other's settings."""
        if self.optimizer == "prodigy":
            self.follow(learning_rate=1.0)
        if self.optimizer == "schedulefree":
            self.follow(ema_decay=0.0)
            if self.ema_decay:
                raise ValueError("ema_decay is not for optimizer=schedulefree, which averages by itself; leave it out")
            if not self.adam_beta1:
                raise ValueError("optimizer=schedulefree needs an adam_beta1 above 0: it is the share of the average")
        if self.lr_scheduler is not None and (self.decay_steps or self.decay_shape != "linear"):
            raise ValueError(
                f"lr_scheduler={self.lr_scheduler} is in place of decay_steps and decay_shape; leave them out"
            )
        for key, name in (("lr_num_cycles", "cosine_with_restarts"), ("lr_power", "polynomial")):
            if key in self.model_fields_set and self.lr_scheduler != name and getattr(self, key) != 1:
                raise ValueError(f"{key} is for lr_scheduler={name} and does nothing here")
        if self.lr_scheduler == "constant":
            self.follow(warmup_steps=0)
        return self

    @model_validator(mode="after")
    def _check(self) -> Self:
        left = self.max_steps - self.decay_steps
        if self.warmup_steps > left >= 0:
            self.follow(warmup_steps=left // 10)
        if self.warmup_steps + self.decay_steps > self.max_steps:
            given = "max_steps" in self.model_fields_set
            raise ValueError(
                f"warmup_steps={self.warmup_steps} and decay_steps={self.decay_steps} are more than "
                f"max_steps={self.max_steps}; "
                + ("lower them with it, to 0 for a trial" if given else "that is the default, give a larger one too")
            )
        return self
