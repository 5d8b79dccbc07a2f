"""A call of a pipeline whose pictures are codes: a denoiser of codes, and the loops that draw them."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, ClassVar

import torch
from PIL import Image
from torch import Generator, Tensor

from latentdiff.codec import Codec, Generators, TokenCodec
from latentdiff.diffusion.tokens import choose, hidden_after, probabilities, still_hidden
from latentdiff.interchange.picture_files import to_pictures
from latentdiff.pipelines.core.call import Call
from latentdiff.pipelines.core.call_options import CallOptions, positive_whole, real_number
from latentdiff.pipelines.core.denoiser import GuidedDenoiser
from latentdiff.pipelines.core.output import ImagesOutput
from latentdiff.pipelines.core.sampling import Progress

OF_DIFFUSION = (
    *("timesteps", "sigmas", "eta", "latents", "variation_seed", "variation_strength"),
    *("guidance_rescale", "guidance_interval", "cross_attention_kwargs"),
)
"""Options that say nothing to a model of codes."""


def from_zero(value: Any, name: str) -> float:
    """Raises ValueError for a number below 0."""
    number = real_number(value, name)
    if number < 0:
        raise ValueError(f"{name} must be a number from 0, not {value!r}")
    return number


def share(value: Any, name: str) -> float:
    """Raises ValueError for a number that is not above 0 and at most 1."""
    number = real_number(value, name)
    if not 0 < number <= 1:
        raise ValueError(f"{name} must be above 0 and at most 1, which leaves all codes; not {value!r}")
    return number


@dataclass(frozen=True, kw_only=True)
class TokenOptions(CallOptions):
    """How codes are drawn; documented at `TokenPipeline`."""

    temperature: Annotated[float, from_zero] = 1.0
    top_k: Annotated[int | None, positive_whole] = None
    top_p: Annotated[float | None, share] = None
    mask_temperature: Annotated[float, from_zero] = 2.0

    def __post_init__(self) -> None:
        for name in OF_DIFFUSION:
            usual = getattr(type(self), name, None)
            if getattr(self, name, usual) != usual:
                raise ValueError(f"{name} is of diffusion, and a model of codes knows nothing of it; leave it out")
        super().__post_init__()


@dataclass
class TokenProgress(Progress):
    """Where a drawing of codes is: ``latents`` are the codes (B, 1, h, w), one more than the last if still hidden."""

    estimate: Tensor = field(default_factory=lambda: torch.empty(0), repr=False)
    """(B, 1, h, w), with what the model takes the hidden ones for."""
    known: Tensor = field(default_factory=lambda: torch.empty(0), repr=False)
    """(B, 1, h, w), true where `estimate` says something."""
    codec: Codec | None = field(default=None, repr=False)

    @property
    def clean(self) -> Tensor:
        return self.estimate

    @torch.no_grad()
    def preview(self) -> list[Image.Image]:
        """B pictures at full size; grey where there is nothing yet."""
        assert self.codec is not None
        pixels = self.codec.decode(self.estimate).float()
        known = self.known.to(pixels).repeat_interleave(self.codec.factor, 2).repeat_interleave(self.codec.factor, 3)
        return to_pictures(pixels * known)


class TokenDenoiser(GuidedDenoiser):
    """Codes in, logits out: a `TokenTransformer` under guidance of the logits. MUSE (Chang et al. 2023), Sec. 2.7."""

    def _guided(self, latents: Tensor, timestep: Any) -> Tensor:
        if self._conditioning.negative is None:
            raise ValueError(f"a guidance scale of {self.guidance.scale} needs what to keep away from")
        return self.guidance(*self._predict(*self._both, torch.cat([latents] * 2), timestep).chunk(2))

    def _predict(self, given: Any, prepared: Any, latents: Tensor, timestep: Any) -> Tensor:
        """(B, 1, h, w) -> (B, K, h, w)."""
        if self.in_parts:
            return self.network.denoise(latents[:, 0], prepared)
        return self.network(latents[:, 0], **given.arguments())

    def begin(self, codes: Tensor) -> None:
        """Start in raster order, for codes (B, 1, h, w)."""
        self._twice = self.guidance.active and self._conditioning.negative is not None
        batch, _, height, width = codes.shape
        self._cache = self.network.begin(batch * (2 if self._twice else 1), height, width) if self.in_parts else None

    def next(self, codes: Tensor, place: int) -> Tensor:
        """Logits (B, K) of the code at `place`, of which all before it are in `codes` (B, 1, h, w)."""
        if self._cache is None:
            known = codes.masked_fill(codes == self.network.codes, 0)  # what comes later is not looked at
            return self(known, None).flatten(2)[:, :, place]
        before = codes.flatten(1)[:, place - 1] if place else None
        if not self._twice:
            return self.network.next_logits(before, self._positive[1], self._cache)
        logits = self.network.next_logits(
            None if before is None else torch.cat([before] * 2), self._both[1], self._cache
        )
        without, with_prompt = (half[:, :, None, None] for half in logits.chunk(2))  # (B, K, 1, 1)
        return (self.guidance(without, with_prompt) if self.guidance.active else with_prompt)[:, :, 0, 0]


class TokenCall(Call):
    """A call that draws codes, in the order that its model knows."""

    options: TokenOptions
    codec: TokenCodec
    codec_class: ClassVar[type[Codec]] = TokenCodec

    def _plan(self) -> tuple[Tensor, int]:
        """One step for each code in raster order; else as many as were asked for."""
        own = self.pipeline.defaults["num_inference_steps"]
        steps = self.options.num_inference_steps
        if steps is not None and steps < 1:
            raise ValueError(f"num_inference_steps must be a whole number from 1, not {steps}")
        return torch.arange(steps or own), steps or own

    def hidden_codes(self, height: int, width: int) -> Tensor:
        """(B, 1, h, w) of a picture of this size in pixels, all hidden.

        Raises:
            ValueError: there are more than in training, or another number of steps was given in raster order.
        """
        transformer, shape = self.pipeline.unet, self.latents_shape(height, width)
        transformer.check_grid(*shape[2:])
        places, steps = shape[2] * shape[3], self.options.num_inference_steps
        if transformer.causal and steps not in (None, places, self.pipeline.defaults["num_inference_steps"]):
            raise ValueError(
                f"this model draws {places} codes one after the other; leave num_inference_steps={steps} out"
            )
        return torch.full(shape, transformer.codes, device=self.device)

    def schedule(self, codes: Tensor) -> Tensor:
        """The steps to run for codes (B, 1, h, w)."""
        return torch.arange(codes[0].numel()) if self.pipeline.unet.causal else self.timesteps()

    def token_denoiser(self, conditioning: Any) -> TokenDenoiser:
        """The network under this call's guidance."""
        return TokenDenoiser(self.pipeline.unet, conditioning, self.guidance)

    def steps(self, denoiser: GuidedDenoiser, latents: Tensor, timesteps: Tensor) -> Iterator[Progress]:
        assert isinstance(denoiser, TokenDenoiser)
        if self.pipeline.unet.causal:
            return self._in_raster_order(denoiser, latents)
        return self._unmasked(denoiser, latents, len(timesteps))

    @property
    def shares(self) -> Any:
        """Logits to probabilities, as the options say."""
        options = self.options
        return partial(probabilities, temperature=options.temperature, top_k=options.top_k, top_p=options.top_p)

    def _in_raster_order(self, denoiser: TokenDenoiser, codes: Tensor) -> Iterator[Progress]:
        """DALL-E (Ramesh et al. 2021); codes that are not hidden stay."""
        shape, places = codes.shape, codes[0].numel()
        hidden = codes == self.pipeline.unet.codes
        uniform = uniforms(self.generator, (len(codes), places), self.device)
        at = torch.arange(places, device=codes.device).view(1, *shape[1:])
        denoiser.begin(codes)
        for place in range(places):
            logits = denoiser.next(codes, place)
            chosen = choose(self.shares(logits), uniform[:, place])  # (B,)
            codes = torch.where((at == place) & hidden, chosen.view(-1, 1, 1, 1), codes)
            known = (at <= place) | ~hidden
            progress = self._progress(place, places, codes, logits, codes.masked_fill(~known, 0), known)
            yield progress
            codes = progress.latents

    def _unmasked(self, denoiser: TokenDenoiser, codes: Tensor, steps: int) -> Iterator[Progress]:
        """MaskGIT (Chang et al. 2022), Sec. 3.2: of the hidden codes, those that the model is surest of are shown."""
        mask, shape = self.pipeline.unet.codes, codes.shape
        first = (codes == mask).flatten(1).sum(1)
        for step in range(steps):
            hidden = (codes == mask).flatten(1)  # (B, L)
            logits = denoiser(codes, None)  # (B, K, h, w)
            shares = self.shares(logits.flatten(2).transpose(1, 2))  # (B, L, K)
            random = uniforms(self.generator, (len(codes), 2, hidden.shape[1]), self.device)
            chosen = torch.where(hidden, choose(shares, random[:, 0]), codes.flatten(1))
            own = shares.gather(-1, chosen.clamp(max=mask - 1)[..., None])[..., 0]
            noise = -(-random[:, 1].clamp(min=1e-20).log()).log()  # Gumbel's
            noise = noise * (self.options.mask_temperature * (1 - (step + 1) / steps))
            left = hidden_after(step, steps, hidden.sum(1), first)
            codes = torch.where(still_hidden(own, hidden, left, noise), mask, chosen).view(shape)
            estimate = chosen.view(shape)
            progress = self._progress(step, steps, codes, logits, estimate, torch.ones_like(estimate, dtype=torch.bool))
            yield progress
            codes = progress.latents

    def _progress(self, step: int, total: int, codes: Tensor, logits: Tensor, *rest: Tensor) -> TokenProgress:
        estimate, known = rest
        found = TokenProgress(step, total, step, codes, codes, logits, self.sampler)
        found.estimate, found.known, found.codec = estimate, known, self.codec
        return found

    def finish(self, latents: Tensor) -> ImagesOutput | tuple[Any, Any]:
        if (latents == self.pipeline.unet.codes).any():  # a callback has stopped it
            latents = latents.masked_fill(latents == self.pipeline.unet.codes, 0)
        return super().finish(latents)


def uniforms(generator: Generators, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Numbers in [0, 1) of `shape`, (B, ...), on `device`, each image's from its own generator of a list."""
    if isinstance(generator, list):
        return torch.stack([torch.rand(shape[1:], generator=one, device=one.device) for one in generator]).to(device)
    source = generator.device if isinstance(generator, Generator) else torch.device("cpu")
    return torch.rand(shape, generator=generator, device=source).to(device)
