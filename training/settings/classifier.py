"""Settings of ``latentdiff train classifier``."""

import math
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from latentdiff.training.settings.base import when
from latentdiff.training.settings.diffusion import DiffusionSettings, follow_channels, widths_with_attention
from latentdiff.training.settings.run import RunSettings


class ClassifierSettings(DiffusionSettings):
    """Settings of ``latentdiff train classifier``."""

    fixed: ClassVar[tuple[str, ...]] = (
        *(*RunSettings.fixed, "block_out_channels", "layers_per_block", "attention_levels", "attention_head_dim"),
        *("norm_num_groups", "pool", "resolution"),
    )
    unsettled = ("resolution",)

    model: str = Field(
        description="pipeline folder or .safetensors file of the class-conditional or unconditional model to be guided",
        json_schema_extra=when(
            "It is always given: the model to be guided, with whose noise and latents the classifier learns."
        ),
    )
    block_out_channels: tuple[int, ...] = Field(
        (64, 128, 192),
        description="channels of each level; each is half as large as the one before",
        json_schema_extra=when(
            "Wider if the accuracy of training itself stays low (ADM's at 128 pixels: 128 to 512); narrower if "
            "held-out accuracy stops far below that of training. It runs beside the denoiser in each step of "
            "drawing, with a gradient, so keep it smaller than that."
        ),
    )
    layers_per_block: int = Field(
        1,
        ge=1,
        description="residual blocks in a level",
        json_schema_extra=when("2 is ADM's; 1 does for tens of classes on a few cores."),
    )
    attention_levels: tuple[bool, ...] = Field(
        (False, True, True),
        description="which levels have attention",
        json_schema_extra=when(
            "ADM has it at 32, 16 and 8 pixels or latents on a side; leave it out of larger ones, where its time "
            "grows with the fourth power of the side."
        ),
    )
    attention_head_dim: int = Field(
        32,
        ge=8,
        description="width of one attention head",
        json_schema_extra=when("64 is ADM's. It follows narrow channels by itself."),
    )
    norm_num_groups: int = Field(
        32,
        ge=1,
        description="groups of the group normalisation; divides every number of channels",
        json_schema_extra=when("It follows the channels by itself and never needs a change."),
    )
    dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of activations left out",
        json_schema_extra=when(
            "Raise it to 0.1 or 0.3 if val_accuracy falls while the loss of training does too: classifiers learn "
            "small data sets by heart within some thousand steps."
        ),
    )
    pool: Literal["attention", "adaptive"] = Field(
        "attention",
        description="how the classifier's features become one vector",
        json_schema_extra=when(
            "attention is ADM's. adaptive, a plain mean, is smaller and quicker, for a few classes that differ in "
            "colour or texture."
        ),
    )
    resolution: int = Field(
        0,
        ge=0,
        le=16_384,
        description="0: the model's own",
        json_schema_extra=when("Never: a classifier guides at the size it was trained at, the model's own."),
    )
    weight_decay: float = Field(
        0.05,
        ge=0,
        json_schema_extra=when("0.05 is ADM's. Raise it, to 0.1 or 0.2, with dropout when held-out accuracy falls."),
    )
    caption_dropout: float = Field(
        0.0,
        ge=0,
        le=0,
        description="a classifier always sees the class",
        json_schema_extra=when("Never: it can only be 0, for a classifier without a class has nothing to learn."),
    )
    sample_classifier_scale: float = Field(
        2.0,
        ge=0,
        description="how strongly the classifier guides samples",
        json_schema_extra=when(
            "1 for models that are told the class, 10 for those that are not (ADM). Higher draws the class asked "
            "for more often and pictures more alike. It is the finished model's default; drawing may take another."
        ),
    )
    condition: Literal["class"] = Field(
        "class",
        description="what the classifier tells apart",
        json_schema_extra=when("Never: a classifier is of classes."),
    )
    sample_guidance_scale: float = Field(
        1.0,
        ge=1,
        json_schema_extra=when(
            "Above 1 if the guided model is told the class and was trained without it now and then: both kinds of "
            "guidance add up. At 1 the classifier guides alone."
        ),
    )

    @model_validator(mode="after")
    def _check_levels(self) -> Self:
        follow_channels(self)
        widths = widths_with_attention(self)
        if self.attention_head_dim > min(widths) or widths[-1] % self.attention_head_dim:  # which divides the pool
            self.follow(attention_head_dim=math.gcd(self.attention_head_dim, *widths))
        return self
