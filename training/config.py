"""Training settings: one typed, strict object per trainer, filled from YAML and ``key=value`` overrides."""

import difflib
import math
import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

Condition = Literal["text", "class", "none"]
"""What a model is told of a picture."""


def yaml_no(value: Any) -> Any:
    """YAML reads a bare ``no`` as False; where "no" is a choice, that is what was meant."""
    return "no" if value is False else value


class Settings(BaseModel):
    """Base of the settings: unknown keys and values of the wrong type are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    @classmethod
    def load(cls, file: str | os.PathLike[str] | None = None, overrides: dict[str, Any] | None = None) -> Self:
        """Settings from a YAML file, then from `overrides` (``None`` values are left out; strings are read as YAML).

        Raises:
            ValueError: an unknown key (the nearest known one is named), or a value of the wrong type or range.
            FileNotFoundError: `file` does not exist.
        """
        values: dict[str, Any] = {}
        if file is not None:
            values = yaml.safe_load(Path(file).read_text(encoding="utf-8")) or {}
            if not isinstance(values, dict):
                raise ValueError(f"{file}: expected 'key: value' lines, found a {type(values).__name__}")
        for key, value in (overrides or {}).items():
            if value is not None:
                values[key] = yaml.safe_load(value) if isinstance(value, str) and key not in cls._plain() else value
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ValueError("\n".join(cls._explain(item) for item in error.errors())) from None

    @classmethod
    def _plain(cls) -> set[str]:
        """Keys whose values are taken as they are typed: names and paths, which YAML could turn into something else."""
        return {name for name, field in cls.model_fields.items() if field.annotation in (str, str | None)}

    @classmethod
    def _explain(cls, item: Any) -> str:
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            near = difflib.get_close_matches(key, cls.model_fields, n=1)
            return f"unknown setting {key!r}" + (f"; did you mean {near[0]!r}?" if near else "")
        if item["type"] == "missing":
            return f"setting {key!r} is needed"
        return f"setting {key!r}: {item['msg']} (got {item['input']!r})" if key else str(item["msg"])

    def save(self, file: Path) -> None:
        """Write the settings in force as YAML, whole or not at all."""
        partial = file.with_name(f".partial-{os.getpid()}-{file.name}")
        partial.write_text(yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True), encoding="utf-8")
        os.replace(partial, file)


class DataSettings(Settings):
    """Which pictures, and how they are brought to size."""

    data: str = Field(description="folder of pictures, WebDataset shards (*.tar), or a datasets folder or name")
    split: str = Field("train", description="split of a datasets dataset, and value of an optional 'split' column")
    image_column: str = "image"
    caption_column: str = "text"
    caption: str | None = Field(None, description="caption of every picture that has none of its own")
    streaming: bool = Field(False, description="read a datasets dataset as a stream, once, keeping a local copy")
    max_pictures: int | None = Field(None, ge=1, description="take the first so many")
    manifest: str | None = Field(None, description="what 'latentdiff doctor' wrote: which pictures to leave out")
    max_bad_share: float = Field(0.1, ge=0, le=1, description="stop if a larger share of the pictures is unusable")
    resolution: int = Field(64, ge=8, description="side of a square picture, and root of the area of any other")
    buckets: bool = Field(False, description="keep aspect ratios: several sizes of about the same area")
    crop: Literal["center", "random"] = "center"
    random_flip: bool = True


class DoctorSettings(DataSettings):
    """Settings of ``latentdiff doctor``."""

    condition: Condition = Field("text", description="what captions are for; see DenoiserSettings")


class RunSettings(DataSettings):
    """What every training run has. Steps are optimizer steps; the batch size is that of one process's one pass."""

    output: str = Field(description="folder that receives the model; its training/ holds checkpoints and samples")
    batch_size: int = Field(32, ge=1)
    gradient_accumulation_steps: int = Field(1, ge=1)
    max_steps: int = Field(10_000, ge=1)
    optimizer: Literal["adamw", "adamw8bit", "adafactor", "sgd"] = "adamw"
    learning_rate: float = Field(2e-4, gt=0)
    warmup_steps: int = Field(100, ge=0)
    decay_steps: int = Field(0, ge=0, description="the learning rate falls to zero over this many last steps")
    decay_shape: Literal["linear", "cosine"] = "linear"
    weight_decay: float = Field(0.01, ge=0)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.99, gt=0, lt=1)
    max_grad_norm: float = Field(1.0, gt=0)
    ema_decay: float = Field(0.999, ge=0, lt=1, description="of the averaged weights that are saved; 0: no average")
    ema_warmup: bool = Field(True, description="let the average follow faster at first: (1 + step) / (10 + step)")
    mixed_precision: Annotated[Literal["no", "bf16", "fp16"], BeforeValidator(yaml_no)] = "no"
    gradient_checkpointing: bool = Field(False, description="less memory, about a third more time")
    compile: bool = Field(False, description="torch.compile the network that is trained")
    seed: int = Field(0, ge=0)
    num_workers: int = Field(0, ge=0)
    on_bad_loss: Literal["stop", "skip"] = Field("stop", description="when a loss is not finite, or explodes")
    explosion: float = Field(1000.0, gt=1, description="a loss this many times the recent mean is a bad one")
    checkpoint_every: int = Field(500, ge=1)
    keep_checkpoints: int = Field(2, ge=1)
    sample_every: int = Field(500, ge=1, description="draw samples and measure on held-out pictures this often")
    log_every: int = Field(10, ge=1)
    report_to: tuple[Literal["tensorboard", "wandb"], ...] = ()
    push_to_hub: str | None = Field(None, description="'owner/name' on the hub that gets the finished model")
    max_minutes: float | None = Field(None, gt=0, description="stop cleanly after this long; run again to go on")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.warmup_steps + self.decay_steps > self.max_steps:
            raise ValueError("warmup_steps + decay_steps is more than max_steps")
        return self

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, constant, then a fall to zero over the last `decay_steps`. step: optimizer steps, from 0."""
        warmup = min(1.0, (step + 1) / max(self.warmup_steps, 1))
        left = min(1.0, max(0.0, (self.max_steps - step) / self.decay_steps)) if self.decay_steps else 1.0
        decay = left if self.decay_shape == "linear" else 0.5 - 0.5 * math.cos(math.pi * left)
        return self.learning_rate * warmup * decay


class AutoencoderSettings(RunSettings):
    """Settings of ``latentdiff train autoencoder``."""

    kind: Literal["kl", "vq", "gumbel", "fsq"] = "kl"
    block_out_channels: tuple[int, ...] = (32, 64, 128)
    attention_levels: tuple[bool, ...] = Field((), description="levels with attention; the middle always has it")
    layers_per_block: int = Field(1, ge=1)
    latent_channels: int = Field(4, ge=1)
    norm_num_groups: int = Field(16, ge=1)

    kl_weight: float = Field(1e-6, ge=0, description="weight of the KL term, summed over a picture's latents (kl)")

    num_vq_embeddings: int = Field(1024, ge=2, description="size of the codebook (vq, gumbel)")
    codebook: Literal["ema", "learned"] = Field("ema", description="codes as moving averages, or by gradient (vq)")
    codebook_decay: float = Field(0.99, ge=0, lt=1, description="of the moving averages (vq)")
    codebook_distance: Literal["euclidean", "cosine"] = "euclidean"
    codebook_start: Literal["kmeans", "data", "none"] = Field("kmeans", description="first codes, from data (vq)")
    codebook_restart: int = Field(100, ge=0, description="updates after which an unused code moves; 0: never (vq)")
    commitment_weight: float = Field(1.0, ge=0, description="how strongly vectors are drawn to their codes (vq)")
    fsq_levels: tuple[Annotated[int, Field(ge=2)], ...] = Field((8, 5, 5, 5), description="levels per channel (fsq)")
    gumbel_temperature: float = Field(1.0, gt=0, description="at the beginning (gumbel)")
    gumbel_temperature_end: float = Field(1 / 16, gt=0, description="from gumbel_steps on, along a cosine (gumbel)")
    gumbel_steps: int = Field(5000, ge=1)
    gumbel_kl_weight: float = Field(5e-4, ge=0, description="pull towards using all codes alike (gumbel)")

    l1_weight: float = Field(1.0, ge=0)
    l2_weight: float = Field(1.0, ge=0)
    logit_laplace_weight: float = Field(0.0, ge=0, description="of the likelihood by which DALL-E learned (gumbel)")
    perceptual_weight: float = Field(0.0, ge=0)
    perceptual_network: str | None = Field(None, description="what judges likeness; default: see the documentation")

    discriminator_weight: float = Field(0.0, ge=0, description="0: no discriminator")
    discriminator_start: int = Field(2000, ge=0, description="steps before it begins")
    discriminator_loss: Literal["hinge", "vanilla"] = "hinge"
    discriminator_channels: int = Field(64, ge=1)
    discriminator_layers: int = Field(3, ge=1)
    discriminator_norm: Literal["batch", "group"] = "batch"
    discriminator_learning_rate: float | None = Field(None, gt=0, description="default: learning_rate")
    adaptive_weight: bool = Field(True, description="balance by the gradients of the last layer (VQGAN, Eq. 7)")
    adaptive_weight_limit: float = Field(100.0, gt=0, description="the most that balance may multiply by")
    r1_weight: float = Field(0.0, ge=0, description="penalty on the discriminator's slope at real pictures")

    validation_pictures: int = Field(64, ge=1, description="how many held-out pictures are measured on")
    validation_extractor: str = Field("auto", description="features of the Frechet distance, as 'evaluate' takes it")
    latent_shift: bool = Field(False, description="save a shift of the latents too (Stable Diffusion's have none)")

    @model_validator(mode="after")
    def _check_levels(self) -> Self:
        if self.attention_levels and len(self.attention_levels) != len(self.block_out_channels):
            raise ValueError("attention_levels and block_out_channels must have the same length")
        if self.logit_laplace_weight and self.kind != "gumbel":
            raise ValueError(f"logit_laplace_weight is for kind=gumbel, not for kind={self.kind}")
        if self.latent_shift and self.kind != "kl":
            raise ValueError(f"latent_shift is for kind=kl; codes of kind={self.kind} are what they are")
        if self.compile and self.discriminator_weight and self.adaptive_weight:
            raise ValueError("compile=true does not go with adaptive_weight; set adaptive_weight=false")
        return self

    @property
    def factor(self) -> int:
        """Pixels per latent, along one side."""
        return 2 ** (len(self.block_out_channels) - 1)


class DiffusionSettings(RunSettings):
    """What training a new denoiser and fine-tuning one share."""

    min_snr_gamma: float | None = Field(5.0, gt=0)
    noise_offset: float = Field(0.0, ge=0, description="share of noise that is one value for a whole channel")
    caption_dropout: float = Field(0.1, ge=0, le=1, description="share of captions replaced by the empty one")
    caption_shuffle: bool = Field(False, description="put the parts between a caption's commas in a random order")
    caption_keep: int = Field(1, ge=0, description="so many first parts of a shuffled caption stay in place")
    cache_latents: bool = Field(True, description="encode every picture once and keep the result on disk")
    cache_text: bool = Field(True, description="encode every caption once and keep the result on disk")
    cache_dir: str | None = Field(None, description="where encoded pictures and captions are kept; default: output")
    cached_variants: int = Field(4, ge=1, description="random crops, and orders of a caption, kept in the cache")
    sample_prompts: tuple[str, ...] = ()
    sample_steps: int = Field(20, ge=1)
    sample_guidance_scale: float = Field(4.0, ge=1)


class DenoiserSettings(DiffusionSettings):
    """Settings of ``latentdiff train denoiser``."""

    autoencoder: str = Field(
        description="folder of a trained autoencoder, or a pipeline folder that has one; 'pixels': none"
    )
    condition: Condition = Field(
        "text", description="what the denoiser is told: the caption; as a class, of which it has one embedding; nothing"
    )
    text_encoder: str = Field("emoji", description="folder with text_encoder/ and tokenizer/, or a packaged model")
    block_out_channels: tuple[int, ...] = (128, 256, 256)
    layers_per_block: int = Field(1, ge=1)
    attention_levels: tuple[bool, ...] = (True, True, True)
    attention_head_dim: int = Field(64, ge=8, description="width of one attention head")
    transformer_layers_per_block: int = Field(1, ge=1)
    norm_num_groups: int = Field(32, ge=1)
    resnet_time_scale_shift: Literal["default", "scale_shift"] = Field(
        "default", description="scale_shift: ADM's adaptive group normalisation"
    )
    resample_type: Literal["conv", "resnet"] = Field(
        "conv", description="what halves and doubles; resnet: ADM's blocks (not with condition=text)"
    )
    noise_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "scaled_linear"
    num_train_timesteps: int = Field(1000, ge=2)
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "v_prediction"
    zero_terminal_snr: bool = True
    loss: Literal["simple", "l1", "hybrid", "bound"] = Field(
        "simple", description="hybrid, bound: learn the variances too (DDPM sampler)"
    )
    p2_gamma: float = Field(0.0, ge=0, description="P2 weighting in the place of min_snr_gamma; 0: none")
    timestep_sampler: Literal["uniform", "loss_second_moment"] = Field(
        "uniform", description="loss_second_moment: more of the timesteps with large losses; for loss=bound"
    )

    @model_validator(mode="after")
    def _check_levels(self) -> Self:
        if len(self.attention_levels) != len(self.block_out_channels):
            raise ValueError("attention_levels and block_out_channels must have the same length")
        if self.condition == "text" and self.resample_type != "conv":
            raise ValueError("resample_type=resnet is for condition=class or none; with text leave it at conv")
        return self

    @property
    def learns_variance(self) -> bool:
        return self.loss in ("hybrid", "bound")


class ClassifierSettings(DiffusionSettings):
    """Settings of ``latentdiff train classifier``."""

    model: str = Field(description="pipeline folder of the class-conditional or unconditional model to be guided")
    block_out_channels: tuple[int, ...] = (64, 128, 192)
    layers_per_block: int = Field(1, ge=1)
    attention_levels: tuple[bool, ...] = (False, True, True)
    attention_head_dim: int = Field(32, ge=8, description="width of one attention head")
    norm_num_groups: int = Field(32, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    pool: Literal["attention", "adaptive"] = "attention"
    resolution: int = Field(0, ge=0, description="0: the model's own")
    weight_decay: float = Field(0.05, ge=0)
    caption_dropout: float = Field(0.0, ge=0, le=0, description="a classifier always sees the class")
    sample_classifier_scale: float = Field(2.0, ge=0)
    condition: Literal["class"] = "class"
    sample_guidance_scale: float = Field(1.0, ge=1)

    @model_validator(mode="after")
    def _check_levels(self) -> Self:
        if len(self.attention_levels) != len(self.block_out_channels):
            raise ValueError("attention_levels and block_out_channels must have the same length")
        return self


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
