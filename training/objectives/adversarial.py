"""Adversarial distillation: the student's pictures are judged by what the teacher sees in them, and by the teacher."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from latentdiff.conditioning import Conditioning
from latentdiff.diffusion.process import Process
from latentdiff.models.discriminator import FeatureDiscriminator, adversarial_loss, discriminator_loss
from latentdiff.models.patches import PatchTransformer
from latentdiff.training.batch.batch_types import DiffusionBatch
from latentdiff.training.objectives.distillation import DistillationObjective, further_noise, given_condition
from latentdiff.training.objectives.objective import Objective, RealAndFake, Result
from latentdiff.training.settings import DistillationSettings

LEVELS = (0.02, 0.98)  # of T; between them lie the noise levels at which both judge


class JudgedObjective(DistillationObjective):
    """What is learned from the student's answer at one of its few steps, with new noise in it at a level drawn anew.

    Args:
        settings: with the steps.
    """

    def __init__(
        self,
        student: Any,
        teacher: Any,
        process: Process,
        guidance: tuple[float, float],
        empty: Tensor | Conditioning,
        settings: DistillationSettings,
    ) -> None:
        super().__init__(student, teacher, process, guidance, empty)
        self.settings = settings
        scheduler = process.renoising_scheduler(settings.few_steps, process.num_timesteps)
        scheduler.set_timesteps(settings.few_steps)
        self.asked: Tensor
        self.register_buffer("asked", scheduler.timesteps, persistent=False)

    def held_out_loss(self, batch: DiffusionBatch) -> Result:
        """``val_loss``: `distances`."""
        noise, uniform = further_noise(batch, 1)
        times = self.judged_times(uniform)
        answer, scales = self.answer(batch)
        noisy = self.process.mix(answer, noise[0], times)
        losses = self.distances(answer, noisy, times, given_condition(batch), scales)
        return Result(losses.mean(), losses.mean().detach(), {"val_loss": losses})

    def answer(self, batch: DiffusionBatch) -> tuple[Tensor, Tensor]:
        """The student's clean latents (B, C, h, w) at one of its steps, and the guidance scales (B,)."""
        index, uniform = self.places(batch.draws, self.settings.few_steps)
        times = self.asked[index]
        scales = self.scales(uniform)
        noisy = self.process.mix(batch.latents, batch.noise, times)
        told = self.told(self.student, given_condition(batch), scales)
        return self.guess(self.student, noisy, times, told).clean, scales

    def judged_times(self, uniform: Tensor) -> Tensor:
        """(B,) long, for uniform numbers (B,)."""
        least, most = LEVELS
        return ((least + (most - least) * uniform) * (self.process.num_timesteps - 1)).long()

    def distances(
        self, answer: Tensor, noisy: Tensor, times: Tensor, condition: Conditioning, scales: Tensor
    ) -> Tensor:
        """(B,): signal(t) times the mean squared distance to the teacher's answer for `noisy`; ADD, Eq. 4."""
        with torch.no_grad():
            wanted = self.guided_guess(noisy, times, condition, scales).clean
        signal, _ = self.levels(times, answer)
        return (signal * (answer - wanted).square()).flatten(1).mean(1)


