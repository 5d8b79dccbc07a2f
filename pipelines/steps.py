"""The steps that pipelines are made of: timesteps, noise added, the denoising loop, pictures to latents and back.

They know tensors, networks and schedulers, and no pipeline. Letters: B images (prompts times images per prompt),
L tokens, D width, C latent channels, h w the latent grid, H W pixels.
"""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from diffusers.utils.torch_utils import is_compiled_module, randn_tensor
from torch import Tensor

from latentdiff.diffusion import Process, process_of
from latentdiff.diffusion.guidance import ClassifierFreeGuidance
from latentdiff.diffusion.schedulers import takes_variance
from latentdiff.models.layers import timestep_features
from latentdiff.pipelines.noise import Generators


def check_size(height: int, width: int, factor: int) -> None:
    """Raises ValueError, with the nearest good ones, for a size that latents of 1/`factor` cannot have."""
    for name, value in (("height", height), ("width", width)):
        if not isinstance(value, int) or value < 1 or value % factor:
            below = int(value) // factor * factor
            near = " or ".join(str(size) for size in (below, below + factor) if size > 0)
            raise ValueError(f"{name}={value} is not a multiple of {factor}; the nearest that this model draws: {near}")


def set_timesteps(
    scheduler: Any,
    num_inference_steps: int,
    device: torch.device,
    timesteps: Sequence[int] | None = None,
    sigmas: Sequence[float] | None = None,
) -> Tensor:
    """Plan the sampling steps; `timesteps` or `sigmas` replace the scheduler's own plan. Returns (S,).

    Raises:
        ValueError: both are given, or one that this scheduler does not take; fewer than one step, or more than T.
    """
    own = {name: list(v) for name, v in (("timesteps", timesteps), ("sigmas", sigmas)) if v is not None}
    if len(own) == 2:
        raise ValueError("give either timesteps or sigmas, not both")
    for name in own:
        if name not in inspect.signature(scheduler.set_timesteps).parameters:
            raise ValueError(f"{type(scheduler).__name__} does not take its own {name}; try another scheduler")
    if own:
        scheduler.set_timesteps(device=device, **own)
        return scheduler.timesteps
    most = getattr(scheduler.config, "num_train_timesteps", num_inference_steps)
    if isinstance(num_inference_steps, bool) or not isinstance(num_inference_steps, int):
        raise TypeError(f"num_inference_steps must be a whole number, not {num_inference_steps!r}")
    if not 1 <= num_inference_steps <= most:
        raise ValueError(f"num_inference_steps must lie in [1, {most}], not {num_inference_steps}")
    scheduler.set_timesteps(num_inference_steps, device=device)
    return scheduler.timesteps


def last_timesteps(scheduler: Any, timesteps: Tensor, planned: int, strength: float) -> Tensor:
    """Of the planned `timesteps`, the share `strength` that comes last, for a picture to start from.

    Args:
        timesteps: from `set_timesteps`; with some schedulers more than the steps that were asked for.
        planned: how many steps were asked for.

    Raises:
        ValueError: strength is outside [0, 1], or leaves no step.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must lie in [0, 1], not {strength}")
    start = planned - min(int(planned * strength), planned)
    if start == planned:
        raise ValueError(f"strength={strength} of {planned} steps leaves none to run; give more of either")
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start * scheduler.order)
    return timesteps[start * scheduler.order :]


def step_options(scheduler: Any, generator: Generators, eta: float) -> dict[str, Any]:
    """What of `generator` and `eta` (DDIM, Song et al. 2021, Eq. 16) this scheduler's ``step`` takes."""
    taken = inspect.signature(scheduler.step).parameters
    return {name: value for name, value in (("generator", generator), ("eta", eta)) if name in taken}


