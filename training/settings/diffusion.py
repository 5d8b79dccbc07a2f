"""Settings of ``latentdiff train denoiser``, ``latentdiff train classifier`` and ``latentdiff finetune``."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from latentdiff.interchange.user_files import MAX_TRAIN_TIMESTEPS
from latentdiff.training.settings.run import Condition, MaskSettings, RunSettings


class DiffusionSettings(RunSettings):
    """What training a new denoiser and fine-tuning one share."""

    min_snr_gamma: float | None = Field(
        5.0,
        gt=0,
        description="limit on the weight of little noise (min-SNR); null: none, the default where a schedule ends in "
        "pure noise",
    )
    noise_offset: float = Field(0.0, ge=0, description="share of noise that is one value for a whole channel")
    caption_dropout: float = Field(0.1, ge=0, le=1, description="share of captions replaced by the empty one")
    caption_shuffle: bool = Field(False, description="put the parts between a caption's commas in a random order")
    caption_keep: int = Field(1, ge=0, description="this many first parts of a shuffled caption stay in place")
    cache_latents: bool = Field(True, description="encode every picture once and keep the result on disk")
    cache_text: bool = Field(True, description="encode every caption once and keep the result on disk")
    cached_variants: int = Field(
        4, ge=1, le=10_000, description="random crops, and orders of a caption, kept in the cache"
    )
    sample_prompts: tuple[str, ...] = Field(
        (), description="what samples are drawn of; default: captions of the pictures"
    )
    sample_steps: int = Field(20, ge=1, description="denoising steps of samples, and of the finished model by default")
    sample_guidance_scale: float = Field(
        4.0, ge=1, description="guidance of samples, and of the finished model by default"
    )


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
