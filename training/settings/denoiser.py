"""Settings of ``latentdiff train denoiser``."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from latentdiff.interchange.user_files import MAX_TRAIN_TIMESTEPS
from latentdiff.training.settings.base import when
from latentdiff.training.settings.diffusion import DiffusionSettings, follow_channels, widths_with_attention
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
        description="folder of an autoencoder, a pipeline folder or .safetensors file with one; 'pixels': none",
        json_schema_extra=when(
            "It is always given. Latents of an autoencoder for pictures from 64 pixels on: a factor of 8 makes 64 "
            "times fewer places to compute at. pixels for smaller ones, and to repeat DDPM and ADM. What it cannot "
            "give back the model cannot draw: look at its reconstructions, or ask 'latentdiff doctor --model'. The "
            "packaged emoji's is for drawings only."
        ),
    )
    condition: Condition = Field(
        "text",
        description="what the denoiser is conditioned on: the caption; the caption as a class; nothing",
        json_schema_extra=when(
            "class where kinds have names and no more is said: it learns sooner and needs no text encoder. none to "
            "draw more of the same, or to be guided by a classifier later. Otherwise text."
        ),
    )
    text_encoder: str = Field(
        "emoji",
        description="folder with text_encoder/ and tokenizer/, or a packaged model",
        json_schema_extra=when(
            "A CLIP or T5 folder for captions of many words and scenes (openai/clip-vit-large-patch14 is Stable "
            "Diffusion 1's); it costs memory when drawing, and hardly any time in training, where captions are "
            "cached. The packaged one, all-MiniLM-L6-v2, does for short names of things."
        ),
    )
    block_out_channels: tuple[int, ...] = Field(
        (128, 256, 256),
        description="channels of each level; each is half as large as the one before",
        json_schema_extra=when(
            "More channels if the loss of training itself stops falling early, with time and memory growing as "
            "their square; fewer for a trial. Packaged: [128, 256]; DDPM, 32 pixels: [128, 256, 256, 256]; Stable "
            "Diffusion 1: [320, 640, 1280, 1280]. One level more for each doubling of the latents' side, so that "
            "the last is 8 or 16 wide or less."
        ),
    )
    layers_per_block: int = Field(
        1,
        ge=1,
        description="residual blocks in a level",
        json_schema_extra=when(
            "2 is usual (DDPM, Stable Diffusion), 3 is ADM's at 64 pixels. More depth costs time in proportion and "
            "helps detail; on a few cores 1."
        ),
    )
    attention_levels: tuple[bool, ...] = Field(
        (True, True, True),
        description="which levels have attention",
        json_schema_extra=when(
            "Text is read only in levels with attention, and the middle. Switch it off in the first level where "
            "latents are larger than 32 to save time, which there grows with the fourth power of the side; ADM has "
            "it at 32, 16 and 8."
        ),
    )
    attention_head_dim: int = Field(
        64,
        ge=8,
        description="width of one attention head",
        json_schema_extra=when(
            "64 is ADM's finding (Table 2) and what fast kernels like; it has to be at most the channels of a level "
            "with attention. 32 for very narrow networks."
        ),
    )
    transformer_layers_per_block: int = Field(
        1,
        ge=1,
        description="transformer layers in each attention",
        json_schema_extra=when(
            "Raise it, to 2 to 10 as SDXL in its lower levels, for long prompts of many things; the time grows with "
            "it in all levels alike. 1 is Stable Diffusion 1's and does for short captions."
        ),
    )
    norm_num_groups: int = Field(
        32,
        ge=1,
        description="groups of the group normalisation; divides every number of channels",
        json_schema_extra=when(
            "It follows the channels by itself. Only to give a folder the same config as another model's, 32 for "
            "Stable Diffusion and ADM."
        ),
    )
    resnet_time_scale_shift: Literal["default", "scale_shift"] = Field(
        "default",
        description="scale_shift: ADM's adaptive group normalisation",
        json_schema_extra=when(
            "Take scale_shift for models without text: the timestep and the class then scale features too, which "
            "ADM found better (Table 3). default keeps the folder Stable Diffusion's kind."
        ),
    )
    resample_type: Literal["conv", "resnet"] = Field(
        "conv",
        description="what halves and doubles; resnet: ADM's blocks (not with condition=text)",
        json_schema_extra=when(
            "Take resnet to repeat ADM (BigGAN's blocks): somewhat better figures for some more time, and not with "
            "text. Otherwise conv."
        ),
    )
    process: str = Field(
        "gaussian",
        description="how noise is mixed in; gaussian, flow (rectified), or an extension's",
        json_schema_extra=when(
            "Take flow for straight paths, which draw well in fewer steps with a first-order solver, and for "
            "transformers as in Stable Diffusion 3. gaussian is what most programs and fine-tuned models expect, "
            "and what all methods of 'latentdiff distill' take."
        ),
    )
    process_options: dict[str, Any] = Field(
        {},
        description="arguments of another process than gaussian: with flow shift, times, weighting and more",
        json_schema_extra=when(
            "With process=flow: shift: 3 for latents of 64 and more on a side (Stable Diffusion 3, at 1024 pixels), "
            "1 for small ones; times: logit_normal learns the middle most and is the paper's best, uniform is the "
            "safe comparison. Look at the held-out loss by bands of noise to see which band lags."
        ),
    )
    denoiser: str = Field(
        "unet",
        description="the network; unet, dit (a transformer), or one that an extension registers",
        json_schema_extra=when(
            "Take dit where there are many pictures and a GPU: it gains more from size than a UNet. In minutes on a "
            "few cores the two are near each other."
        ),
    )
    denoiser_options: dict[str, Any] = Field(
        {},
        description="arguments of another network than unet: with dit depth, width, heads, patch_size",
        json_schema_extra=when(
            "With denoiser=dit. DiT-S: depth 12, width 384; DiT-B: 12, 768, heads 12; DiT-L: 24, 1024, heads 16; "
            "DiT-XL: 28, 1152, heads 16. patch_size 2; 1 for latents of 8 or 16 on a side, in four times as many "
            "tokens; 4 to save time at the cost of detail."
        ),
    )
    noise_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = Field(
        "scaled_linear",
        description="how the noise grows with the timestep",
        json_schema_extra=when(
            "scaled_linear is Stable Diffusion's, for latents. squaredcos_cap_v2 (Improved DDPM) for pixels at 32 "
            "and 64, where linear noise destroys too early; linear to repeat DDPM and ADM at 256. Compare at the "
            "samples: held-out losses of different schedules are not of the same noise."
        ),
    )
    num_train_timesteps: int = Field(
        1000,
        ge=2,
        le=MAX_TRAIN_TIMESTEPS,
        description="timesteps of the diffusion",
        json_schema_extra=when(
            "Leave it at 1000, which all that draws with such models expects; 4000 only to repeat Improved DDPM's "
            "bits per dimension. It does not change the time of training or of drawing."
        ),
    )
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = Field(
        "v_prediction",
        description="what the network predicts: the noise, v or the clean latents",
        json_schema_extra=when(
            "epsilon to be of Stable Diffusion 1's or DDPM's kind, without zero_terminal_snr. v_prediction "
            "(Salimans & Ho 2022) is sound at all noise levels, and best to distill. sample is there to compare."
        ),
    )
    min_snr_gamma: float | None = Field(
        None,
        gt=0,
        description="limit on the weight of little noise (min-SNR), which leaves pure noise none; null: none; "
        "default without zero_terminal_snr: 5",
        json_schema_extra=when(
            "5 (Hang et al. 2023) with prediction_type=epsilon, which otherwise spends itself on noise that the eye "
            "does not see; it is the default there. null with zero_terminal_snr, since it would give pure noise no "
            "weight, and for learned variances (loss=hybrid, as in the paper)."
        ),
    )
    zero_terminal_snr: bool = Field(
        True,
        description="let the last timestep be noise alone, so that pictures may be all dark or bright",
        json_schema_extra=when(
            "Leave it true, with which pictures may be all dark or bright (Lin et al. 2023). Set it false only to "
            "make a model exactly of Stable Diffusion 1's or DDPM's kind; it is so with prediction_type=epsilon."
        ),
    )
    loss: Literal["simple", "l1", "hybrid", "bound"] = Field(
        "simple",
        description="hybrid, bound: learn the variances too (DDPM sampler)",
        json_schema_extra=when(
            "hybrid (Improved DDPM) to measure or improve bits per dimension, and to draw with the DDPM sampler in "
            "25 to 100 steps; bound for the best bits and worse pictures, with timestep_sampler=loss_second_moment. "
            "l1 is there to compare. Otherwise simple."
        ),
    )
    p2_gamma: float = Field(
        0.0,
        ge=0,
        description="P2 weighting instead of min_snr_gamma; 0: none",
        json_schema_extra=when(
            "1 (Choi et al. 2022) in place of min_snr_gamma when shapes come out wrong and details right: it moves "
            "weight from little noise to the middle."
        ),
    )
    timestep_sampler: Literal["uniform", "loss_second_moment"] = Field(
        "uniform",
        description="loss_second_moment: more of the timesteps with large losses; for loss=bound",
        json_schema_extra=when(
            "loss_second_moment with loss=bound, whose losses differ by thousands between timesteps; without it "
            "that loss is too noisy to learn by. Of no use to other losses. It begins after ten losses of each "
            "timestep."
        ),
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
