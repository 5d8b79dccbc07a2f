"""What every training run has."""

import os
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, PrivateAttr

from latentdiff.training.settings.base import when
from latentdiff.training.settings.learning import LearningSettings

PATHS = frozenset(
    (
        *("data", "picture_folder", "output", "autoencoder", "text_encoder", "model", "manifest", "teacher", "prompts"),
        *("cache_dir", "perceptual_network"),
    )
)
"""Settings that may be paths."""
PROPORTIONAL = ("warmup_steps", "decay_steps", "discriminator_start", "gumbel_steps")
"""Settings that say when in a run something begins or ends."""


def yaml_no(value: Any) -> Any:
    """YAML reads a bare ``no`` as False; where "no" is a choice, that is what was meant."""
    return "no" if value is False else value


class RunSettings(LearningSettings):
    """What every training run has."""

    fixed: ClassVar[tuple[str, ...]] = ("seed", "optimizer", "ema_snapshots")
    """What an unfinished run began with and cannot go on without: anything else would be another training."""
    unsettled: ClassVar[tuple[str, ...]] = ()
    """Settings that a model may change, so that they say nothing before it is loaded."""

    mixed_precision: Annotated[Literal["no", "bf16", "fp16"], BeforeValidator(yaml_no)] = Field(
        "no",
        description="bf16 or fp16: faster and less memory on a GPU that has it",
        json_schema_extra=when(
            "bf16 on GPUs from Ampere on, and on processors with avx512_bf16 or AMX: often faster, less "
            "memory, results as good. fp16 only on older GPUs; if updates are left out often, a lower learning_rate "
            "helps. Leave no on other processors, where it is slower, and when numbers are compared."
        ),
    )
    gradient_checkpointing: bool = Field(
        False,
        description="less memory, about a third more time",
        json_schema_extra=when(
            "Set it true when memory runs out although batch_size is small already; it comes before a smaller "
            "network. Results are the same. Leave it false when there is room: it costs about a third of the time."
        ),
    )
    compile: bool = Field(
        False,
        description="torch.compile the network that is trained",
        json_schema_extra=when(
            "Set it true for long runs on a GPU, where kernels are many and short: the first steps take minutes, and "
            "each new shape (buckets) compiles anew. Compare pictures/s after some hundred steps with a run without "
            "it, and leave it false if there is no gain. Not with adaptive_weight."
        ),
    )
    seed: int = Field(
        0,
        ge=0,
        description="of everything random",
        json_schema_extra=when(
            "To see whether a difference between two runs is chance: repeat both with two or three seeds. There is "
            "no good seed to look for. It cannot change within a run."
        ),
    )
    num_workers: int = Field(
        0,
        ge=0,
        description="processes that read pictures ahead; 0: none",
        json_schema_extra=when(
            "Raise it to 2 to 8 for each GPU where pictures have to be decoded in every step: autoencoders, "
            "cache_latents=false, shards behind an address. Look at pictures/s: if it does not rise, go back. With "
            "cached latents 0 is right, and on a few cores workers only take time from the training."
        ),
    )
    on_bad_loss: Literal["stop", "skip"] = Field(
        "stop",
        description="when a loss is not finite, or explodes",
        json_schema_extra=when(
            "Take skip for long runs that nobody watches, in fp16, or with data that you cannot check. Twenty in a "
            "row stop the run in any case. stop is right while you look for a learning rate: a run that explodes "
            "will not learn."
        ),
    )
    explosion: float = Field(
        1000.0,
        gt=1,
        description="a loss this many times the recent mean is a bad one",
        json_schema_extra=when(
            "Lower it, to 10 or so, to be told of jumps of the loss early; raise it where the loss may jump for good "
            "reasons, as when a discriminator begins. It does not change the training until it strikes."
        ),
    )
    checkpoint_every: int = Field(
        500,
        ge=1,
        description="steps between checkpoints, from which a stopped run goes on",
        json_schema_extra=when(
            "Lower it where time is precious or machines are taken away: so many steps are lost at most. Raise it if "
            "writing takes more than a few percent of the time: a checkpoint of all weights with Adam is four times "
            "their size in float32, with an average; of a LoRA it is small."
        ),
    )
    keep_checkpoints: int = Field(
        2,
        ge=1,
        description="how many checkpoints are kept, the newest ones",
        json_schema_extra=when(
            "Raise it to be able to go back to an earlier step, if the disk has room. 1 saves disk; 2 keeps one that "
            "is whole whatever happens to the newest."
        ),
    )
    sample_every: int = Field(
        500,
        ge=1,
        description="draw samples and measure on held-out pictures this often",
        json_schema_extra=when(
            "Lower it in short runs, to see the moment when a style is learned or copied; raise it if drawing takes "
            "a good part of the time (--dry-run says how much), as on processors. Trained weights do not depend on "
            "it."
        ),
    )
    log_every: int = Field(
        10,
        ge=1,
        description="steps between records of the loss",
        json_schema_extra=when(
            "1 for runs of some hundred steps, to see a finer curve. 50 or 100 for runs of days, to keep "
            "metrics.jsonl small. It costs next to nothing."
        ),
    )
    report_to: tuple[Literal["tensorboard", "wandb"], ...] = Field(
        (),
        description="trackers that are told too",
        json_schema_extra=when(
            "When you follow runs in TensorBoard or Weights & Biases already (packages tensorboard or tensorboardX, "
            "wandb). metrics.jsonl, curves.png and samples/ are written in any case, without a network."
        ),
    )
    push_to_hub: str | None = Field(
        None,
        description="'owner/name' on the hub that gets the finished model",
        json_schema_extra=when(
            "To publish the finished model; sign in with 'hf auth login' first. The card and pictures in it are "
            "public if the repository is: look at them before."
        ),
    )
    cache_dir: str | None = Field(
        None,
        description="where encoded pictures and captions and copies of streams are kept; default: one folder for all "
        "your runs ('latentdiff cache' shows it), and output for streams",
        json_schema_extra=when(
            "When several machines share what 'latentdiff encode' made, when the home folder is small or slow, or to "
            "delete a run with all it made. Not needed to keep runs apart: what differs is never mixed up."
        ),
    )
    max_minutes: float | None = Field(
        None,
        gt=0,
        description="stop cleanly after this long; run again to go on",
        json_schema_extra=when(
            "Where time is given out in pieces: a little less than the job's limit, so that the last checkpoint and "
            "samples are made in time. The same command goes on, and has to be given it again."
        ),
    )

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
