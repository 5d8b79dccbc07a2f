"""Distribution matching distillation: the student's pictures are to be as likely as the teacher's."""

from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.conditioning import Conditioning
from latentdiff.diffusion.process import Process
from latentdiff.training.batch.batch_types import DiffusionBatch
from latentdiff.training.objectives.adversarial import JudgedObjective
from latentdiff.training.objectives.diffusion import DenoiserObjective
from latentdiff.training.objectives.distillation import further_noise, given_condition
from latentdiff.training.objectives.objective import Objective, RealAndFake, Result
from latentdiff.training.settings import DistillationSettings


class DistributionMatchingObjective(JudgedObjective):
    """The student's answer is moved as the difference of two scores says: the guided teacher's, and its own pictures'.

    DMD (Yin et al. 2024, Eq. 7 and 8) without pairs of noise and pictures, as DMD2 (Yin et al. 2024) has it. The second
    score is that of a denoiser which learns all the while from what the student makes.

    Figures: ``score_difference``, the mean absolute one.

    Args:
        follower: that denoiser; trained by an objective of its own.
    """

    def __init__(
        self,
        student: Any,
        teacher: Any,
        process: Process,
        guidance: tuple[float, float],
        empty: Tensor | Conditioning,
        follower: nn.Module,
        settings: DistillationSettings,
    ) -> None:
        super().__init__(student, teacher, process, guidance, empty, settings)
        self._follower: list[Any] = [follower]  # in a list, so that it is no part of this

    def training_loss(self, batch: DiffusionBatch) -> Result:
        """Half the squared step; its gradient is that of the divergence of the two distributions."""
        condition, (noise, uniform) = given_condition(batch), further_noise(batch, 2)
        number, rest = self.places(uniform, self.process.num_timesteps)
        times = self.judged_times(number / self.process.num_timesteps)
        answer, scales = self.answer(batch)
        follower = self._follower[0]
        with torch.no_grad():
            noisy = self.process.mix(answer, noise[0], times)
            of_teacher = self.guided_guess(noisy, times, condition, scales).clean
            of_student = self.guess(follower, noisy, times, self.told(follower, condition, scales)).clean
            difference = of_student - of_teacher
            size = (answer - of_teacher).abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-4)
            wanted = answer - difference / size
        losses = 0.5 * (answer - wanted).square().flatten(1).mean(1) * batch.loss_weight
        own = DiffusionBatch(
            latents=answer.detach(),
            noise=noise[1],
            draws=rest.double().cpu(),
            condition=self.told(follower, condition, scales),
            loss_weight=torch.ones_like(batch.loss_weight),
            names=batch.names,
        )
        loss, figures = losses.mean(), {"score_difference": difference.abs().mean()}
        return Result(loss, loss.detach(), figures, RealAndFake(None, own))


class FollowerObjective(Objective[RealAndFake]):
    """The loss of the denoiser that learns from the student's pictures, as any denoiser learns from any.

    Figures: ``follower_loss``.
    """

    def __init__(self, follower: nn.Module, process: Process) -> None:
        super().__init__()
        self.denoising = DenoiserObjective(follower, process)

    def training_loss(self, batch: RealAndFake) -> Result:
        result = self.denoising.training_loss(batch.fake)
        return result._replace(figures={"follower_loss": result.watched})
