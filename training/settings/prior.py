"""Settings of ``latentdiff train prior``."""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from latentdiff.training.settings.base import when
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
        description="folder of an autoencoder with codes (kind=vq, fsq or gumbel), or of a pipeline that has one",
        json_schema_extra=when(
            "It is always given. Few codes a picture learn and draw soonest: 8x8 to 16x16 (MaskGIT), 32x32 "
            "(DALL-E). Its reconstructions are the most that can be drawn; A small codebook too: in the minutes "
            "measured here 256 codes were learned and 2048 not."
        ),
    )
    condition: Condition = Field(
        "text",
        description="what codes are predicted from besides: the caption; the caption as a class; nothing",
        json_schema_extra=when(
            "class where kinds have names and no more is said; none for more of the same. Otherwise text."
        ),
    )
    text_encoder: str = Field(
        "emoji",
        description="folder with text_encoder/ and tokenizer/, or a packaged model",
        json_schema_extra=when(
            "A CLIP or T5 folder for captions of many words; MUSE has T5-XXL. The packaged one, all-MiniLM-L6-v2, "
            "does for short names of things."
        ),
    )
    order: Literal["masked", "raster"] = Field(
        "masked",
        description="masked: hidden codes from all others, drawn in a few steps; raster: one after the other",
        json_schema_extra=when(
            "raster learns fastest, has a likelihood to compare by, and draws few codes quickest (64 of them in "
            "0.09 s here, masked 0.26 s). masked draws many codes in a few steps, can inpaint seeing both sides, "
            "and wants a longer training."
        ),
    )
    num_layers: int = Field(
        8,
        ge=1,
        description="transformer blocks",
        json_schema_extra=when(
            "More if the loss of training itself stops early; 24 is MaskGIT's, with 768 wide, 64 DALL-E's. Time and "
            "memory grow in proportion."
        ),
    )
    num_attention_heads: int = Field(
        6,
        ge=1,
        description="of each block; times attention_head_dim, the width",
        json_schema_extra=when(
            "The width is heads times attention_head_dim: time grows with its square. 4 for trials, 8 to 16 on a "
            "GPU (MaskGIT: 8 heads, 768 wide)."
        ),
    )
    attention_head_dim: int = Field(
        64,
        ge=4,
        multiple_of=4,
        description="width of one attention head",
        json_schema_extra=when(
            "64 is DALL-E's, and what fast kernels like. To change the width change num_attention_heads."
        ),
    )
    positions: Literal["rotary", "axial"] = Field(
        "rotary",
        description="how places are told: by rotations, or by vectors learned for rows and columns",
        json_schema_extra=when("axial only to repeat DALL-E; otherwise no change is needed."),
    )
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of a target that all codes have; MaskGIT's: 0.1",
        json_schema_extra=when(
            "0.1 is MaskGIT's. It helps where the held-out loss rises early and many codes look alike; the held-out "
            "loss itself is measured without it. 0 in raster order, for a true likelihood."
        ),
    )
    weight_decay: float = Field(
        0.03,
        ge=0,
        json_schema_extra=when(
            "0.045 is MaskGIT's. Raise it, to 0.1, if the held-out loss rises while that of training falls."
        ),
    )
    sample_steps: int = Field(
        12,
        ge=1,
        description="steps of samples, and of the finished model by default; raster: one for each code",
        json_schema_extra=when(
            "8 to 18 in the masked order (MaskGIT: 8 to 12): fewer are quicker, and show codes that do not fit each "
            "other. Raster order has as many steps as codes, and takes none."
        ),
    )
    sample_guidance_scale: float = Field(
        3.0,
        ge=1,
        json_schema_extra=when(
            "2 to 5. Raise it if samples do not show what their captions say; lower it if they become plain or "
            "alike. It needs caption_dropout in training."
        ),
    )
    min_snr_gamma: None = None
    noise_offset: float = Field(
        0.0,
        ge=0,
        le=0,
        description="codes have no noise",
        json_schema_extra=when("Never: codes have no noise."),
    )
    buckets: bool = False

    @model_validator(mode="after")
    def _check_prior(self) -> Self:
        if self.buckets:
            raise ValueError("buckets=true is not for a prior, which learns one grid of codes; leave it out")
        if self.order == "raster" and "sample_steps" in self.model_fields_set:
            raise ValueError("sample_steps is for order=masked; in raster order each code is a step")
        return self
