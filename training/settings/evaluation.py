"""Settings of ``latentdiff evaluate`` and ``latentdiff likelihood``; None is the model's own."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from latentdiff.training.settings.base import Settings


class HeldOutSettings(Settings):
    """What the commands that measure a model have in common."""

    model: str = Field(
        description="A pipeline folder, a .safetensors file, a packaged model, or owner/name on the hub."
    )
    data: str = Field(description="Folder of captioned pictures, *.tar shards, or a dataset's name.")
    split: str = Field("validation", description="Which of its pictures; best those the model was not trained on.")
    count: int | None = Field(None, ge=1, description="How many pictures, at most.")
    seed: int = Field(0, ge=0, description="Picture i is drawn with SEED + i.")
    batch_size: int = Field(8, ge=1, description="Pictures at once; changes memory and speed only.")
    output: str | None = Field(None, description="Folder for the figures; by default MODEL/evaluation.")
    image_column: str = Field("image", description="Of a dataset.")
    caption_column: str = Field("text", description="Of a dataset or table.")
    picture_folder: str | None = Field(None, description="A folder outside DATA that paths in its tables may lead to.")

    def folder(self) -> Path:
        """Where the figures go.

        Raises:
            ValueError: it has to be given, as the model is no folder of the user's.
            FileNotFoundError: there is no such model.
        """
        from latentdiff.interchange.folders import packaged_models
        from latentdiff.pipelines.storage.places import local_place

        if self.output is not None:
            return Path(self.output).expanduser()
        folder = local_place(self.model)
        if folder is None or folder.is_file() or self.model in packaged_models():
            raise ValueError(f"{self.model} is no folder of yours; say with --output where the evaluation should go")
        return folder / "evaluation"


class EvaluationSettings(HeldOutSettings):
    """Settings of ``latentdiff evaluate``."""

    count: int | None = Field(None, ge=2, description="Pictures to draw; by default one for each real picture.")
    steps: int | None = Field(None, ge=1, description="Denoising steps; by default the model's.")
    guidance: float | None = Field(None, description="By default the model's.")
    extractor: str = Field(
        "auto",
        description="Features: inception (FID and KID; in torch hub's cache) or inception:FILE, timm:NAME=FILE, a "
        "transformers model's folder or owner/name, or autoencoder, the packaged encoder. auto: inception if it is in "
        "the cache, else autoencoder.",
    )
    clip: str | None = Field(
        None,
        description="For CLIP score: a transformers CLIP's folder or owner/name, or open_clip:NAME/PRETRAINED.",
    )
    output: str | None = Field(None, description="Folder for samples and evaluation.json; by default MODEL/evaluation.")


class LikelihoodSettings(HeldOutSettings):
    """Settings of ``latentdiff likelihood``."""

    model: str = Field(description="Folder of a model without text.")
    data: str = Field(description="Folder of pictures, *.tar shards, or a dataset's name.")
    steps: str | None = Field(
        None,
        description="Of the process: 25, or by sections 10,10,5, or ddim25. By default all, slow; of a flow 25.",
    )
    variance: Literal["learned_range", "fixed_small", "fixed_large"] | None = Field(
        None, description="Of the reverse steps; by default the model's."
    )
    count: int | None = Field(None, ge=1, description="Measure on this many of the first pictures.")
    seed: int = Field(0, ge=0, description="Picture i has the noise of SEED + i.")
    batch_size: int = Field(32, ge=1, description="Pictures at once; changes memory and speed only.")
    output: str | None = Field(None, description="Folder for likelihood.json; by default MODEL/evaluation.")
    caption_column: str = Field("text", description="Of a dataset or table: the class, if the model knows any.")
