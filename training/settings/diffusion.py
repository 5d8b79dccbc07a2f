"""What settings of training a new denoiser and of fine-tuning one share."""

import math
from typing import Any

from pydantic import Field

from latentdiff.training.settings.base import when
from latentdiff.training.settings.run import RunSettings


class DiffusionSettings(RunSettings):
    """What training a new denoiser and fine-tuning one share."""

    min_snr_gamma: float | None = Field(
        5.0,
        gt=0,
        description="limit on the weight of little noise (min-SNR); null: none, the default where a schedule ends in "
        "pure noise",
        json_schema_extra=when(
            "5 is the paper's (Hang et al. 2023) and diffusers' recommendation, and seldom needs a change. null "
            "weighs all noise levels as the loss itself does: take it where the model must learn what nearly pure "
            "noise says (zero_terminal_snr, flows), or to repeat a run without it. Lower, to 1, gives still less "
            "weight to little noise, that is to fine detail."
        ),
    )
    noise_offset: float = Field(
        0.0,
        ge=0,
        description="share of noise that is one value for a whole channel",
        json_schema_extra=when(
            "0.05 to 0.1 when fine-tuning a Stable Diffusion 1 model whose pictures come out neither dark nor "
            "bright: its schedule never shows it pure noise. Not needed with zero_terminal_snr or flows. Too much, "
            "and colours and backgrounds drift."
        ),
    )
    caption_dropout: float = Field(
        0.1,
        ge=0,
        le=1,
        description="share of captions replaced by the empty one",
        json_schema_extra=when(
            "0.1 is usual (Ho & Salimans 2022, Latent Diffusion), up to 0.2. Guidance needs it: at 0 a new model "
            "cannot be guided, and one that is fine-tuned slowly unlearns what no prompt means. 0 does for a few "
            "hundred steps of a LoRA."
        ),
    )
    caption_shuffle: bool = Field(
        False,
        description="put the parts between a caption's commas in a random order",
        json_schema_extra=when(
            "Set it true where captions are tags with commas between them, so that no tag depends on its place and "
            "those that the text encoder cuts off change. Leave it false for sentences."
        ),
    )
    caption_keep: int = Field(
        1,
        ge=0,
        description="this many first parts of a shuffled caption stay in place",
        json_schema_extra=when(
            "With caption_shuffle=true: the number of tags that must come first, such as the new word of a subject. "
            "0 shuffles all."
        ),
    )
    cache_latents: bool = Field(
        True,
        description="encode every picture once and keep the result on disk",
        json_schema_extra=when(
            "Set it false if the disk has no room for them, or to have more random crops than cached_variants; "
            "every step then encodes its pictures, which with Stable Diffusion's autoencoder makes it up to seven "
            "times slower. Leave it true otherwise."
        ),
    )
    cache_text: bool = Field(
        True,
        description="encode every caption once and keep the result on disk",
        json_schema_extra=when(
            "Set it false where there are far more captions than will be seen. It changes nothing when the text "
            "encoder is trained, which reads captions anew in any case."
        ),
    )
    cached_variants: int = Field(
        4,
        ge=1,
        le=10_000,
        description="random crops, and orders of a caption, kept in the cache",
        json_schema_extra=when(
            "Raise it to 16 or more with crop=random or caption_shuffle=true and few pictures, which are seen "
            "often; each needs disk and one encoding. It does nothing without these two."
        ),
    )
    sample_prompts: tuple[str, ...] = Field(
        (),
        description="what samples are drawn of; default: captions of the pictures",
        json_schema_extra=when(
            "Give what you will ask for, and something the pictures do not show: only that tells learning from "
            "copying. A new word or style belongs into them. Two to eight do; each is drawn every sample_every "
            "steps."
        ),
    )
    sample_steps: int = Field(
        20,
        ge=1,
        description="denoising steps of samples, and of the finished model by default",
        json_schema_extra=when(
            "20 to 50 for models that draw in many steps; more shows no more with the solver that is used. The "
            "finished model has it as its default."
        ),
    )
    sample_guidance_scale: float = Field(
        4.0,
        ge=1,
        description="guidance of samples, and of the finished model by default",
        json_schema_extra=when(
            "Raise it, to 7.5 as Stable Diffusion has, if samples do not show what their prompts say; lower it if "
            "colours burn out or shapes repeat. Small models and flows take 2 to 5. The finished model has it as "
            "its default; the training does not depend on it."
        ),
    )


def widths_with_attention(settings: Any) -> list[int]:
    """Of a network's `block_out_channels` those with attention, and those of the middle, which always has it."""
    levels = zip(settings.block_out_channels, settings.attention_levels, strict=True)
    return [width for width, has in levels if has] + [settings.block_out_channels[-1]]


def follow_channels(settings: Any) -> None:
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
