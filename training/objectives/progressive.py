"""Progressive distillation: each stage's student does in one step what its teacher does in two, and then teaches."""

from typing import Any

import torch
from torch import Tensor

from latentdiff.conditioning import Conditioning
from latentdiff.diffusion.process import Process
from latentdiff.training.batch.batch_types import DiffusionBatch
from latentdiff.training.objectives.distillation import DistillationObjective, follow, follower, given_condition
from latentdiff.training.objectives.objective import Result


class ProgressiveObjective(DistillationObjective):
    """The squared error of the clean latents that the student predicts, weighted by max(SNR, 1).

    In the stage of 0 steps the student learns to give the teacher's guided answer at any time (On Distillation of
    Guided Diffusion Models, Meng et al. 2023, Sec. 3.1). In one of N steps it learns to end where two DDIM steps of the
    teacher end, of a plan with 2 N steps (Progressive Distillation, Salimans & Ho 2022, Alg. 2). After every stage the
    student becomes the teacher, which before the first is a copy of the student.

    Args:
        student: begins as the teacher.
        stages: the student's steps in each stage; 0 for the guided one.
        stage_steps: updates of each stage; the last goes on.
    """

    def __init__(
        self,
        student: Any,
        process: Process,
        guidance: tuple[float, float],
        empty: Tensor | Conditioning,
        stages: tuple[int, ...],
        stage_steps: int,
    ) -> None:
        super().__init__(student, follower(student), process, guidance, empty)
        self.stages, self.stage_steps = stages, stage_steps

    @property
    def steps(self) -> int:
        """The student's, in the present stage; 0 in the guided one."""
        return self.stages[min(int(self.updates) // self.stage_steps, len(self.stages) - 1)]

    def training_loss(self, batch: DiffusionBatch) -> Result:
        """The mean over B of loss_weight times each picture's weighted error."""
        errors, times = self._errors(batch)
        weight = self.process.snr(times).clamp(min=1).float()  # "truncated SNR"; Salimans & Ho, Sec. 4
        loss = (errors * weight * batch.loss_weight).mean()
        return Result(loss, loss.detach(), {"student_steps": torch.tensor(float(self.steps))})

    def held_out_loss(self, batch: DiffusionBatch) -> Result:
        """``val_loss``: the errors without weight; those of different stages cannot be compared."""
        errors, _ = self._errors(batch)
        return Result(errors.mean(), errors.mean().detach(), {"val_loss": errors})

    def after_update(self, made: bool) -> None:
        """At the end of a stage, let the student become the teacher."""
        super().after_update(made)
        done, rest = divmod(int(self.updates), self.stage_steps)
        if rest == 0 and done < len(self.stages):
            follow(self.teacher, self.student, 1.0)

    def _errors(self, batch: DiffusionBatch) -> tuple[Tensor, Tensor]:
        """Squared errors (B,), and the times (B,) at which the student was asked."""
        steps, condition = self.steps, given_condition(batch)
        index, uniform = self.places(batch.draws, steps or self.process.num_timesteps)
        if steps == 0:
            times = self.process.held_out_times((index + 0.5) / self.process.num_timesteps)
        else:
            times = self.grid(steps)[index + 1]
        scales = self.scales(uniform)
        noisy = self.process.mix(batch.latents, batch.noise, times)
        with torch.no_grad():
            if steps == 0:
                wanted = self.guided_guess(noisy, times, condition, scales).clean
            else:
                told = self.told(self.teacher, condition, scales)
                middle, end = self.grid(2 * steps)[2 * index + 1], self.grid(steps)[index]
                halfway = self.moved(self.guess(self.teacher, noisy, times, told), middle)
                ended = self.moved(self.guess(self.teacher, halfway, middle, told), end)
                wanted = self.clean_between(noisy, ended, times, end)
        answer = self.guess(self.student, noisy, times, self.told(self.student, condition, scales)).clean
        return (answer - wanted).square().flatten(1).mean(1), times
