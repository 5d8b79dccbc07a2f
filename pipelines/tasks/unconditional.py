"""Pictures from noise alone: DDPM in pixels, latent diffusion in latents; and what all pipelines without text share."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Unpack

import diffusers
import torch
from torch import Generator, Tensor

from latentdiff.conditioning import Conditioning, GuidedConditioning
from latentdiff.models import IdentityAutoencoder, UNet2DModel
from latentdiff.pipelines.core.call import Call
from latentdiff.pipelines.core.call_options import CallOptions, StepCallback, VariationExtras, positive_whole
from latentdiff.pipelines.core.output import ImagesOutput
from latentdiff.pipelines.core.pipeline import AnyAutoencoder, LatentPipeline
from latentdiff.pipelines.core.sampling import Steps, whole


class TextlessPipeline(LatentPipeline):
    """What pipelines without text share. Without a ``vqvae`` they draw in pixels."""

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


@dataclass(frozen=True, kw_only=True)
class UnconditionalOptions(CallOptions):
    """Of a call without conditions."""

    batch_size: Annotated[int | None, positive_whole] = 1


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
        **extras: Unpack[VariationExtras],
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
        options = UnconditionalOptions.of(locals())
        self.check_channels(0, "UNets of super-resolution and the like cannot draw from noise alone")
        call = Call(self, options, options.batch_size or 1)
        latents = call.first_latents(call.latents_shape(*self.picture_size(options.height, options.width)))
        denoiser = call.denoiser(GuidedConditioning(Conditioning()))
        return (yield from call.draw(denoiser, latents, call.timesteps()))
