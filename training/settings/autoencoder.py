"""Settings of ``latentdiff train autoencoder``."""

import math
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from latentdiff.training.settings.base import when
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
        json_schema_extra=when(
            "kl for diffusion, and for what other programs are to load. vq for a transformer over codes; fsq if its "
            "codebook collapses, or to have nothing to adjust; gumbel to repeat DALL-E's. tiny to decode the "
            "latents of an autoencoder that is there in a fraction of the time."
        ),
    )
    block_out_channels: tuple[int, ...] = Field(
        (32, 64, 128),
        description="channels of each level; each is half as large as the one before, so three make 4 pixels a latent",
        json_schema_extra=when(
            "One level more halves the latents' sides: a factor of 8, four levels, is Stable Diffusion's; 4 keeps "
            "more of the picture and makes diffusion at least four times dearer; 16 wants more latent_channels. "
            "Wider for photographs: [128, 256, 512, 512] is Latent Diffusion's, [16, 32, 64, 128] does for "
            "drawings."
        ),
    )
    attention_levels: tuple[bool, ...] = Field(
        (),
        description="levels with attention; the middle always has it",
        json_schema_extra=when(
            "Leave it empty for factors up to 8. At the last level of factors 8 with codes and 16, as Latent "
            "Diffusion has it; in a larger one its time grows with the fourth power of the side, and pictures of "
            "other sizes suffer."
        ),
    )
    layers_per_block: int = Field(
        1,
        ge=1,
        description="residual blocks in a level",
        json_schema_extra=when("2 is Latent Diffusion's; 1 on few cores. With kind=tiny 3, as TAESD."),
    )
    latent_channels: int = Field(
        4,
        ge=1,
        description="numbers per latent pixel",
        json_schema_extra=when(
            "More if psnr stays too low whatever the network: they keep more of the picture, and are harder to "
            "learn for the denoiser. 4 with factor 8, 3 with factor 4, 16 with factor 16 (Latent Diffusion); Stable "
            "Diffusion 3 and FLUX have 16 with factor 8. It cannot be changed later."
        ),
    )
    norm_num_groups: int = Field(
        16,
        ge=1,
        description="groups of the group normalisation; divides every number of channels",
        json_schema_extra=when("It follows the channels by itself; 32 for diffusers' usual config."),
    )

    kl_weight: float = Field(
        1e-6,
        ge=0,
        description="weight of the KL term, where both it and the likeness are sums over a picture (kl)",
        json_schema_extra=when(
            "1e-6 is Latent Diffusion's, which leaves latents as wide as they like (scaling_factor makes up for it), "
            "2.4e-3 the packaged model's. Raise it tenfold if the denoiser learns badly on latents that jump between "
            "near pictures; lower it if pictures are blurred."
        ),
    )

    teacher: str | None = Field(
        None,
        description="folder of the autoencoder, or of a pipeline that has it, whose latents are learned (tiny)",
        json_schema_extra=when(
            "Only with kind=tiny, and always there: the folder of the model whose latents are to be decoded quickly."
        ),
    )
    latents_weight: float = Field(
        1.0,
        ge=0,
        description="of the squared differences from the teacher's latents (tiny)",
        json_schema_extra=when(
            "0 if only a decoder is wanted, such as for previews; raise it if psnr through the tiny encoder is far "
            "below that of the decoder alone."
        ),
    )

    num_vq_embeddings: int = Field(
        1024,
        ge=2,
        description="size of the codebook (vq, gumbel)",
        json_schema_extra=when(
            "1024 (VQGAN) to 16384 (Latent Diffusion): more keeps more of a picture if codes_in_use stays high, and "
            "makes the prior harder to learn. 256 for small trials with a transformer."
        ),
    )
    codebook: Literal["ema", "learned"] = Field(
        "ema",
        description="codes as moving averages, or by gradient (vq)",
        json_schema_extra=when(
            "learned only to repeat VQGAN or Latent Diffusion: their codes often die (here 0.7% stayed in use "
            "without a start from data and restarts)."
        ),
    )
    codebook_decay: float = Field(
        0.99,
        ge=0,
        lt=1,
        description="of the moving averages (vq)",
        json_schema_extra=when(
            "0.99 is the paper's (van den Oord et al. 2017). 0.999 for long runs with small batches, where codes "
            "wander; 0.9 if they follow too slowly at the beginning."
        ),
    )
    codebook_distance: Literal["euclidean", "cosine"] = Field(
        "euclidean",
        description="by which the nearest code is found (vq)",
        json_schema_extra=when(
            "cosine if few codes are used although start and restart are on (ViT-VQGAN, whose codes have 32 "
            "channels). euclidean otherwise, which others' tools expect."
        ),
    )
    codebook_start: Literal["kmeans", "data", "none"] = Field(
        "kmeans",
        description="first codes, from data (vq)",
        json_schema_extra=when(
            "Never, but for repeating a run: without a start from data few codes are ever chosen. data is quicker "
            "than kmeans for very large codebooks."
        ),
    )
    codebook_restart: int = Field(
        100,
        ge=0,
        description="updates after which an unused code moves; 0: never (vq)",
        json_schema_extra=when(
            "Lower it, to 20, if codes_in_use falls; raise it with very large codebooks and small batches, where a "
            "code may have to wait long for its turn. 0 only to repeat a run."
        ),
    )
    commitment_weight: float = Field(
        1.0,
        ge=0,
        description="how strongly vectors are drawn to their codes (vq)",
        json_schema_extra=when(
            "The papers' 0.25 (VQ-VAE, VQGAN) is the small recipes'; in the code of VQGAN and Latent Diffusion it came "
            "to stand before the other term, and 1 before this. Raise it if the commitment loss grows during the run, "
            "lower it if psnr stands still early while it is tiny."
        ),
    )
    fsq_levels: tuple[Annotated[int, Field(ge=2)], ...] = Field(
        (8, 5, 5, 5),
        description="levels per channel (fsq)",
        json_schema_extra=when(
            "About as many codes as you would give a codebook: (8, 5, 5, 5) is 1,000, (8, 8, 8, 5, 5, 5) 64,000 "
            "(Mentzer et al. 2023, Sec. 4.1, which advises 5 levels or more for each)."
        ),
    )
    gumbel_temperature: float = Field(
        1.0,
        gt=0,
        description="at the beginning (gumbel)",
        json_schema_extra=when("1 is DALL-E's and needs no change."),
    )
    gumbel_temperature_end: float = Field(
        1 / 16,
        gt=0,
        description="from gumbel_steps on, along a cosine (gumbel)",
        json_schema_extra=when(
            "1/16 is DALL-E's. Lower if pictures of the likeliest codes are worse than those of training; too low "
            "too early, and gradients become noise."
        ),
    )
    gumbel_steps: int = Field(
        5000,
        ge=1,
        description="over which the temperature falls (gumbel)",
        json_schema_extra=when(
            "A third to two thirds of max_steps (DALL-E: 150,000 of 3,000,000), so that the network learns at the "
            "final temperature for long."
        ),
    )
    gumbel_kl_weight: float = Field(
        5e-4,
        ge=0,
        description="pull towards using all codes alike (gumbel)",
        json_schema_extra=when(
            "Raise it if val_codes_used is low; lower it if pictures stay blurred. DALL-E's 6.6 is for a loss on "
            "another scale."
        ),
    )

    l1_weight: float = Field(
        1.0,
        ge=0,
        description="of the absolute differences of pixels",
        json_schema_extra=when(
            "Above l2_weight for sharper edges. With a perceptual loss and a discriminator it is the only likeness "
            "of pixels in Latent Diffusion (l1 1, l2 0). 0 with logit_laplace_weight."
        ),
    )
    l2_weight: float = Field(
        1.0,
        ge=0,
        description="of the squared differences of pixels",
        json_schema_extra=when(
            "3 beside l1_weight=1 for drawings and the highest psnr (the small recipes); 0 where a discriminator is "
            "to make the detail."
        ),
    )
    logit_laplace_weight: float = Field(
        0.0,
        ge=0,
        description="of DALL-E's logit-Laplace likelihood (gumbel)",
        json_schema_extra=when("1, with l1_weight=0 and l2_weight=0, only to repeat DALL-E's."),
    )
    perceptual_weight: float = Field(
        0.0,
        ge=0,
        description="of the perceptual loss; 0: none",
        json_schema_extra=when(
            "1 is Latent Diffusion's, 0.1 the packaged model's: textures get sharper and psnr a little lower. 0 for "
            "the highest psnr, or pixel-exact drawings. It costs a pass of another network."
        ),
    )
    perceptual_network: str | None = Field(
        None,
        description="network of the perceptual loss; default: see the documentation",
        json_schema_extra=when(
            "lpips for what papers measure and train by, if its weights are there. The default, EfficientNet-lite0 "
            "or without it the packaged encoder, needs no download."
        ),
    )

    discriminator_weight: float = Field(
        0.0,
        ge=0,
        description="0: no discriminator",
        json_schema_extra=when(
            "0.5 to 0.75 is Latent Diffusion's, 0.8 VQGAN's, all with adaptive_weight. Leave it at 0 for drawings and "
            "short runs. Lower it if psnr falls by more than 2 dB after its start, of which the run warns; raise it "
            "if pictures stay soft."
        ),
    )
    discriminator_start: int = Field(
        2000,
        ge=0,
        description="steps before it begins",
        json_schema_extra=when(
            "When psnr rises slowly only: a quarter to half of the run (Latent Diffusion: 50,000 steps, VQGAN: "
            "250,000). Too early, and it judges mistakes that would go away by themselves."
        ),
    )
    discriminator_loss: Literal["hinge", "vanilla"] = Field(
        "hinge",
        description="that both sides play with",
        json_schema_extra=when("hinge is VQGAN's and Latent Diffusion's and needs no change; vanilla to compare."),
    )
    discriminator_channels: int = Field(
        64,
        ge=1,
        description="of its first layer",
        json_schema_extra=when(
            "64 is PatchGAN's. 32 for small pictures and few cores; wider if it finds nothing "
            "(discriminator_accuracy near 0.5) although pictures are soft."
        ),
    )
    discriminator_layers: int = Field(
        3,
        ge=1,
        description="how many halve the picture; more see larger patches",
        json_schema_extra=when(
            "3, patches of 70 pixels, is for 256 pixels (PatchGAN). 2 for pictures of 64 and less; 4 if large "
            "structures are wrong."
        ),
    )
    discriminator_norm: Literal["batch", "group"] = Field(
        "batch",
        description="of its layers",
        json_schema_extra=when(
            "group for batches under 8 in a process, where statistics of a batch are noise, and with several "
            "processes. batch is PatchGAN's."
        ),
    )
    discriminator_learning_rate: float | None = Field(
        None,
        gt=0,
        description="default: learning_rate",
        json_schema_extra=when(
            "Half of learning_rate if discriminator_accuracy comes above 0.95, of which the run warns; twice, if it "
            "stays near 0.5 while pictures are soft."
        ),
    )
    adaptive_weight: bool = Field(
        True,
        description="balance by the gradients of the last layer (VQGAN, Eq. 7)",
        json_schema_extra=when(
            "Set it false with compile=true, to save its two gradients in each step, or to choose the balance by "
            "discriminator_weight alone. Otherwise true, as VQGAN and Latent Diffusion."
        ),
    )
    adaptive_weight_limit: float = Field(
        100.0,
        gt=0,
        description="the most that balance may multiply by",
        json_schema_extra=when(
            "Lower it, to 10, if the figure adaptive_weight reaches the limit and psnr falls. VQGAN's 10,000 never "
            "limits; Latent Diffusion's with kl is beside a sum over pixels, here 10,000 / (3 * resolution^2), 0.0509 "
            "at 256, which limits nearly always."
        ),
    )
    r1_weight: float = Field(
        0.0,
        ge=0,
        description="penalty on the discriminator's slope at real pictures",
        json_schema_extra=when(
            "1 to 10 if the discriminator wins (accuracy above 0.95); it costs a second backward pass through it. 0 "
            "otherwise."
        ),
    )

    validation_pictures: int = Field(
        64,
        ge=1,
        description="how many held-out pictures are measured on",
        json_schema_extra=when(
            "Raise it to 1,000 or more for figures to publish, lower it if measuring takes a good part of the time. "
            "rfid means nothing below some hundreds."
        ),
    )
    validation_extractor: str = Field(
        "auto",
        description="features of the Frechet distance, as 'evaluate' takes it",
        json_schema_extra=when(
            "inception, with its weights there, for an rfid to compare with papers. The default compares runs of "
            "your own."
        ),
    )
    latent_shift: bool = Field(
        False,
        description="save a shift of the latents too (Stable Diffusion's have none)",
        json_schema_extra=when(
            "Set it true for latents whose mean (val_latent_mean) is far from 0, and if only latentdiff and newer "
            "pipelines will draw: Stable Diffusion's pipelines ignore the shift."
        ),
    )

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
