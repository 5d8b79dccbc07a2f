"""Teaching a tiny autoencoder the latents of another one. After TAESD (Ollin Boer Bohan, 2023)."""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from latentdiff.codec import Codec, Generators
from latentdiff.models import AutoencoderTiny, BottleneckOutput
from latentdiff.models.autoencoder import AutoencoderOutput
from latentdiff.models.discriminator import PatchDiscriminator
from latentdiff.training.objectives.autoencoder import AutoencoderObjective
from latentdiff.training.settings import AutoencoderSettings
from latentdiff.training.starting_networks import freeze, load_autoencoder


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


def load_teacher(settings: AutoencoderSettings) -> tuple[Codec | None, AutoencoderSettings]:
    """The autoencoder that a tiny one learns from, frozen, or None for other kinds; and the settings for its latents.

    Channels and levels that the settings do not give become the teacher's.

    Raises:
        FileNotFoundError: there is none in the folder.
        ValueError: the settings make other latents than it has.
    """
    name = settings.teacher
    if name is None:
        return None, settings
    teacher = Codec(load_autoencoder(name))
    levels = teacher.factor.bit_length()
    wanted: dict[str, Any] = {
        "latent_channels": teacher.channels,
        "block_out_channels": settings.block_out_channels[:1] * levels,
    }
    follows = {key: value for key, value in wanted.items() if key not in settings.model_fields_set}
    settings = settings.completed(**follows)
    if (teacher.channels, teacher.factor) != (settings.latent_channels, settings.factor):
        raise ValueError(
            f"{name}: the teacher's latents have {teacher.channels} channels, and {teacher.factor} "
            f"pixels to each along a side; leave latent_channels out, or give {teacher.channels}, and give {levels} "
            f"levels, such as block_out_channels={list(wanted['block_out_channels'])}"
        )
    freeze(teacher.autoencoder)
    return teacher, settings
