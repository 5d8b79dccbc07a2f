"""Consistency: the student's answer is the same all along a path from noise to a picture."""

from typing import Any

import torch
from torch import Tensor

from latentdiff.conditioning import Conditioning
from latentdiff.diffusion.process import Process
from latentdiff.training.batch.batch_types import DiffusionBatch
from latentdiff.training.objectives.distillation import DistillationObjective, follow, follower, given_condition
from latentdiff.training.objectives.objective import Result
from latentdiff.training.settings import DistillationSettings


class ConsistencyObjective(DistillationObjective):
    """The distance of the student's answers at two neighbouring points of a path, the nearer one held fixed.

    With a teacher the nearer point is where the teacher's guided solver gets to in one of its steps: latent consistency
    distillation (LCM, Luo et al. 2023, Eq. 14 and Alg. 1), where a step skips many timesteps. With
    ``method=consistency`` it is the picture with less of the same noise: consistency training (Song et al. 2023,
    Alg. 3; Song & Dhariwal 2023).

    Args:
        settings: solver, distance and target.
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
        taught = settings.method == "lcm"
        super().__init__(student, teacher if taught else None, process, guidance, empty)
        self.taught, self.settings = taught, settings
        self.target = follower(student) if settings.target_decay > 0 else None

    def training_loss(self, batch: DiffusionBatch) -> Result:
        """The mean over B of loss_weight times each picture's distance."""
        answer, wanted = self._answers(batch)
        if self.settings.loss == "l2":
            distance = (answer - wanted).square()
        else:  # pseudo-Huber, of each number; Song & Dhariwal 2023, Sec. 3.3, has it of the whole picture
            c = self.settings.huber_c
            distance = ((answer - wanted).square() + c**2).sqrt() - c
        loss = (distance.flatten(1).mean(1) * batch.loss_weight).mean()
        return Result(loss, loss.detach(), {})

    def held_out_loss(self, batch: DiffusionBatch) -> Result:
        """``val_loss``: the mean squared distance."""
        answer, wanted = self._answers(batch)
        losses = (answer - wanted).square().flatten(1).mean(1)
        return Result(losses.mean(), losses.mean().detach(), {"val_loss": losses})

    def after_update(self, made: bool) -> None:
        """Let the target follow the student."""
        super().after_update(made)
        if made and self.target is not None:
            follow(self.target, self.student, 1 - self.settings.target_decay)

    def _answers(self, batch: DiffusionBatch) -> tuple[Tensor, Tensor]:
        """The student's answer at a point, and what it should be: (B, C, h, w) each."""
        count = self.settings.solver_steps
        index, uniform = self.places(batch.draws, count)
        times = self.process.consistency_times(count).to(index.device)
        start, end = times[index + 1], times[index]
        scales, condition = self.scales(uniform), given_condition(batch)
        noisy = self.process.mix(batch.latents, batch.noise, start)
        told = self.told(self.student, condition, scales)
        answer = self.consistent(self.student, noisy, start, told)
        with torch.no_grad():
            if self.taught:
                nearer = self.moved(self.guided_guess(noisy, start, condition, scales), end)
            else:
                nearer = self.process.mix(batch.latents, batch.noise, end)
            target = self.student if self.target is None else self.target
            wanted = self.consistent(target, nearer, end, told)
        return answer, wanted

    def consistent(self, network: Any, noisy: Tensor, times: Tensor, condition: Conditioning) -> Tensor:
        """f(x, t) = c_skip x + c_out x_0, which is x itself at the least time. LCM, Eq. 9."""
        c_skip, c_out = (
            one.view(-1, 1, 1, 1) if isinstance(one, Tensor) else one for one in self.process.consistency_scales(times)
        )
        return c_skip * noisy + c_out * self.guess(network, noisy, times, condition).clean
