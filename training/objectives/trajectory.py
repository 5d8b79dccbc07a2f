"""Trajectory distillation: each of the student's steps learns to end where several guided ones of the teacher end."""

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from latentdiff.conditioning import Conditioning
from latentdiff.diffusion.process import Process
from latentdiff.training.batch.batch_types import DiffusionBatch
from latentdiff.training.objectives.distillation import DistillationObjective, follow, follower, given_condition
from latentdiff.training.objectives.objective import Result

KEPT = 8  # batches of trajectories that are learned from in turn


class Trajectories(NamedTuple):
    """Where each of the student's S steps begins, and where it should end: (S, B, C, h, w); the last step first."""

    begins: Tensor
    ends: Tensor

    def some(self, index: Tensor, rows: Tensor) -> "Trajectories":
        """Of trajectory `rows[i]` step `index[i]`, from 0 for the last: (B, C, h, w) each."""
        return Trajectories(self.begins[index, rows], self.ends[index, rows])


def pseudo_huber(squared: Tensor, c: float) -> Tensor:
    """Of mean squared errors: half as much over c below c², their root above. Song & Dhariwal 2023, Sec. 3.3."""
    return (squared + c**2).sqrt() - c


class TrajectoryObjective(DistillationObjective):
    """The pseudo-Huber error of the student's v against the v whose DDIM step ends where the teacher's `substeps` do.

    Progressive distillation (Salimans & Ho 2022) of a guided teacher (Meng et al. 2023), straight to the last number of
    steps, and on the states that drawing meets: those of the teacher's own trajectories from noise, and later those
    that the student itself gets to (DAgger, Ross et al. 2011), whose errors lead where the teacher never comes. Of a
    batch the noise and the condition are used, and the latents are not.

    Every cycle of updates has `KEPT` batches, of each of which `repeats` times each step of its trajectories is learned
    from. They are drawn by the student as it was when the cycle began, which checkpoints keep, so that a run that goes
    on draws the same again.

    Figures: ``own_states``, whether they are the student's.

    Args:
        steps, substeps: of the student from noise to clean, and of the teacher within each.
        repeats: updates of each batch for each of the steps.
        own_from: the update from which on states are the student's; None: never.
    """

    takes_latents = False

    def __init__(
        self,
        student: Any,
        teacher: Any,
        process: Process,
        guidance: tuple[float, float],
        empty: Tensor | Conditioning,
        *,
        steps: int,
        substeps: int,
        repeats: int = 1,
        own_from: float | None = None,
        huber_c: float,
    ) -> None:
        super().__init__(student, teacher, process, guidance, empty)
        self.steps, self.substeps, self.own_from, self.huber_c = steps, substeps, own_from, huber_c
        self.cycle = KEPT * repeats * steps
        self.drawing = None if own_from is None else follower(student)
        self._kept: dict[bytes, Trajectories] = {}
        self._held_out: dict[bytes, Trajectories] = {}

    def batch_of(self, update: int) -> int:
        """The same few batches in turn, until the cycle ends."""
        return update // self.cycle * KEPT + update % KEPT

    def relative_time(self, update: int) -> float:
        """In passes of a network: to learn takes about three, and a batch's first time its trajectories besides."""
        drawing, learning = self.steps * (1 + self.substeps * (1 if self.guidance == (1.0, 1.0) else 2)), 3
        new = update % self.cycle < KEPT
        return (learning + new * drawing) / (learning + drawing * KEPT / self.cycle)

    def training_loss(self, batch: DiffusionBatch) -> Result:
        """The mean over B of loss_weight times each picture's pseudo-Huber error."""
        begun, own = int(self.updates) // self.cycle * self.cycle, None
        if self.own_from is not None and begun >= self.own_from:
            own = self.drawing
        turn = (int(self.updates) - begun) // KEPT
        index, uniform = self.places(batch.draws, self.steps)
        scales, condition, key = self.scales(uniform), given_condition(batch), key_of(batch)
        if key not in self._kept:
            self._kept[key] = self.trajectories(batch.noise, condition, scales, own)
        index, rows = (index + turn) % self.steps, torch.arange(len(index), device=index.device)
        errors = self.errors(self._kept[key].some(index, rows), index, condition, scales)
        losses = pseudo_huber(errors, self.huber_c)
        loss = (losses * batch.loss_weight).mean()
        return Result(loss, loss.detach(), {"own_states": torch.tensor(float(own is not None))})

    def held_out_loss(self, batch: DiffusionBatch) -> Result:
        """``val_loss``: the squared errors of v on the teacher's own trajectories, one for all steps of a picture."""
        index, uniform = self.places(batch.draws, self.steps)
        names = batch.names or tuple(map(str, range(len(index))))
        condition, key = given_condition(batch), key_of(batch)
        numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
        rows = torch.tensor([numbers[name] for name in names], device=index.device)
        firsts = torch.tensor([names.index(name) for name in numbers], device=index.device)
        scales = self.scales(uniform)[firsts]
        if key not in self._held_out:
            self._held_out[key] = self.trajectories(batch.noise[firsts], condition.select(firsts), scales)
        errors = self.errors(self._held_out[key].some(index, rows), index, condition, scales[rows])
        return Result(errors.mean(), errors.mean().detach(), {"val_loss": errors})

    def after_update(self, made: bool) -> None:
        """At the end of a cycle, let the student as it is draw the next one's trajectories."""
        super().after_update(made)
        if int(self.updates) % self.cycle == 0:
            self._kept.clear()
            if self.drawing is not None:
                follow(self.drawing, self.student, 1.0)

    @torch.no_grad()
    def trajectories(
        self, noise: Tensor, condition: Conditioning, scales: Tensor, own: Any | None = None
    ) -> Trajectories:
        """Those from noise (B, C, h, w). own: whose steps lead from one beginning to the next; None: the teacher's."""
        grid = self.grid(self.steps * self.substeps)
        grid[:: self.substeps] = self.grid(self.steps)  # but for what is rounded they are the same
        times = grid.flip(0)[:, None].repeat(1, len(noise))
        state, begins, ends = noise, [], []
        for first in range(0, len(times) - 1, self.substeps):
            begins.append(state)
            for now, then in itertools.pairwise(times[first : first + self.substeps + 1]):
                state = self.moved(self.guided_guess(state, now, condition, scales), then)
            ends.append(state)
            if own is not None:
                answer = self.guess(own, begins[-1], times[first], self.told(own, condition, scales))
                state = self.moved(answer, times[first + self.substeps])
        return Trajectories(torch.stack(begins[::-1]), torch.stack(ends[::-1]))

    def errors(self, learned: Trajectories, index: Tensor, condition: Conditioning, scales: Tensor) -> Tensor:
        """Mean squared errors (B,) of the student's v.

        Args:
            learned: one step of each trajectory, (B, C, h, w) each.
            index: (B,) long, which one, from 0 for the last.
        """
        grid = self.grid(self.steps)
        now, then = grid[index + 1], grid[index]
        answer = self.guess(self.student, learned.begins, now, self.told(self.student, condition, scales)).clean
        wanted = self.clean_between(*learned, now, then)
        _, sigma = self.levels(now, wanted)
        return ((answer - wanted) / sigma).square().flatten(1).mean(1)  # v = (signal z - x_0) / sigma


def key_of(batch: DiffusionBatch) -> bytes:
    """What no other batch of these few has."""
    return batch.draws.numpy().tobytes() + repr(batch.names).encode()
