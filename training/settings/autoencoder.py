"""Settings of ``latentdiff train autoencoder``."""

import math
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from latentdiff.training.settings.run import RunSettings


class AutoencoderSettings(RunSettings):
    """Settings of ``latentdiff train autoencoder``."""

    fixed: ClassVar[tuple[str, ...]] = (
        *(*RunSettings.fixed, "kind", "block_out_channels", "attention_levels", "layers_per_block", "latent_channels"),
        *("norm_num_groups", "num_vq_embeddings", "codebook", "fsq_levels", "discriminator_channels"),
        *("discriminator_layers", "discriminator_norm"),
    )
    unsettled = ("latent_channels", "block_out_channels")  # by a teacher

    kind: Literal["kl", "vq", "gumbel", "fsq", "tiny"] = Field(
        "kl",
        description="Gaussian latents (kl), or codes: of a codebook (vq, gumbel), or rounded numbers (fsq); or a few "
        "convolutions in place of another autoencoder (tiny)",
    )
    block_out_channels: tuple[int, ...] = Field(
        (32, 64, 128),
        description="channels of each level; each is half as large as the one before, so three make 4 pixels a latent",
    )
    attention_levels: tuple[bool, ...] = Field((), description="levels with attention; the middle always has it")
    layers_per_block: int = Field(1, ge=1, description="residual blocks in a level")
    latent_channels: int = Field(4, ge=1, description="numbers per latent pixel")
    norm_num_groups: int = Field(
        16,
        ge=1,
        description="groups of the group normalisation; divides every number of channels",
    )

    kl_weight: float = Field(1e-6, ge=0, description="weight of the KL term, summed over a picture's latents (kl)")

    teacher: str | None = Field(
        None, description="folder of the autoencoder, or of a pipeline that has it, whose latents are learned (tiny)"
    )
    latents_weight: float = Field(1.0, ge=0, description="of the squared differences from the teacher's latents (tiny)")

    num_vq_embeddings: int = Field(1024, ge=2, description="size of the codebook (vq, gumbel)")
    codebook: Literal["ema", "learned"] = Field("ema", description="codes as moving averages, or by gradient (vq)")
    codebook_decay: float = Field(0.99, ge=0, lt=1, description="of the moving averages (vq)")
    codebook_distance: Literal["euclidean", "cosine"] = Field(
        "euclidean", description="by which the nearest code is found (vq)"
    )
    codebook_start: Literal["kmeans", "data", "none"] = Field("kmeans", description="first codes, from data (vq)")
    codebook_restart: int = Field(100, ge=0, description="updates after which an unused code moves; 0: never (vq)")
    commitment_weight: float = Field(1.0, ge=0, description="how strongly vectors are drawn to their codes (vq)")
    fsq_levels: tuple[Annotated[int, Field(ge=2)], ...] = Field((8, 5, 5, 5), description="levels per channel (fsq)")
    gumbel_temperature: float = Field(1.0, gt=0, description="at the beginning (gumbel)")
    gumbel_temperature_end: float = Field(1 / 16, gt=0, description="from gumbel_steps on, along a cosine (gumbel)")
    gumbel_steps: int = Field(5000, ge=1, description="over which the temperature falls (gumbel)")
    gumbel_kl_weight: float = Field(5e-4, ge=0, description="pull towards using all codes alike (gumbel)")

    l1_weight: float = Field(1.0, ge=0, description="of the absolute differences of pixels")
    l2_weight: float = Field(1.0, ge=0, description="of the squared differences of pixels")
    logit_laplace_weight: float = Field(0.0, ge=0, description="of DALL-E's logit-Laplace likelihood (gumbel)")
    perceptual_weight: float = Field(0.0, ge=0, description="of the perceptual loss; 0: none")
    perceptual_network: str | None = Field(
        None, description="network of the perceptual loss; default: see the documentation"
    )

    discriminator_weight: float = Field(0.0, ge=0, description="0: no discriminator")
    discriminator_start: int = Field(2000, ge=0, description="steps before it begins")
    discriminator_loss: Literal["hinge", "vanilla"] = Field("hinge", description="that both sides play with")
    discriminator_channels: int = Field(64, ge=1, description="of its first layer")
    discriminator_layers: int = Field(3, ge=1, description="how many halve the picture; more see larger patches")
    discriminator_norm: Literal["batch", "group"] = Field("batch", description="of its layers")
    discriminator_learning_rate: float | None = Field(None, gt=0, description="default: learning_rate")
    adaptive_weight: bool = Field(True, description="balance by the gradients of the last layer (VQGAN, Eq. 7)")
    adaptive_weight_limit: float = Field(100.0, gt=0, description="the most that balance may multiply by")
    r1_weight: float = Field(0.0, ge=0, description="penalty on the discriminator's slope at real pictures")

    validation_pictures: int = Field(64, ge=1, description="how many held-out pictures are measured on")
    validation_extractor: str = Field("auto", description="features of the Frechet distance, as 'evaluate' takes it")
    latent_shift: bool = Field(False, description="save a shift of the latents too (Stable Diffusion's have none)")

    @model_validator(mode="after")
    def _check_levels(self) -> Self:
        if (self.kind == "tiny") != (self.teacher is not None):
            raise ValueError("kind=tiny needs a teacher, the folder of an autoencoder; no other kind has one")
        if self.kind == "tiny":
            self.follow(block_out_channels=(64, 64, 64, 64), layers_per_block=3)
            if len(set(self.block_out_channels)) > 1 or self.attention_levels:
                raise ValueError("kind=tiny has no attention_levels, and all of its block_out_channels are the same")
        self.follow(norm_num_groups=math.gcd(self.norm_num_groups, *self.block_out_channels))
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
