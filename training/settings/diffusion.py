"""What settings of training a new denoiser and of fine-tuning one share."""

from pydantic import Field

from latentdiff.training.settings.run import RunSettings


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
