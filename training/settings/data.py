"""Which pictures are trained on, and how they are brought to size."""

from typing import Literal

from pydantic import Field

from latentdiff.training.settings.base import Settings

Condition = Literal["text", "class", "none"]
"""What a model is conditioned on: the caption, the caption as the name of a class, or nothing."""


class DataSettings(Settings):
    """Which pictures, and how they are brought to size."""

    data: str = Field(description="folder of pictures, WebDataset shards (*.tar), or a datasets folder or name")
    split: str = Field("train", description="split of a datasets dataset, and value of an optional 'split' column")
    image_column: str = "image"
    caption_column: str = "text"
    caption: str | None = Field(None, description="caption of every picture that has none of its own")
    streaming: bool = Field(False, description="read a datasets dataset as a stream, once, keeping a local copy")
    max_pictures: int | None = Field(None, ge=1, description="take this many of the first")
    manifest: str | None = Field(None, description="what 'latentdiff doctor' wrote: which pictures to leave out")
    max_bad_share: float = Field(0.1, ge=0, le=1, description="stop if a larger share of the pictures is unusable")
    resolution: int = Field(64, ge=8, description="side of a square picture, and root of the area of any other")
    buckets: bool = Field(False, description="keep aspect ratios: several sizes of about the same area")
    crop: Literal["center", "random"] = "center"
    random_flip: bool = True


class DoctorSettings(DataSettings):
    """Settings of ``latentdiff doctor``."""

    condition: Condition = Field("text", description="what captions are for; see DenoiserSettings")
