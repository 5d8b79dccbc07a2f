"""Pipelines without text: a ``UNet2DModel`` that draws in pixels or in the latents of an autoencoder."""

from typing import Any, ClassVar

from latentdiff.models import IdentityAutoencoder
from latentdiff.pipelines.core.pipeline import LatentPipeline


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