class AdversarialObjective(JudgedObjective):
    """The student's answer, judged by a discriminator and by the teacher.

    A discriminator looks at the teacher's features of it (LADD, Sauer et al. 2024), and the teacher's guided answer is
    what it should be (ADD, Sauer et al. 2023, Eq. 1 and 4): weight times the squared distance, less for much noise, and
    the hinge loss.

    Figures: ``distance``, and once the discriminator has begun ``adversarial_loss``.

    Args:
        discriminator: trained by an objective of its own.
        settings: the weights, the steps, and when the discriminator begins.
    """

    def __init__(
        self,
        student: Any,
        teacher: Any,
        process: Process,
        guidance: tuple[float, float],
        empty: Tensor | Conditioning,
        discriminator: FeatureDiscriminator,
        settings: DistillationSettings,
    ) -> None:
        super().__init__(student, teacher, process, guidance, empty, settings)
        self._discriminator = [discriminator]  # in a list, so that it is no part of this

    def training_loss(self, batch: DiffusionBatch) -> Result:
        """The weighted sum of both; watched is the distance alone."""
        condition = given_condition(batch)
        noise, uniform = further_noise(batch, 2)
        times = self.judged_times(uniform)
        answer, scales = self.answer(batch)
        noisy = self.process.mix(answer, noise[0], times)
        distances = self.distances(answer, noisy, times, condition, scales) * batch.loss_weight
        loss = self.settings.distillation_weight * distances.mean()
        figures = {"distance": distances.mean().detach()}
        if int(self.updates) < self.settings.discriminator_start or not self.settings.discriminator_weight:
            return Result(loss, loss.detach(), figures)
        fake = self.features(noisy, times, condition)
        with torch.no_grad():
            real = self.features(self.process.mix(batch.latents, noise[1], times), times, condition)
        adversarial = adversarial_loss(self._discriminator[0].judge(fake).float())
        figures["adversarial_loss"] = adversarial.detach()
        whole = loss + self.settings.discriminator_weight * adversarial
        return Result(whole, loss.detach(), figures, RealAndFake(real, tuple(one.detach() for one in fake)))

    def features(self, noisy: Tensor, times: Tensor, condition: Conditioning) -> tuple[Tensor, ...]:
        """What the teacher sees in noisy latents, (B, C', h', w') each: a UNet after each block of its way down, and
        after the middle; a transformer after each block (LADD).
        """
        found: list[Tensor] = []

        def keep(_module: Any, _given: Any, output: Any) -> None:
            one = (output[0] if isinstance(output, tuple) else output).float()
            if isinstance(self.teacher, PatchTransformer):
                one = one.transpose(1, 2).unflatten(2, (noisy.shape[2] // self.teacher.config.patch_size, -1))
            found.append(one)

        with ExitStack() as hooks:
            for block in feature_blocks(self.teacher):
                hooks.callback(block.register_forward_hook(keep).remove)
            self.teacher(noisy, timestep=self.process.model_time(times), **condition.arguments())
        return tuple(found)


def feature_blocks(unet: Any) -> list[Any]:
    if isinstance(unet, PatchTransformer):
        return list(unet.transformer_blocks)
    return [*unet.down_blocks, *([] if unet.mid_block is None else [unet.mid_block])]


def feature_widths(unet: Any) -> list[int]:
    """The channels of each of `AdversarialObjective.features`."""
    if isinstance(unet, PatchTransformer):
        return [unet.width] * len(feature_blocks(unet))
    widths = list(unet.config.block_out_channels)
    return [*widths, *([] if unet.mid_block is None else widths[-1:])]


class FeatureDiscriminatorObjective(Objective[RealAndFake]):
    """The loss by which a discriminator learns to distinguish features of pictures from those of the student's.

    Figures: as those of `autoencoder.DiscriminatorObjective`.

    Args:
        r1_weight: of the penalty on its slope at real features (R1, Mescheder et al. 2018, Eq. 9).
    """

    def __init__(self, discriminator: FeatureDiscriminator, r1_weight: float = 0.0) -> None:
        super().__init__()
        self.discriminator, self.r1_weight = discriminator, r1_weight

    def training_loss(self, batch: RealAndFake) -> Result:
        real = [one.detach().requires_grad_(self.r1_weight > 0) for one in batch.real]
        of_real, of_fake = self.discriminator(real).float(), self.discriminator(batch.fake).float()
        loss = discriminator_loss(of_real, of_fake, "hinge")
        figures = {
            "discriminator_loss": loss.detach(),
            "logits_real": of_real.mean().detach(),
            "logits_fake": of_fake.mean().detach(),
            "discriminator_accuracy": 0.5 * ((of_real > 0).float().mean() + (of_fake < 0).float().mean()),
        }
        if self.r1_weight > 0:
            penalty = slope_at(of_real, real)
            figures["r1"] = penalty.detach()
            loss = loss + 0.5 * self.r1_weight * penalty
        return Result(loss, loss.detach(), figures)


def slope_at(logits: Tensor, features: Sequence[Tensor]) -> Tensor:
    """The squared norm of the gradient of each picture's mean logit, mean over the batch.

    logits: (B, N); features: of which they were computed, with gradients.
    """
    slopes = torch.autograd.grad(logits.mean(1).sum(), list(features), create_graph=True)
    return torch.stack([slope.square().flatten(1).sum(1) for slope in slopes]).sum(0).mean()
