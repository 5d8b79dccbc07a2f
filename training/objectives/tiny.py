"""Teaching a tiny autoencoder the latents of another one. After TAESD (Ollin Boer Bohan, 2023)."""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from latentdiff.codec import Codec, Generators
from latentdiff.models import AutoencoderTiny, BottleneckOutput
from latentdiff.models.autoencoder import AutoencoderOutput
from latentdiff.models.discriminator import PatchDiscriminator
from latentdiff.training.networks import freeze, load_autoencoder
from latentdiff.training.objectives.autoencoder import AutoencoderObjective
from latentdiff.training.settings import AutoencoderSettings


@dataclass(frozen=True)
class Taught:
    """A tiny autoencoder beside its teacher, called as one autoencoder.

    The reconstruction is what the decoder makes of the teacher's latents, and the bottleneck has what the encoder makes
    of the pictures, with the loss ``latents``: its mean squared difference from the mean of the teacher's latents.
    """

    student: AutoencoderTiny
    teacher: Codec

    def __call__(
        self, pixels: Tensor, sample_posterior: bool = False, generator: Generators = None
    ) -> AutoencoderOutput:
        """(B, 3, H, W), values in [-1, 1]; with `sample_posterior` the teacher's latents are drawn."""
        self.teacher.autoencoder.to(pixels.device)
        with torch.no_grad():
            posterior = self.teacher.posterior(pixels)
            wanted = given = self.teacher.scaled(posterior.mean)  # (B, C, h, w)
            if sample_posterior and posterior.std is not None:
                mean = posterior.mean
                noise = randn_tensor(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
                given = self.teacher.scaled(posterior.sample(noise))
        latents = self.student.encode_moments(pixels)
        losses = {"latents": (latents.float() - wanted).square().mean()}
        sample = self.student.decode_latents(given.to(self.student.dtype))
        return AutoencoderOutput(sample, bottleneck=BottleneckOutput(latents, losses, {}))


class TinyObjective(AutoencoderObjective):
    """The loss of a tiny autoencoder: likeness and discriminator as for others, and ``latents``, see `Taught`.

    Args:
        teacher: frozen.
    """

    def __init__(
        self,
        autoencoder: AutoencoderTiny,
        settings: AutoencoderSettings,
        discriminator: PatchDiscriminator | None,
        teacher: Codec,
    ) -> None:
        super().__init__(autoencoder, settings, discriminator)
        self.taught = Taught(autoencoder, teacher)  # no module, so that the teacher is no part of this one
        self.weights["latents"] = settings.latents_weight

    @property
    def subject(self) -> Taught:
        return self.taught


def load_teacher(settings: AutoencoderSettings) -> Codec | None:
    """The autoencoder that a tiny one learns from, frozen; None for other kinds.

    Raises:
        FileNotFoundError: there is none in the folder.
        ValueError: the settings make other latents than it has.
    """
    if settings.teacher is None:
        return None
    teacher = Codec(load_autoencoder(settings.teacher))
    if (teacher.channels, teacher.factor) != (settings.latent_channels, settings.factor):
        levels = teacher.factor.bit_length()
        raise ValueError(
            f"{Path(settings.teacher)}: the teacher's latents have {teacher.channels} channels, and {teacher.factor} "
            f"pixels to each along a side; set latent_channels={teacher.channels} and {levels} levels, such as "
            f"block_out_channels={list(settings.block_out_channels[:1] * levels)}"
        )
    freeze(teacher.autoencoder)
    return teacher
