"""The networks of the packaged model and how one short run trains them."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self


@dataclass(frozen=True)
class BurstSettings:
    """Sizes and rates of a run. Times are in seconds since it began; batches are of one device.

    Attributes:
        size: side of the pictures in pixels.
        pool: how many composed pictures the run holds; they are composed while the autoencoder trains.
        kinds: how often to draw some kinds of scenes, instead of what `scenes.KINDS` says of them.
        max_captions: of one picture.
        tokens: L, the length that captions are padded to; what the text encoder's tokenizer says.
        equivariance: share of updates in which the latents are halved in size and must decode to the halved picture.
        snr_gamma, least_weight: how much an error counts by its noise; see `denoiser.noise_weights`.
        few_steps: how many steps the distilled denoiser draws in.
        teacher_substeps: guided DDIM steps of the teacher within each of them.
        guidance_scale: of the teacher, and so of every distilled picture.
        on_policy: share of the distillation's time after which states come from the student's own steps.
        distil_updates: of the student for each new batch of trajectories.
    """

    size: int = 128
    pool: int = 240_000
    kinds: dict[str, float] = field(default_factory=dict)
    max_captions: int = 3
    tokens: int = 32
    autoencoder_channels: tuple[int, ...] = (48, 96, 128, 128)
    latent_channels: int = 8
    norm_groups: int = 16
    autoencoder_batch: int = 64
    autoencoder_rate: float = 8e-4
    kl_weight: float = 1e-4
    perceptual_weight: float = 0.1
    equivariance: float = 0.25
    unet_channels: tuple[int, ...] = (128, 256)
    unet_layers: int = 2
    head_width: int = 64
    unet_batch: int = 512
    unet_rate: float = 8e-4
    weight_decay: float = 0.01
    caption_dropout: float = 0.1
    snr_gamma: float = 5.0
    least_weight: float = 0.15
    few_steps: int = 4
    teacher_substeps: int = 4
    guidance_scale: float = 3.5
    distil_batch: int = 512
    distil_rate: float = 3e-4
    on_policy: float = 0.5
    distil_updates: int = 12
    seed: int = 0

    @classmethod
    def read(cls, values: dict[str, Any]) -> Self:
        """Settings from a mapping such as a JSON object; what it does not name has the default.

        Raises:
            ValueError: a key that is no setting.
        """
        known = {field.name for field in fields(cls)}
        for key in values:
            if key not in known:
                raise ValueError(f"unknown setting {key!r}; there are {', '.join(sorted(known))}")
        given: dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in values.items()}
        return cls(**given)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def latent_size(self) -> int:
        return self.size // 2 ** (len(self.autoencoder_channels) - 1)

    def autoencoder_config(self) -> dict[str, Any]:
        """What `AutoencoderKL` is built of."""
        levels = len(self.autoencoder_channels)
        return {
            "block_out_channels": self.autoencoder_channels,
            "down_block_types": ("DownEncoderBlock2D",) * levels,
            "up_block_types": ("UpDecoderBlock2D",) * levels,
            "latent_channels": self.latent_channels,
            "layers_per_block": 1,
            "norm_num_groups": self.norm_groups,
            "sample_size": self.size,
        }

    def unet_config(self, text_width: int) -> dict[str, Any]:
        """What `UNet2DConditionModel` is built of; every level has cross-attention."""
        levels = len(self.unet_channels)
        return {
            "sample_size": self.latent_size,
            "in_channels": self.latent_channels,
            "out_channels": self.latent_channels,
            "block_out_channels": self.unet_channels,
            "down_block_types": ("CrossAttnDownBlock2D",) * levels,
            "up_block_types": ("CrossAttnUpBlock2D",) * levels,
            "layers_per_block": self.unet_layers,
            "attention_head_dim": tuple(max(1, width // self.head_width) for width in self.unet_channels),
            "cross_attention_dim": text_width,
            "use_linear_projection": True,
        }

    def scheduler_config(self) -> dict[str, Any]:
        """The process as diffusers' `DDIMScheduler` writes it."""
        return {
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "num_train_timesteps": 1000,
            "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing",
            "clip_sample": False,
            "set_alpha_to_one": True,
            "steps_offset": 1,
        }
