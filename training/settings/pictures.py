"""Which pictures are trained on, and how they are brought to size."""

from typing import Literal, Self

from pydantic import Field, model_validator

from latentdiff.training.settings.base import Settings, when

Condition = Literal["text", "class", "none"]
"""What a model is conditioned on: the caption, the caption as the name of a class, or nothing."""


class DataSettings(Settings):
    """Which pictures, and how they are brought to size."""

    data: str = Field(
        description="folder of pictures, WebDataset shards (*.tar), or a datasets folder or name",
        json_schema_extra=when(
            "It is always given. What is in the pictures and their captions matters more than any other setting: run "
            "'latentdiff doctor' on them first. A run that goes on may have more pictures, but at least half of "
            "those it began with."
        ),
    )
    split: str = Field(
        "train",
        description="split of a datasets dataset, and value of an optional 'split' column",
        json_schema_extra=when(
            "Only if the part to train on is not called 'train'. 'validation' is better left to measuring: what is "
            "trained on says nothing about other pictures."
        ),
    )
    image_column: str = Field(
        "image",
        description="column of a dataset with the pictures",
        json_schema_extra=when("Only for a datasets dataset that keeps its pictures in a column of another name."),
    )
    caption_column: str = Field(
        "text",
        description="column of a dataset or table with the captions",
        json_schema_extra=when(
            "When the captions, or with condition=class the classes, are in a column of another name. Where a "
            "dataset has several columns of captions, take the one that is written as you will write prompts."
        ),
    )
    caption: str | None = Field(
        None,
        description="caption of every picture that has none of its own",
        json_schema_extra=when(
            "When pictures have no captions. One caption for all teaches one thing, and whatever the pictures share "
            "goes into it, backgrounds too; captions of each picture's own keep things apart ('latentdiff caption' "
            "writes some). With dreambooth it is the subject's phrase."
        ),
    )
    picture_folder: str | None = Field(
        None,
        description="a folder outside data that paths in its tables may lead to",
        json_schema_extra=when(
            "Only if your own tables name files outside data. Such files are refused otherwise, so that a table from "
            "elsewhere cannot read your disk."
        ),
    )
    streaming: bool = Field(
        False,
        description="read a datasets dataset as a stream, once, keeping a local copy",
        json_schema_extra=when(
            "When a dataset on the hub is too large to download as a whole first and you want its first "
            "max_pictures, or the disk has no room for both the download and what datasets makes of it. Leave it "
            "false for what is on your disk: reading that is faster, and masks work."
        ),
    )
    max_pictures: int | None = Field(
        None,
        ge=1,
        description="take this many of the first",
        json_schema_extra=when(
            "For a trial: a few hundred show in minutes whether everything fits. Remove it for the real run; they "
            "are the first ones, not a random choice."
        ),
    )
    manifest: str | None = Field(
        None,
        description="what 'latentdiff doctor' wrote: which pictures to leave out",
        json_schema_extra=when(
            "When 'latentdiff doctor --manifest FILE' found pictures that you do not want, such as duplicates: set "
            "use to false in their lines. What a manifest leaves out does not count for max_bad_share."
        ),
    )
    max_bad_share: float = Field(
        0.1,
        ge=0,
        le=1,
        description="stop if a larger share of the pictures is unusable",
        json_schema_extra=when(
            "Raise it, to 1 if need be, when you have looked at what doctor says and can do without those pictures. "
            "Lower it to 0 where each picture counts and a half-copied folder must stop the run."
        ),
    )
    resolution: int = Field(
        64,
        ge=8,
        le=16_384,
        description="side of a square picture, root of the area of any other",
        json_schema_extra=when(
            "To the size you will draw at. Twice the side is four times the time and memory, and more where "
            "attention is at full size, so develop small. It is a multiple of the autoencoder's factor; above the "
            "pictures' own size it only learns blur. Latent Diffusion trains autoencoders at 256."
        ),
    )
    buckets: bool = Field(
        False,
        description="keep aspect ratios: several sizes of about the same area",
        json_schema_extra=when(
            "Set it true when pictures have several shapes and what is at their edges matters: otherwise all are cut "
            "to squares ('doctor' counts what is cut away). Pictures of one update share a shape, so it wants "
            "several times batch_size pictures of each common shape. Shapes go up to 1:2."
        ),
    )
    crop: Literal["center", "random"] = Field(
        "center",
        description="which part of a picture is kept where it is of another shape",
        json_schema_extra=when(
            "Take random for many pictures of textures or scenes, and for autoencoders, which learn from any part "
            "(as Latent Diffusion's do); it shows other parts of the same pictures. Leave center where captions name "
            "things that a crop could cut off. It changes nothing for pictures of the trained shape. With "
            "cache_latents there are cached_variants crops of each."
        ),
    )
    random_flip: bool | Literal["auto"] = Field(
        "auto",
        description="mirror pictures at random; auto: but those whose captions speak of left, right or text",
        json_schema_extra=when(
            "Set it false where sides matter and captions do not say so: letters, logos, faces and subjects that are "
            "not symmetric (a scar, a parting). Set it true only if captions speak of left and right and you do not "
            "care. Mirroring doubles a small data set, and its cache."
        ),
    )


class MaskSettings(DataSettings):
    """What of the pictures the loss looks at."""

    mask_column: str | None = Field(
        None,
        description="column of a dataset or table with the pictures' masks; null: NAME.mask.png beside NAME.jpg",
        json_schema_extra=when(
            "Only for masks in a column of a table or dataset. Masks in files beside the pictures are found without it."
        ),
    )
    masked_loss: bool | Literal["auto"] = Field(
        "auto",
        description="look at each picture where its mask is white; auto: where the pictures have masks",
        json_schema_extra=when(
            "Set it false to learn whole pictures although masks lie beside them. Masks help where one thing of each "
            "picture should be learned and backgrounds repeat; with backgrounds that differ, captions that name "
            "them do as well."
        ),
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

    resolution: int = Field(
        128,
        ge=8,
        le=16_384,
        description="default: --model's own; 128, as of the packaged model",
        json_schema_extra=when(
            "To the resolution that you will train at, so that pictures are judged for it: which are too small, and "
            "what cropping cuts away. With --model it need not be given."
        ),
    )
    condition: Condition = Field(
        "text",
        description="what captions are for; see DenoiserSettings",
        json_schema_extra=when(
            "Set it to class or none as in the training: with none no captions are asked for, with class captions "
            "are counted as names."
        ),
    )