def check_latents(latents: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Raises ValueError if given `latents` have another shape."""
    if tuple(latents.shape) != shape:
        raise ValueError(f"latents must have the shape {shape}, not {tuple(latents.shape)}")
    return latents


def noised(scheduler: Any, latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
    """Latents (B, C, h, w) as they are at `timestep` on the way, in the scheduler's own scale."""
    return scheduler.add_noise(latents, noise, timestep.reshape(1).repeat(len(latents)))


def guidance_embedding(scales: Tensor, dim: int) -> Tensor:
    """Guidance scales (B,) -> (B, dim), for a UNet that guides itself: sinusoids of 1000 (scale - 1).

    On Distillation of Guided Diffusion Models (Meng et al. 2023), Sec. 3; the layout is that of diffusers' LCM.
    """
    return timestep_features((scales - 1) * 1000.0, dim, flip_sin_to_cos=False, freq_shift=1)


class GuidedDenoiser:
    """A UNet with its text and its guidance: latents and a timestep in, a prediction out.

    What the UNet makes of the text (keys and values of its cross-attentions) is computed when the text is set, and not
    again at every step. A UNet of diffusers, or a compiled one, is called as a whole.

    Args:
        unet: ours or diffusers' ``UNet2DConditionModel``.
        prompt_embeds: (B, L, D); with active guidance (2B, L, D), those without the prompt first.
        guidance: may be replaced between steps.
        condition: (B, C', h, w), further channels that the UNet takes after the latents', such as a mask.
        class_labels: (B,), for a UNet with class embeddings.
        timestep_cond: (B, D), for a UNet that guides itself, from `guidance_embedding`.
    """

    def __init__(
        self,
        unet: Any,
        prompt_embeds: Tensor,
        guidance: ClassifierFreeGuidance,
        condition: Tensor | None = None,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
    ) -> None:
        self.unet = unet
        self.guidance = guidance
        self.condition = condition
        self.told = {"class_labels": class_labels, "timestep_cond": timestep_cond}
        in_parts = getattr(unet, "works_in_parts", False)  # ours, unless its weights come and go with a plain call
        self.remembers = in_parts and not is_compiled_module(unet) and not unet._compiled_call_impl
        self.prompt_embeds = prompt_embeds

    @property
    def prompt_embeds(self) -> Tensor:
        return self._prompt_embeds

    @prompt_embeds.setter
    def prompt_embeds(self, value: Tensor) -> None:
        self._prompt_embeds = value
        self._text = self.unet.encode_text(value) if self.remembers else None

    def predict(self, latents: Tensor, timestep: Tensor, text: slice = slice(None)) -> Tensor:
        """The UNet's own prediction, (B, C, h, w), or (B, 2C, h, w) with learned variances.

        text: which of the text's entries belong to `latents`; by default all.
        """
        rows = len(latents)
        if self.condition is not None:
            condition = self.condition.repeat(rows // len(self.condition), 1, 1, 1)
            latents = torch.cat([latents, condition], dim=1)
        told = {
            name: torch.cat([value] * (rows // len(value))) for name, value in self.told.items() if value is not None
        }
        if self._text is not None:
            context = self._text if text == slice(None) else self._text.select(text)
            return self.unet.denoise(latents, self.unet.embed_time(timestep, **told), context)
        states = self.prompt_embeds[text]
        return self.unet(latents, timestep, encoder_hidden_states=states, return_dict=False, **told)[0]

    def __call__(self, latents: Tensor, timestep: Tensor, guided: bool = True) -> Tensor:
        """(B, C, h, w) -> the guided prediction, (B, C, h, w).

        After it come learned variances, if the UNet has any, as they are with the prompt: guidance shifts the mean.
        With ``guided=False`` it is the plain prediction with the prompt.
        """
        if not self.guidance.active:
            return self.predict(latents, timestep)
        if not guided:
            return self.predict(latents, timestep, slice(len(latents), None))
        without, with_prompt = self.predict(torch.cat([latents] * 2), timestep).chunk(2)
        if with_prompt.shape[1] != 2 * latents.shape[1]:
            return self.guidance(without, with_prompt)
        (without, _), (with_prompt, variance) = without.chunk(2, dim=1), with_prompt.chunk(2, dim=1)
        return torch.cat([self.guidance(without, with_prompt), variance], dim=1)


@dataclass
class DenoisingState:
    """Where a denoising loop stands after a step; `latents` may be replaced before the next."""

    scheduler: Any
    latents: Tensor
    index: int = -1
    timestep: Any = None
    scaled: Tensor | None = None
    """What the network saw, (B, C, h, w)."""
    prediction: Tensor | None = None
    """What it said, (B, C, h, w), or twice the channels with learned variances."""

    @property
    def clean(self) -> Tensor:
        """The latents that this step takes for the picture, without noise: (B, C, h, w).

        Raises:
            ValueError: there was no step yet.
        """
        if self.scaled is None or self.prediction is None:
            raise ValueError("there was no step yet")
        return self.process.clean(self.scaled, self.prediction, self.timestep)

    @cached_property
    def process(self) -> Process:
        """What the scheduler samples from.

        Raises:
            ValueError: a process that is not known.
        """
        return process_of(self.scheduler)


def denoise(
    denoiser: GuidedDenoiser, scheduler: Any, latents: Tensor, timesteps: Tensor, **options: Any
) -> Iterator[DenoisingState]:
    """From noise to latents, step by step; yields the same state after each, for the caller to look at or to change.

    Args:
        denoiser: gives the prediction that the scheduler is made for. Learned variances after it are for a DDPM
            scheduler with ``variance_type="learned_range"``; others do not get to see them.
        scheduler: any of diffusers', after `set_timesteps`.
        latents: (B, C, h, w), noise in the scheduler's scale.
        timesteps: (S,), those to run.
        options: for the scheduler's ``step``, from `step_options`.
    """
    state = DenoisingState(scheduler, latents)
    dtype, channels = latents.dtype, latents.shape[1]
    if takes_variance(scheduler):
        channels *= 2
    for state.index, state.timestep in enumerate(timesteps):
        state.scaled = scheduler.scale_model_input(state.latents, state.timestep)
        guidance = denoiser.guidance
        guided = guidance.interval is None or guidance.acts_at(state.process.noise_level(state.timestep))
        state.prediction = denoiser(state.scaled, state.timestep, guided)[:, :channels]
        stepped = scheduler.step(state.prediction, state.timestep, state.latents, **options, return_dict=False)[0]
        state.latents = stepped.to(dtype)
        yield state


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Scaled latents (B, C, h, w) -> pixels (B, 3, H, W), values about [-1, 1]."""
    scale, shift = latent_scale(vae)
    return vae.decode(latents.to(vae.dtype) / scale + shift, return_dict=False)[0]


def latent_scale(vae: Any) -> tuple[float, float]:
    """Of an autoencoder's config: what is scaled is (latents - shift) * scale, as in Stable Diffusion 3."""
    return float(vae.config.scaling_factor), float(getattr(vae.config, "shift_factor", None) or 0.0)


def encode(vae: Any, pixels: Tensor, generator: Generators, count: int) -> Tensor:
    """Pixels (P, 3, H, W), values in [-1, 1] -> scaled latents (count, C, h, w), each picture's in a row.

    A Gaussian posterior is sampled: with one generator for each of the `count` images separately, otherwise once for
    each picture.
    """
    scale, shift = latent_scale(vae)
    encoded = vae.encode(pixels.to(vae.device, vae.dtype))
    repeats = count // len(pixels)
    if not hasattr(encoded, "latent_dist"):  # a codebook's
        return (encoded.latents.repeat_interleave(repeats, dim=0) - shift) * scale
    posterior = encoded.latent_dist
    mean, std = posterior.mean, posterior.std
    if isinstance(generator, list):
        mean, std, repeats = mean.repeat_interleave(repeats, dim=0), std.repeat_interleave(repeats, dim=0), 1
    latents = mean + std * randn_tensor(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
    return (latents.repeat_interleave(repeats, dim=0) - shift) * scale
