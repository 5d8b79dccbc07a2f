"""Settings of ``latentdiff finetune``, and what distillation has of them."""

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from latentdiff.training.settings.base import when
from latentdiff.training.settings.diffusion import DiffusionSettings
from latentdiff.training.settings.pictures import MaskSettings
from latentdiff.training.settings.run import RunSettings


class AdaptedSettings(DiffusionSettings):
    """What fine-tuning and distillation share, which start from a finished model."""

    model: str
    method: str
    resolution: int = Field(
        0,
        ge=0,
        le=16_384,
        description="0: the model's own",
        json_schema_extra=when(
            "Leave it at 0 unless your pictures are smaller than the model's own size, or time and memory are "
            "short: a model that is trained far below its size draws worse at it. Larger than its own costs time "
            "and needs many steps until shapes do not repeat."
        ),
    )
    warmup_steps: int = Field(
        0,
        ge=0,
        json_schema_extra=when(
            "50 to 500 when all weights are trained or the rate is high: Adam's first steps are as large as any, "
            "before it knows the gradients. A LoRA begins at no change and needs none."
        ),
    )
    sample_every: int = Field(
        100,
        ge=1,
        json_schema_extra=when(
            "Lower it, to 50, to see the moment when a style or subject is there and before it is copied; raise it "
            "if drawing takes a good part of the time (--dry-run says how much), as on processors."
        ),
    )
    checkpoint_every: int = Field(
        100,
        ge=1,
        json_schema_extra=when(
            "As with sample_every, so that there is a checkpoint where a sample looks best. Of a LoRA they are "
            "small and quick; of all weights some gigabytes, so 500 or more."
        ),
    )
    lora_rank: int = Field(
        0,
        ge=0,
        description="of a LoRA that is trained in place of the weights; 0: none",
        json_schema_extra=when(
            "4 to 8 for one subject, 16 to 64 for a style or many things. Raise it if shapes are not learned "
            "however long it trains; lower it if pictures are copied. diffusers' scripts have 4 by default, 64 for "
            "latent consistency. The file and the time grow with it a little."
        ),
    )
    lora_alpha: float | None = Field(
        None,
        gt=0,
        description="default: the rank",
        json_schema_extra=when(
            "Leave it: at the rank, the LoRA counts as it is learned. Half or twice the rank is half or twice the "
            "learning rate for its output, near enough; give it to repeat another program's run (kohya's scripts "
            "have 1 by default)."
        ),
    )
    lora_targets: tuple[str, ...] = Field(
        ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2"),
        description="layers of the UNet's blocks; the first four alone, as is usual, learn colours better than shapes",
        json_schema_extra=when(
            "The first four names alone, to_q, to_k, to_v and to_out.0, give the small files of diffusers' scripts, "
            "which change colours and style more than shapes. Keep all for new shapes, and for a LoRA of few "
            "steps."
        ),
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
        "emoji",
        description="what to start from: a packaged model, a pipeline folder, a .safetensors file, a hub id",
        json_schema_extra=when(
            "To the model that draws most like what you want already. The packaged emoji learns drawings like its "
            "own in minutes on a processor; for photographs take Stable Diffusion 1 or, with a larger GPU, XL. "
            "'latentdiff doctor --model' says whether it can hold your pictures."
        ),
    )
    method: Literal["full", "lora", "dreambooth", "textual-inversion"] = Field(
        "lora",
        description="what is trained: all of the UNet, a LoRA, one subject, or a new word",
        json_schema_extra=when(
            "lora first: small, quick, and it forgets least. full for thousands of pictures, or where a LoRA of "
            "rank 64 does not get there. dreambooth for one subject of which you have three to ten pictures. "
            "textual-inversion if the model itself must stay as it is: it finds only what the model can draw "
            "already."
        ),
    )
    batch_size: int = Field(
        4,
        ge=1,
        json_schema_extra=when(
            "1 to 4 on a GPU that is small for the model, with gradient_accumulation_steps up to an update of 4 to "
            "16. More than there are pictures is of no use. Full fine-tuning of thousands of pictures takes 64 to "
            "256 in an update."
        ),
    )
    max_steps: int = Field(
        400,
        ge=1,
        json_schema_extra=when(
            "200 to 800 for a style or subject from few pictures (diffusers' DreamBooth: 400, with class pictures "
            "800), 3,000 for a new word, 5,000 to 20,000 for full fine-tuning. Look at samples/: not there yet, "
            "more, by the same command; copies of your pictures, fewer."
        ),
    )
    learning_rate: float = Field(
        1e-3,
        gt=0,
        description="default by method: full 1e-5, dreambooth 5e-6, textual-inversion 5e-3, a LoRA 1e-3",
        json_schema_extra=when(
            "1e-3 for a LoRA is for the packaged model and others as small. For Stable Diffusion take diffusers' "
            "values: LoRA 1e-4, full 1e-5, dreambooth of all weights 5e-6 (2e-6 with the text encoder), a new word "
            "5e-4 times the update's pictures. Burnt colours or broken shapes: a third of it. No change after 200 "
            "steps: three times."
        ),
    )
    ema_decay: float = Field(
        0.0,
        ge=0,
        lt=1,
        json_schema_extra=when(
            "0.99 for some hundred steps, 0.999 or 0.9999 for full fine-tuning of thousands: samples become "
            "steadier. 0 otherwise, since a short run is over before an average has followed."
        ),
    )
    process: str = Field(
        "model",
        description="how noise is mixed in: as the model knows it; or flow, gaussian, which it is then taught",
        json_schema_extra=when(
            "Leave it at model. flow teaches a model of noise levels rectified flow, gaussian the reverse: with "
            "method=full, thousands of pictures and thousands of steps, for all it knew of noise has to be learned "
            "anew."
        ),
    )
    process_options: dict[str, Any] = Field(
        {},
        description="arguments of the process; see DenoiserSettings",
        json_schema_extra=when(
            "With process=flow or gaussian only, as in 'latentdiff train denoiser': for instance a shift of 3 for "
            "latents of 64 and more on a side."
        ),
    )
    lora_rank: int = Field(0, ge=0, description="0: 16 for method=lora, and no LoRA with dreambooth")
    adapter: Adapter = Field(
        "lora",
        description="what a LoRA is: dora (magnitude apart), loha (Hadamard product), lokr (Kronecker product), oft "
        "(rotations in blocks of lora_rank)",
        json_schema_extra=when(
            "lora unless there is a reason: all programs read it. dora often learns a little more at a low rank, in "
            "some more time; lokr makes the smallest files; loha has a higher rank for the same size; oft keeps "
            "what the model knows best. Compare the samples after as many steps."
        ),
    )
    train_text_encoder: bool = Field(
        False,
        description="train the text encoder too, by the same method",
        json_schema_extra=when(
            "Set it true if the words themselves are new to the model, or with dreambooth for faces (diffusers' "
            "README), at a lower learning_rate and more memory. Leave it false for styles: it forgets sooner what "
            "other words mean."
        ),
    )
    class_prompt: str | None = Field(
        None,
        description="dreambooth: what the subject is one of, such as 'a dog'",
        json_schema_extra=when(
            "Always with dreambooth: the subject's phrase without the rare word ('a photo of a dog' beside 'a photo "
            "of sks dog'). A class that the model draws badly is kept badly: look at training/class_pictures."
        ),
    )
    class_pictures: int = Field(
        100,
        ge=1,
        description="dreambooth: how many pictures of the class to draw and keep",
        json_schema_extra=when(
            "100 to 300 (diffusers: 200 work well for most); fewer than an update has will be learned by heart. "
            "Drawing them takes time before the training does, sample_steps steps each; later runs with the same "
            "output have them already."
        ),
    )
    prior_loss_weight: float = Field(
        1.0,
        ge=0,
        description="dreambooth: weight of the class pictures' loss",
        json_schema_extra=when(
            "1 is the paper's. Lower, to 0.5 or 0, if the subject is not learned well enough; higher if other "
            "things of its class begin to look like it."
        ),
    )
    placeholder_token: str | None = Field(
        None,
        description="textual inversion: the new word, such as '<my-cup>'",
        json_schema_extra=when(
            "Always with textual-inversion: a word that is not in the tokenizer, in brackets so that it stays "
            "whole: <my-cup>. You write it in prompts, so keep it short."
        ),
    )
    initializer_token: str | None = Field(
        None,
        description="textual inversion: a word to start from, such as 'cup'",
        json_schema_extra=when(
            "Always with textual-inversion: one common word for what it is (cup, dog, painting). The nearer, the "
            "fewer steps; it must be one token."
        ),
    )
    num_vectors: int = Field(
        1,
        ge=1,
        le=1000,
        description="textual inversion: tokens behind the new word",
        json_schema_extra=when(
            "2 to 8 if one cannot hold the look of it (the paper has 1): more is more like the pictures and obeys "
            "other words of a prompt less. Each takes a token of the prompt's 77 or so."
        ),
    )

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
