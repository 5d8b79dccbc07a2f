"""Pictures from noise alone: DDPM in pixels, latent diffusion in latents."""

from collections.abc import Sequence
from typing import Any, ClassVar, Unpack

import diffusers
import torch
from torch import Generator, Tensor

from latentdiff.models import IdentityAutoencoder, UNet2DModel
from latentdiff.pipelines import steps
from latentdiff.pipelines.base import AnyAutoencoder, LatentPipeline, StepCallback, check_count, check_output_type
from latentdiff.pipelines.class_guidance import ClassDenoiser
from latentdiff.pipelines.drawing import Drawing, Extras, ImagesOutput, Steps, refuse_unknown, whole


class TextlessPipeline(LatentPipeline):
    """What pipelines without text share: a ``UNet2DModel`` that draws in pixels or in the latents of a ``vqvae``."""

    unet_classes = ("UNet2DModel",)
    model_cpu_offload_seq = "unet->vqvae"
    _optional_components: ClassVar[list[str]] = ["vqvae"]
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents"]
    safety_checker = None
    feature_extractor = None
    vqvae: Any

    @property
    def vae(self) -> Any:
        """The autoencoder, or in pixel space one that does nothing."""
        if self.vqvae is not None:
            return self.vqvae
        channels = self.unet.config.in_channels
        return IdentityAutoencoder(in_channels=channels, out_channels=channels, latent_channels=channels)

    def callback_tensors(self, denoiser: steps.GuidedDenoiser, state: steps.DenoisingState) -> dict[str, Any]:
        return {"latents": state.latents}

    def take_over(self, denoiser: steps.GuidedDenoiser, changed: dict[str, Any]) -> None:
        denoiser.guidance = self.guidance

    def begin(
        self,
        count: int,
        seed: int | Sequence[int] | None,
        generator: Any,
        output_type: str,
        return_dict: bool,
        extras: Extras,
    ) -> Drawing:
        """The drawing of `count` images.

        Raises:
            TypeError, ValueError: an argument is unknown, or a value does not fit.
        """
        refuse_unknown(extras, Extras)
        check_output_type(output_type)
        self.check_channels(0, "UNets of super-resolution and the like cannot draw from noise alone")
        source, seeds = self.noise_source(count, seed, generator, extras)
        return Drawing(None, count, source, seeds, output_type, return_dict)


class UnconditionalPipeline(TextlessPipeline):
    """Draws pictures of whatever its UNet was trained on: ``pipeline(batch_size=4, seed=0).images``.

    DDPM (Ho et al. 2020) in pixels; with a ``vqvae`` in its latents, as Latent Diffusion (Rombach et al. 2022). Saved
    and loaded as diffusers' ``DDPMPipeline`` or ``LDMPipeline``.

    Args:
        unet: gives as many channels as it takes, or twice as many with learned variances.
        scheduler: any of diffusers' with ``step``; for pixels best one with ``clip_sample``.
        vqvae: of any class of ours, or diffusers' ``VQModel`` or ``AutoencoderKL``; None: pixels.
    """

    def __init__(
        self,
        unet: UNet2DModel | diffusers.UNet2DModel,
        scheduler: Any,
        vqvae: AnyAutoencoder | None = None,
    ) -> None:
        super().__init__()
        self.register_parts(scheduler, unet=unet, vqvae=vqvae)

    @property
    def saved_class_name(self) -> str:  # type: ignore[override]
        return "DDPMPipeline" if self.vqvae is None else "LDMPipeline"

    @property
    def defaults(self) -> dict[str, Any]:
        """As diffusers' two pipelines have them, where the model says nothing else."""
        return {"num_inference_steps": 1000 if self.vqvae is None else 50, **self.registered_defaults}

    @whole
    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: Generator | list[Generator] | None = None,
        num_inference_steps: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        eta: float = 0.0,
        *,
        height: int | None = None,
        width: int | None = None,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        latents: Tensor | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        seed: int | Sequence[int] | None = None,
        **extras: Unpack[Extras],
    ) -> Steps[ImagesOutput | tuple[Any, Any]]:
        """Draw B = ``batch_size`` pictures.

        Args:
            num_inference_steps: by default the model's (see ``defaults``).
            height, width: in pixels; by default what the model was trained on.
            latents: (B, C, h, w), standard normal, instead of drawn ones.
            extras: ``variation_seed`` and ``variation_strength``.
            generator, output_type, return_dict, eta, timesteps, sigmas, callback_on_step_end, seed: as of
                ``TextToImagePipeline``.

        Raises:
            TypeError, ValueError: a value does not fit; the message says which and why.
        """
        check_count(batch_size, "batch_size")
        drawing = self.begin(batch_size, seed, generator, output_type, return_dict, extras)
        shape = self.latents_shape(batch_size, *self.picture_size(height, width))
        schedule, _ = self.plan_steps(num_inference_steps, timesteps, sigmas)
        result = yield from self.run_steps(
            ClassDenoiser(self.unet, self.guidance),
            self.first_latents(drawing, shape, latents),
            schedule,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
            **steps.step_options(self.scheduler, drawing.noise.generator, eta),
        )
        return self.finish(drawing, result)
