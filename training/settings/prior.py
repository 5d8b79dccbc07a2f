"""Settings of ``latentdiff train prior``."""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from latentdiff.training.settings.diffusion import DiffusionSettings
from latentdiff.training.settings.pictures import Condition
from latentdiff.training.settings.run import RunSettings


class PriorSettings(DiffusionSettings):
    """Settings of ``latentdiff train prior``."""

    fixed: ClassVar[tuple[str, ...]] = (
        *(*RunSettings.fixed, "condition", "order", "num_layers", "num_attention_heads", "attention_head_dim"),
        *("positions", "resolution"),
    )

    autoencoder: str = Field(
        description="folder of an autoencoder with codes (kind=vq, fsq or gumbel), or of a pipeline that has one"
    )
    condition: Condition = Field(
        "text", description="what codes are predicted from besides: the caption; the caption as a class; nothing"
    )
    text_encoder: str = Field("emoji", description="folder with text_encoder/ and tokenizer/, or a packaged model")
    order: Literal["masked", "raster"] = Field(
        "masked", description="masked: hidden codes from all others, drawn in a few steps; raster: one after the other"
    )
    num_layers: int = Field(8, ge=1, description="transformer blocks")
    num_attention_heads: int = Field(6, ge=1, description="of each block; times attention_head_dim, the width")
    attention_head_dim: int = Field(64, ge=4, multiple_of=4, description="width of one attention head")
    positions: Literal["rotary", "axial"] = Field(
        "rotary", description="how places are told: by rotations, or by vectors learned for rows and columns"
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of a target that all codes have; MaskGIT's: 0.1")
    weight_decay: float = Field(0.03, ge=0)
    sample_steps: int = Field(
        12, ge=1, description="steps of samples, and of the finished model by default; raster: one for each code"
    )
    sample_guidance_scale: float = Field(3.0, ge=1)
    min_snr_gamma: None = None
    noise_offset: float = Field(0.0, ge=0, le=0, description="codes have no noise")
    buckets: bool = False

    @model_validator(mode="after")
    def _check_prior(self) -> Self:
        if self.buckets:
            raise ValueError("buckets=true is not for a prior, which learns one grid of codes; leave it out")
        if self.order == "raster" and "sample_steps" in self.model_fields_set:
            raise ValueError("sample_steps is for order=masked; in raster order each code is a step")
        return self
