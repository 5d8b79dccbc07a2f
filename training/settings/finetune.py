"""Settings of ``latentdiff finetune``, and what distillation has of them."""

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from latentdiff.training.settings.diffusion import DiffusionSettings
from latentdiff.training.settings.pictures import MaskSettings
from latentdiff.training.settings.run import RunSettings


class AdaptedSettings(DiffusionSettings):
    """What fine-tuning and distillation share, which start from a finished model."""

    model: str
    method: str
    resolution: int = Field(0, ge=0, le=16_384, description="0: the model's own")
    warmup_steps: int = Field(0, ge=0)
    sample_every: int = Field(100, ge=1)
    checkpoint_every: int = Field(100, ge=1)
    lora_rank: int = Field(0, ge=0, description="of a LoRA that is trained in place of the weights; 0: none")
    lora_alpha: float | None = Field(None, gt=0, description="default: the rank")
    lora_targets: tuple[str, ...] = Field(
        ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2"),
        description="layers of the UNet's blocks; the first four alone, as is usual, learn colours better than shapes",
    )

    @model_validator(mode="after")
    def _check_snapshots(self) -> Self:
        if self.ema_snapshots and (self.lora_rank or self.method in ("lora", "textual-inversion")):
            raise ValueError("ema_snapshots are for whole networks; for adapters and words take ema_decay")
        return self


Adapter = Literal["lora", "dora", "loha", "lokr", "oft"]
"""LoRA and its relatives."""


class FinetuneSettings(AdaptedSettings, MaskSettings):
    """Settings of ``latentdiff finetune``."""

    fixed: ClassVar[tuple[str, ...]] = (
        *(*RunSettings.fixed, "method", "adapter", "lora_rank", "lora_alpha", "lora_targets", "train_text_encoder"),
        *("placeholder_token", "initializer_token", "num_vectors", "process", "process_options"),
    )
    unsettled = ("lora_targets",)  # of a transformer

    model: str = Field(
        "emoji", description="what to start from: a packaged model, a pipeline folder, a .safetensors file, a hub id"
    )
    method: Literal["full", "lora", "dreambooth", "textual-inversion"] = Field(
        "lora", description="what is trained: all of the UNet, a LoRA, one subject, or a new word"
    )
    batch_size: int = Field(4, ge=1)
    max_steps: int = Field(400, ge=1)
    learning_rate: float = Field(
        1e-3,
        gt=0,
        description="default by method: full 1e-5, dreambooth 5e-6, textual-inversion 5e-3, a LoRA 1e-3",
    )
    ema_decay: float = Field(0.0, ge=0, lt=1)
    process: str = Field(
        "model", description="how noise is mixed in: as the model knows it; or flow, gaussian, which it is then taught"
    )
    process_options: dict[str, Any] = Field({}, description="arguments of the process; see DenoiserSettings")
    lora_rank: int = Field(0, ge=0, description="0: 16 for method=lora, and no LoRA with dreambooth")
    adapter: Adapter = Field(
        "lora",
        description="what a LoRA is: dora (magnitude apart), loha (Hadamard product), lokr (Kronecker product), oft "
        "(rotations in blocks of lora_rank)",
    )
    train_text_encoder: bool = Field(False, description="train the text encoder too, by the same method")
    class_prompt: str | None = Field(None, description="dreambooth: what the subject is one of, such as 'a dog'")
    class_pictures: int = Field(100, ge=1, description="dreambooth: how many pictures of the class to draw and keep")
    prior_loss_weight: float = Field(1.0, ge=0, description="dreambooth: weight of the class pictures' loss")
    placeholder_token: str | None = Field(None, description="textual inversion: the new word, such as '<my-cup>'")
    initializer_token: str | None = Field(None, description="textual inversion: a word to start from, such as 'cup'")
    num_vectors: int = Field(1, ge=1, le=1000, description="textual inversion: tokens behind the new word")

    @model_validator(mode="after")
    def _check_method(self) -> Self:
        rates = {"full": 1e-5, "lora": 1e-3, "dreambooth": 5e-6, "textual-inversion": 5e-3}
        self.follow(learning_rate=rates["lora" if self.lora_rank else self.method])
        if self.adapter != "lora" and self.method == "dreambooth" and not self.lora_rank:
            raise ValueError(f"adapter={self.adapter} needs a lora_rank=16 or so with method=dreambooth")
        if self.adapter == "oft" and self.lora_alpha is not None:
            raise ValueError("lora_alpha does nothing with adapter=oft, whose rotations have no strength; leave it out")
        if self.process == "model" and self.process_options:
            raise ValueError(
                "process_options are for a process that is named; give process=flow or process=gaussian too"
            )
        if self.process != "model" and self.method == "textual-inversion":
            raise ValueError(f"a new word does not teach process={self.process}; leave it out, or take method=full")
        if self.process == "flow" or self.process_options.get("zero_terminal_snr"):
            self.follow(min_snr_gamma=None)
        if self.method == "dreambooth" and not (self.caption and self.class_prompt):
            raise ValueError("dreambooth needs caption='a photo of sks dog' and class_prompt='a photo of a dog'")
        if self.method == "textual-inversion" and not (self.placeholder_token and self.initializer_token):
            raise ValueError("textual-inversion needs placeholder_token='<my-cup>' and initializer_token='cup'")
        return self
