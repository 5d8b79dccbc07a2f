"""The steps that pipelines are made of: prompts, timesteps, first latents, the denoising loop, pictures.

They know tensors, networks and schedulers, and no pipeline. Letters: B images (prompts times images per prompt),
L tokens, D width, C latent channels, h w the latent grid, H W pixels.
"""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils.torch_utils import is_compiled_module, randn_tensor
from torch import Generator, Tensor

from latentdiff.diffusion.guidance import ClassifierFreeGuidance
from latentdiff.diffusion.schedulers import takes_variance

Generators = Generator | list[Generator] | None


def check_size(height: int, width: int, factor: int) -> None:
    """Raises ValueError, with the nearest good ones, for a size that latents of 1/`factor` cannot have."""
    for name, value in (("height", height), ("width", width)):
        if not isinstance(value, int) or value < 1 or value % factor:
            below = int(value) // factor * factor
            near = " or ".join(str(size) for size in (below, below + factor) if size > 0)
            raise ValueError(f"{name}={value} is not a multiple of {factor}; the nearest that this model draws: {near}")


def image_generators(seed: int | Sequence[int] | None, generator: Generators, count: int) -> Generators:
    """The random generators of `count` images.

    With one seed, image i has a generator of its own with seed + i, on the CPU, so its picture depends neither on the
    batch around it nor on the device. With several there must be one for each image. Without, `generator` is used.

    Raises:
        TypeError, ValueError: seeds that are no whole numbers from 0, or not as many as images; seed and generator.
    """
    if seed is None:
        if isinstance(generator, list) and len(generator) != count:
            raise ValueError(f"{len(generator)} generators were given for {count} images; give one for each")
        return generator
    if generator is not None:
        raise ValueError("give either seed or generator, not both")
    seeds = [seed + i for i in range(count)] if isinstance(seed, int) else list(seed)
    if len(seeds) != count:
        raise ValueError(f"{len(seeds)} seeds were given for {count} images; give one for each, or a single one")
    for one in seeds:
        if isinstance(one, bool) or not isinstance(one, int):
            raise TypeError(f"a seed must be a whole number, not {one!r}")
        if not 0 <= one < 2**63:
            raise ValueError(f"a seed must lie in [0, 2**63 - 1], not {one}")
    return [Generator().manual_seed(one) for one in seeds]


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


def step_options(scheduler: Any, generator: Generators, eta: float) -> dict[str, Any]:
    """What of `generator` and `eta` (DDIM, Song et al. 2021, Eq. 16) this scheduler's ``step`` takes."""
    taken = inspect.signature(scheduler.step).parameters
    return {name: value for name, value in (("generator", generator), ("eta", eta)) if name in taken}


def first_latents(
    shape: tuple[int, int, int, int],
    scheduler: Any,
    generator: Generators,
    device: torch.device,
    noise_dtype: torch.dtype,
    latents: Tensor | None = None,
) -> Tensor:
    """Where sampling starts: standard normal noise, or `latents`, times the scheduler's first sigma. (B, C, h, w)

    Raises:
        ValueError: `latents` have another shape.
    """
    if latents is None:
        latents = randn_tensor(shape, generator=generator, device=device, dtype=noise_dtype)
    elif tuple(latents.shape) != shape:
        raise ValueError(f"latents must have the shape {shape}, not {tuple(latents.shape)}")
    return latents.to(device) * scheduler.init_noise_sigma


class GuidedDenoiser:
    """A UNet with its text and its guidance: latents and a timestep in, a prediction out.

    What the UNet makes of the text (keys and values of its cross-attentions) is computed when the text is set, and not
    again at every step. A UNet of diffusers, or a compiled one, is called as a whole.

    Args:
        unet: ours or diffusers' ``UNet2DConditionModel``.
        prompt_embeds: (B, L, D); with active guidance (2B, L, D), those without the prompt first.
        guidance: may be replaced between steps.
    """

    def __init__(self, unet: Any, prompt_embeds: Tensor, guidance: ClassifierFreeGuidance) -> None:
        self.unet = unet
        self.guidance = guidance
        self.remembers = hasattr(unet, "encode_text") and not is_compiled_module(unet) and not unet._compiled_call_impl
        self.prompt_embeds = prompt_embeds

    @property
    def prompt_embeds(self) -> Tensor:
        return self._prompt_embeds

    @prompt_embeds.setter
    def prompt_embeds(self, value: Tensor) -> None:
        self._prompt_embeds = value
        self._text = self.unet.encode_text(value) if self.remembers else None

    def predict(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """The UNet's own prediction, (B, C, h, w), or (B, 2C, h, w) with learned variances."""
        if self.remembers:
            return self.unet.denoise(latents, self.unet.embed_time(timestep), self._text)
        return self.unet(latents, timestep, encoder_hidden_states=self.prompt_embeds, return_dict=False)[0]

    def __call__(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """(B, C, h, w) -> the guided prediction, (B, C, h, w).

        After it come learned variances, if the UNet has any, as they are with the prompt: guidance shifts the mean.
        """
        if not self.guidance.active:
            return self.predict(latents, timestep)
        without, with_prompt = self.predict(torch.cat([latents] * 2), timestep).chunk(2)
        if with_prompt.shape[1] != 2 * latents.shape[1]:
            return self.guidance(without, with_prompt)
        (without, _), (with_prompt, variance) = without.chunk(2, dim=1), with_prompt.chunk(2, dim=1)
        return torch.cat([self.guidance(without, with_prompt), variance], dim=1)


@dataclass
class DenoisingState:
    """Where a denoising loop stands after a step; `latents` may be replaced before the next."""

    latents: Tensor
    index: int = -1
    timestep: Any = None


def denoise(
    denoiser: GuidedDenoiser, scheduler: Any, latents: Tensor, timesteps: Tensor, **options: Any
) -> Iterator[DenoisingState]:
    """From noise to latents, step by step; yields the same state after each, for the caller to look at or to change.

    Args:
        denoiser: gives the prediction that the scheduler is made for. Learned variances after it are for a DDPM
            scheduler with ``variance_type="learned_range"``; others do not get to see them.
        scheduler: any of diffusers', after `set_timesteps`.
        latents: (B, C, h, w), from `first_latents`.
        timesteps: (S,), those to run.
        options: for the scheduler's ``step``, from `step_options`.
    """
    state = DenoisingState(latents)
    dtype, channels = latents.dtype, latents.shape[1]
    if takes_variance(scheduler):
        channels *= 2
    for state.index, state.timestep in enumerate(timesteps):
        scaled = scheduler.scale_model_input(state.latents, state.timestep)
        prediction = denoiser(scaled, state.timestep)[:, :channels]
        stepped = scheduler.step(prediction, state.timestep, state.latents, **options, return_dict=False)[0]
        state.latents = stepped.to(dtype)
        yield state


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Scaled latents (B, C, h, w) -> pixels (B, 3, H, W), values about [-1, 1]."""
    return vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]
