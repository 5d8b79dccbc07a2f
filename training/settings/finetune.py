"""Settings of ``latentdiff finetune``."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from latentdiff.training.settings.diffusion import DiffusionSettings


class FinetuneSettings(DiffusionSettings):
    """Settings of ``latentdiff finetune``."""

    model: str = Field("emoji", description="what to start from: a packaged model, a pipeline folder, a hub id")
    method: Literal["full", "lora", "dreambooth", "textual-inversion"] = "lora"
    resolution: int = Field(0, ge=0, description="0: the model's own")
    batch_size: int = Field(4, ge=1)
    max_steps: int = Field(400, ge=1)
    learning_rate: float = Field(1e-4, gt=0, description="by default one that suits the method")
    warmup_steps: int = Field(0, ge=0)
    ema_decay: float = Field(0.0, ge=0, lt=1)
    sample_every: int = Field(100, ge=1)
    checkpoint_every: int = Field(100, ge=1)
    lora_rank: int = Field(0, ge=0, description="0: 16 for method=lora, and no LoRA with dreambooth")
    lora_alpha: float | None = Field(None, gt=0, description="default: the rank")
    lora_targets: tuple[str, ...] = Field(
        ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2"),
        description="layers of the UNet's blocks; the first four alone, as is usual, learn colours better than shapes",
    )
    train_text_encoder: bool = Field(False, description="train the text encoder too, by the same method")
    class_prompt: str | None = Field(None, description="dreambooth: what the subject is one of, such as 'a dog'")
    class_pictures: int = Field(100, ge=1, description="dreambooth: how many pictures of the class to draw and keep")
    prior_loss_weight: float = Field(1.0, ge=0, description="dreambooth: weight of the class pictures' loss")
    placeholder_token: str | None = Field(None, description="textual inversion: the new word, such as '<my-cup>'")
    initializer_token: str | None = Field(None, description="textual inversion: a word to start from, such as 'cup'")
    num_vectors: int = Field(1, ge=1, description="textual inversion: tokens behind the new word")

    @model_validator(mode="before")
    @classmethod
    def _suit_the_method(cls, values: Any) -> Any:
        rates = {"full": 1e-5, "lora": 1e-3, "dreambooth": 5e-6, "textual-inversion": 5e-3}
        method = "lora" if values.get("lora_rank") else values.get("method", "lora")
        return {"learning_rate": rates.get(method, 1e-4), **values}

    @model_validator(mode="after")
    def _check_method(self) -> Self:
        if self.method == "dreambooth" and not (self.caption and self.class_prompt):
            raise ValueError("dreambooth needs caption='a photo of sks dog' and class_prompt='a photo of a dog'")
        if self.method == "textual-inversion" and not (self.placeholder_token and self.initializer_token):
            raise ValueError("textual-inversion needs placeholder_token='<my-cup>' and initializer_token='cup'")
        return self
