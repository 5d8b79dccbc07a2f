"""What is learned from in a step, and how the weights change."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from latentdiff.training.settings.base import when
from latentdiff.training.settings.pictures import DataSettings

HELD_OUT_SHARE = 0.05


class LearningSettings(DataSettings):
    """Of every training run. Steps are optimizer steps; the batch size is that of one process's one pass."""

    held_out_share: float = Field(
        HELD_OUT_SHARE,
        ge=0,
        lt=1,
        description="share of pictures to measure on and not to train on, where none is of a split 'validation'",
        json_schema_extra=when(
            "Set it to 0 when every picture counts, as with a few dozen of one style; then no curve warns of "
            "learning by heart. Raise it where the held-out loss jumps from one measurement to the next, for fewer "
            "than some 50 are noisy. At most 512 are taken, and none of fewer than 40."
        ),
    )
    output: str = Field(
        description="folder that receives the model; its training/ holds checkpoints and samples",
        json_schema_extra=when("It is always given; a folder for each run. The same folder goes on with its run."),
    )
    batch_size: int = Field(
        32,
        ge=1,
        description="pictures in one pass of one process; more takes more memory",
        json_schema_extra=when(
            "Raise it until the memory is nearly full, for speed; lower it when memory runs out, and make up for it "
            "by gradient_accumulation_steps. A larger update is less noisy and bears a larger learning_rate: times "
            "1.4 for twice the pictures, with Adam. From nothing 64 to 512 in an update are usual (the packaged "
            "denoiser: 512; DiT: 256), autoencoders take 8 to 64 (Latent Diffusion: 12 a GPU)."
        ),
    )
    gradient_accumulation_steps: int = Field(
        1,
        ge=1,
        description="passes in one step, for a larger batch in the same memory",
        json_schema_extra=when(
            "Raise it when the batch that you want does not fit: time for each picture stays the same, and updates "
            "become fewer. Leave it at 1 if the batch fits. 'latentdiff ... --dry-run' says what memory a batch "
            "takes."
        ),
    )
    max_steps: int = Field(
        10_000,
        ge=1,
        description="steps in all, each one update of the weights; fewer than --config says shorten its warm-up too",
        json_schema_extra=when(
            "Raise it while the held-out loss in curves.png and the samples still get better; the same command with "
            "more goes on. Stop, or take an earlier step, when the held-out loss rises or samples copy your "
            "pictures. With decay_steps decide it beforehand: the best results come at the end of the fall."
        ),
    )
    optimizer: Literal["adamw", "adamw8bit", "adafactor", "sgd", "muon", "prodigy", "schedulefree"] = Field(
        "adamw",
        description="adamw8bit and adafactor take less memory; muon is for the matrices of linear layers, with adamw "
        "for the rest; prodigy finds its learning rate; schedulefree averages by itself",
        json_schema_extra=when(
            "adamw suits nearly all. adamw8bit (a GPU) keeps its state in a quarter of the memory, when memory is "
            "short; adafactor is the other way, also on processors. prodigy when you do not want to look for a "
            "learning rate, schedulefree when you do not know the end beforehand, muon for transformers of many "
            "linear layers. sgd learns these networks badly and is there to compare."
        ),
    )
    learning_rate: float = Field(
        2e-4,
        gt=0,
        description="how far a step goes; lower it if the loss explodes or pictures fall apart",
        json_schema_extra=when(
            "Halve it, or take a third, if the loss jumps or explodes, or colours burn out; double it if the curve "
            "falls smoothly but slowly. It goes with the root of the update's pictures. From nothing: 1e-4 (ADM, "
            "DiT, both with 256 pictures) to 8e-4 (the packaged denoiser, 512); autoencoders against a discriminator "
            "1e-4 and less, small ones without it 6e-4. Wide networks take less than narrow ones."
        ),
    )
    warmup_steps: int = Field(
        100,
        ge=0,
        description="steps over which the learning rate rises from 0; by default fewer where max_steps has no room",
        json_schema_extra=when(
            "Raise it if the loss explodes or jumps within the first steps, as with transformers, large rates, or "
            "adam_beta2 near 1. 1% to 5% of the run is usual; Stable Diffusion had 10,000 steps. More than needed "
            "costs only that time."
        ),
    )
    decay_steps: int = Field(
        0,
        ge=0,
        description="the learning rate falls to zero over this many last steps",
        json_schema_extra=when(
            "Set it to a third or half of max_steps for a run whose end is known: a falling rate makes samples "
            "visibly cleaner and the held-out loss lower at the same cost (the packaged model's recipes have 40 to "
            "50%). Leave it at 0 if you will train on from the result, or with a long ema_decay, which does much of "
            "the same."
        ),
    )
    decay_shape: Literal["linear", "cosine"] = Field(
        "linear",
        description="how the learning rate falls over decay_steps",
        json_schema_extra=when(
            "There is little in it. cosine stays high for longer and falls faster in the middle; take it to be "
            "comparable with others' runs."
        ),
    )
    lr_scheduler: (
        Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"] | None
    ) = Field(
        None,
        description="diffusers' schedules over all steps after the warm-up, in place of decay_steps; constant has no "
        "warm-up by default",
        json_schema_extra=when(
            "Set it to repeat a run of diffusers' scripts, whose names these are. For a run of your own the warm-up "
            "and decay_steps do as well; do not set both."
        ),
    )
    lr_num_cycles: int = Field(
        1,
        ge=1,
        description="falls of lr_scheduler=cosine_with_restarts",
        json_schema_extra=when(
            "Only with lr_scheduler=cosine_with_restarts: more cycles give several ends to choose among, each of a "
            "shorter run. diffusers' default is 1 too."
        ),
    )
    lr_power: float = Field(
        1.0,
        gt=0,
        description="of lr_scheduler=polynomial",
        json_schema_extra=when("Only with lr_scheduler=polynomial: 1 falls in a line, above 1 early, below 1 late."),
    )
    weight_decay: float = Field(
        0.01,
        ge=0,
        description="how strongly weights are pulled to 0",
        json_schema_extra=when(
            "Raise it to 0.05 or 0.1 if the held-out loss rises while that of training falls. 0 for autoencoders (as "
            "in Latent Diffusion), for DDPM and DiT, and where a moving average is all the smoothing you want. 0.01 "
            "is that of diffusers' scripts. In most runs it makes no visible difference."
        ),
    )
    adam_beta1: float = Field(
        0.9,
        ge=0,
        lt=1,
        description="memory of Adam's mean of gradients",
        json_schema_extra=when(
            "Lower it to 0.5 when training against a discriminator (VQGAN, Latent Diffusion), so that each side "
            "follows the other faster. Otherwise 0.9 never needs a change. With optimizer=sgd it is the momentum."
        ),
    )
    adam_beta2: float = Field(
        0.99,
        gt=0,
        lt=1,
        description="memory of Adam's mean of squared gradients",
        json_schema_extra=when(
            "0.999 (diffusers' scripts, Adam's own default) for long runs with small updates, where 0.99 is too "
            "restless; 0.9 against a discriminator (VQGAN). Lower it if sudden jumps of the loss come after calm "
            "stretches."
        ),
    )
    max_grad_norm: float = Field(
        1.0,
        gt=0,
        description="longer gradients are shortened to this norm",
        json_schema_extra=when(
            "1 is that of diffusers' scripts and seldom needs a change. Lower it, to 0.1 say, if single batches make "
            "the loss jump; raise it far, to 1e9, to have no clipping when repeating a run without it."
        ),
    )
    ema_decay: float = Field(
        0.999,
        ge=0,
        lt=1,
        description="of the averaged weights that are saved; 0: no average",
        json_schema_extra=when(
            "The average is about 1 / (1 - ema_decay) steps long: 1,000 steps for 0.999. Let it be at most a tenth "
            "of the run: 0.99 for some hundreds of steps, 0.9999 for hundreds of thousands (DDPM, ADM, Stable "
            "Diffusion). Too long, and samples lag behind; too short, and they are noisy. 0 saves the memory of one "
            "copy of the weights. Not sure: ema_snapshots."
        ),
    )
    ema_snapshots: int = Field(
        0,
        ge=0,
        description="steps between averages kept for 'latentdiff average', which makes one of any length; 0: none",
        json_schema_extra=when(
            "Set it to a thirtieth of max_steps in a long run from nothing, to choose the average's length "
            "afterwards by 'latentdiff average' (EDM2). It costs two copies of the weights in float32 in memory, and "
            "on the disk each time. Leave it at 0 for short runs and adapters."
        ),
    )
    ema_warmup: bool = Field(
        True,
        description="let the average follow faster at first: (1 + step) / (10 + step)",
        json_schema_extra=when(
            "Set it false only to repeat a run that averaged without a warm-up; the average then remembers the "
            "first, random weights for a long time."
        ),
    )

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
