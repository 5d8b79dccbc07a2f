"""Training settings: one typed, strict object per trainer, filled from YAML and ``key=value`` overrides."""

import difflib
import os
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator


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
        """Write the settings in force as YAML."""
        file.write_text(yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True), encoding="utf-8")


class RunSettings(Settings):
    """What every training run has. Steps are optimizer steps; the batch size is that of one process's one pass."""

    data: str = Field(description="folder of pictures, or a datasets folder or name")
    output: str = Field(description="folder that receives the model; its training/ holds checkpoints and samples")
    split: str = Field("train", description="split of a datasets dataset, and value of an optional 'split' column")
    image_column: str = "image"
    caption_column: str = "text"
    resolution: int = Field(64, ge=8, description="pictures are resized and centre-cropped to this many pixels")
    random_flip: bool = True
    batch_size: int = Field(32, ge=1)
    gradient_accumulation_steps: int = Field(1, ge=1)
    max_steps: int = Field(10_000, ge=1)
    learning_rate: float = Field(2e-4, gt=0)
    warmup_steps: int = Field(100, ge=0)
    decay_steps: int = Field(0, ge=0, description="the learning rate falls to zero over this many last steps")
    weight_decay: float = Field(0.01, ge=0)
    adam_beta2: float = Field(0.99, gt=0, lt=1)
    max_grad_norm: float = Field(1.0, gt=0)
    ema_decay: float = Field(0.999, ge=0, lt=1)
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    compile: bool = Field(False, description="torch.compile the network that is trained")
    seed: int = 0
    num_workers: int = Field(0, ge=0)
    checkpoint_every: int = Field(500, ge=1)
    keep_checkpoints: int = Field(2, ge=1)
    sample_every: int = Field(500, ge=1)
    max_minutes: float | None = Field(None, gt=0, description="stop cleanly after this long; run again to go on")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.warmup_steps + self.decay_steps > self.max_steps:
            raise ValueError("warmup_steps + decay_steps is more than max_steps")
        return self

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, constant, then linear decay to zero over the last `decay_steps`. step: from 0."""
        warmup = min(1.0, (step + 1) / max(self.warmup_steps, 1))
        decay = min(1.0, (self.max_steps - step) / self.decay_steps) if self.decay_steps else 1.0
        return self.learning_rate * warmup * max(decay, 0.0)


class AutoencoderSettings(RunSettings):
    """Settings of ``latentdiff train autoencoder``."""

    kind: Literal["kl", "vq"] = "kl"
    block_out_channels: tuple[int, ...] = (32, 64, 128)
    layers_per_block: int = Field(1, ge=1)
    latent_channels: int = Field(4, ge=1)
    norm_num_groups: int = Field(16, ge=1)
    num_vq_embeddings: int = Field(1024, ge=2, description="size of the codebook (vq)")
    kl_weight: float = Field(1e-6, ge=0, description="weight of the KL term, summed over a picture's latents (kl)")
    l1_weight: float = Field(1.0, ge=0)
    l2_weight: float = Field(1.0, ge=0)
    perceptual_weight: float = Field(0.0, ge=0)
    perceptual_weights: str | None = Field(None, description="file with the perceptual network's weights")

    @property
    def factor(self) -> int:
        """Pixels per latent, along one side."""
        return 2 ** (len(self.block_out_channels) - 1)


class DenoiserSettings(RunSettings):
    """Settings of ``latentdiff train denoiser``."""

    autoencoder: str = Field(description="folder of a trained autoencoder, or a pipeline folder that has one")
    text_encoder: str = Field("emoji", description="folder with text_encoder/ and tokenizer/, or a packaged model")
    block_out_channels: tuple[int, ...] = (128, 256, 256)
    layers_per_block: int = Field(1, ge=1)
    attention_levels: tuple[bool, ...] = (True, True, True)
    attention_head_dim: int = Field(64, ge=8, description="width of one attention head")
    transformer_layers_per_block: int = Field(1, ge=1)
    norm_num_groups: int = Field(32, ge=1)
    noise_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "scaled_linear"
    num_train_timesteps: int = Field(1000, ge=2)
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "v_prediction"
    zero_terminal_snr: bool = True
    min_snr_gamma: float | None = Field(5.0, gt=0)
    caption_dropout: float = Field(0.1, ge=0, le=1, description="share of captions replaced by the empty one")
    cache_dir: str | None = Field(None, description="where encoded pictures and captions are kept; default: output")
    sample_prompts: tuple[str, ...] = ()
    sample_steps: int = Field(20, ge=1)
    sample_guidance_scale: float = Field(4.0, ge=1)

    @model_validator(mode="after")
    def _check_levels(self) -> Self:
        if len(self.attention_levels) != len(self.block_out_channels):
            raise ValueError("attention_levels and block_out_channels must have the same length")
        return self
