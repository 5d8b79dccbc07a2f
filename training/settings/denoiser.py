"""Settings of ``latentdiff train denoiser`` and ``latentdiff train classifier``."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from latentdiff.interchange.user_files import MAX_TRAIN_TIMESTEPS
from latentdiff.training.settings.diffusion import DiffusionSettings
from latentdiff.training.settings.pictures import Condition, MaskSettings
from latentdiff.training.settings.run import RunSettings

GAUSSIAN = ("noise_schedule", "num_train_timesteps", "prediction_type", "zero_terminal_snr", "loss", "timestep_sampler")
UNET = (
    *("block_out_channels", "layers_per_block", "attention_levels", "attention_head_dim", "norm_num_groups"),
    *("transformer_layers_per_block", "resnet_time_scale_shift", "resample_type"),
)


class DenoiserSettings(DiffusionSettings, MaskSettings):
    """Settings of ``latentdiff train denoiser``."""

    fixed: ClassVar[tuple[str, ...]] = (
        *(*RunSettings.fixed, *GAUSSIAN, *UNET, "condition", "process", "process_options", "denoiser"),
        "denoiser_options",
    )

    autoencoder: str = Field(
        description="folder of an autoencoder, a pipeline folder or .safetensors file with one; 'pixels': none"
    )
    condition: Condition = Field(
        "text", description="what the denoiser is conditioned on: the caption; the caption as a class; nothing"
    )
    text_encoder: str = Field("emoji", description="folder with text_encoder/ and tokenizer/, or a packaged model")
    block_out_channels: tuple[int, ...] = Field(
        (128, 256, 256), description="channels of each level; each is half as large as the one before"
    )
    layers_per_block: int = Field(1, ge=1, description="residual blocks in a level")
    attention_levels: tuple[bool, ...] = Field((True, True, True), description="which levels have attention")
    attention_head_dim: int = Field(64, ge=8, description="width of one attention head")
    transformer_layers_per_block: int = Field(1, ge=1, description="transformer layers in each attention")
    norm_num_groups: int = Field(
        32,
        ge=1,
        description="groups of the group normalisation; divides every number of channels",
    )
    resnet_time_scale_shift: Literal["default", "scale_shift"] = Field(
        "default", description="scale_shift: ADM's adaptive group normalisation"
    )
    resample_type: Literal["conv", "resnet"] = Field(
        "conv", description="what halves and doubles; resnet: ADM's blocks (not with condition=text)"
    )
    process: str = Field("gaussian", description="how noise is mixed in; gaussian, flow (rectified), or an extension's")
    process_options: dict[str, Any] = Field(
        {}, description="arguments of another process than gaussian: with flow shift, times, weighting and more"
    )
    denoiser: str = Field(
        "unet", description="the network; unet, dit (a transformer), or one that an extension registers"
    )
    denoiser_options: dict[str, Any] = Field(
        {}, description="arguments of another network than unet: with dit depth, width, heads, patch_size"
    )
    noise_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = Field(
        "scaled_linear", description="how the noise grows with the timestep"
    )
    num_train_timesteps: int = Field(1000, ge=2, le=MAX_TRAIN_TIMESTEPS, description="timesteps of the diffusion")
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = Field(
        "v_prediction", description="what the network predicts: the noise, v or the clean latents"
    )
    min_snr_gamma: float | None = Field(
        None,
        gt=0,
        description="limit on the weight of little noise (min-SNR), which leaves pure noise none; null: none; "
        "default without zero_terminal_snr: 5",
    )
    zero_terminal_snr: bool = Field(
        True, description="let the last timestep be noise alone, so that pictures may be all dark or bright"
    )
    loss: Literal["simple", "l1", "hybrid", "bound"] = Field(
        "simple", description="hybrid, bound: learn the variances too (DDPM sampler)"
    )
    p2_gamma: float = Field(0.0, ge=0, description="P2 weighting instead of min_snr_gamma; 0: none")
    timestep_sampler: Literal["uniform", "loss_second_moment"] = Field(
        "uniform", description="loss_second_moment: more of the timesteps with large losses; for loss=bound"
    )

    @model_validator(mode="after")
    def _check_levels(self) -> Self:
        follow_channels(self)
        if self.condition != "text":  # where heads must not be wider than their level
            self.follow(attention_head_dim=min(self.attention_head_dim, *widths_with_attention(self)))
        if self.prediction_type == "epsilon":  # of which pure noise says nothing
            self.follow(zero_terminal_snr=False)
        if self.process == "gaussian":
            self.follow(sample_steps=min(self.sample_steps, self.num_train_timesteps))
        if self.process != "flow" and not (self.process == "gaussian" and self.zero_terminal_snr):
            self.follow(min_snr_gamma=5.0)
        self._check_extension("process", "gaussian", GAUSSIAN)
        self._check_extension("denoiser", "unet", UNET)
        if self.condition == "text" and self.resample_type != "conv":
            raise ValueError("resample_type=resnet is for condition=class or none; with text leave it at conv")
        return self

    def _check_extension(self, key: str, ours: str, keys: Sequence[str]) -> None:
        """Raises ValueError for a setting that would do nothing with this process or denoiser."""
        value, options = getattr(self, key), f"{key}_options"
        if value == ours and getattr(self, options):
            raise ValueError(f"{options} are for another {key}; {key}={ours} has settings of its own")
        ignored = sorted(self.model_fields_set & set(keys)) if value != ours else []
        if ignored:
            raise ValueError(f"{ignored[0]} is for {key}={ours} and does nothing with {key}={value}; use {options}")

    @property
    def learns_variance(self) -> bool:
        return self.loss in ("hybrid", "bound")


class ClassifierSettings(DiffusionSettings):
    """Settings of ``latentdiff train classifier``."""

    fixed: ClassVar[tuple[str, ...]] = (
        *(*RunSettings.fixed, "block_out_channels", "layers_per_block", "attention_levels", "attention_head_dim"),
        *("norm_num_groups", "pool", "resolution"),
    )
    unsettled = ("resolution",)

    model: str = Field(
        description="pipeline folder or .safetensors file of the class-conditional or unconditional model to be guided"
    )
    block_out_channels: tuple[int, ...] = Field(
        (64, 128, 192), description="channels of each level; each is half as large as the one before"
    )
    layers_per_block: int = Field(1, ge=1, description="residual blocks in a level")
    attention_levels: tuple[bool, ...] = Field((False, True, True), description="which levels have attention")
    attention_head_dim: int = Field(32, ge=8, description="width of one attention head")
    norm_num_groups: int = Field(
        32,
        ge=1,
        description="groups of the group normalisation; divides every number of channels",
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="share of activations left out")
    pool: Literal["attention", "adaptive"] = Field(
        "attention", description="how the classifier's features become one vector"
    )
    resolution: int = Field(0, ge=0, le=16_384, description="0: the model's own")
    weight_decay: float = Field(0.05, ge=0)
    caption_dropout: float = Field(0.0, ge=0, le=0, description="a classifier always sees the class")
    sample_classifier_scale: float = Field(2.0, ge=0, description="how strongly the classifier guides samples")
    condition: Literal["class"] = Field("class", description="what the classifier tells apart")
    sample_guidance_scale: float = Field(1.0, ge=1)

    @model_validator(mode="after")
    def _check_levels(self) -> Self:
        follow_channels(self)
        widths = widths_with_attention(self)
        if self.attention_head_dim > min(widths) or widths[-1] % self.attention_head_dim:  # which divides the pool
            self.follow(attention_head_dim=math.gcd(self.attention_head_dim, *widths))
        return self


def widths_with_attention(settings: DenoiserSettings | ClassifierSettings) -> list[int]:
    """Channels of the levels with attention, and of the middle, which always has it."""
    levels = zip(settings.block_out_channels, settings.attention_levels, strict=True)
    return [width for width, has in levels if has] + [settings.block_out_channels[-1]]


def follow_channels(settings: DenoiserSettings | ClassifierSettings) -> None:
    """Let the defaults follow other levels. Raises ValueError if attention was given of another number of levels."""
    levels, first = len(settings.block_out_channels), type(settings).model_fields["attention_levels"].default[0]
    if len(settings.attention_levels) != levels:
        settings.follow(attention_levels=(first, *[True] * (levels - 1)))
    settings.follow(norm_num_groups=math.gcd(settings.norm_num_groups, *settings.block_out_channels))
    if len(settings.attention_levels) != levels:
        raise ValueError(
            f"attention_levels and block_out_channels must have the same length: {len(settings.attention_levels)} and "
            f"{levels} levels"
        )
