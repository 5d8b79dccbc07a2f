"""A few-step student of the denoiser: each of its steps learns to end where several guided steps of the teacher end.

Progressive distillation (Salimans & Ho 2022) of a guided teacher (Meng et al. 2023), straight to the last number of
steps, on the states that drawing meets: first those of the teacher's own trajectories, then those that the student
itself reaches (as DAgger, Ross et al. 2011), since its errors lead to states that the teacher never sees.
"""

import copy
import itertools
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor

from .clock import Clock, Log, apply_update, optimizer, save_half
from .denoiser import Captions, as_network, process_of
from .sampling import Levels, Network, guided_step, trailing
from .settings import BurstSettings


def fine_plan(plan: list[int], substeps: int) -> list[list[int]]:
    """For each step of `plan` the timesteps of `substeps` smaller ones from its begin to its end."""
    return [
        [round(start + (end - start) * i / substeps) for i in range(substeps)] + [end]
        for start, end in itertools.pairwise(plan)
    ]


@torch.no_grad()
def trajectories(
    teacher: Network,
    student: Network | None,
    levels: Levels,
    states: Tensor,
    empty: Tensor,
    settings: BurstSettings,
    shape: tuple[int, ...],
) -> tuple[Tensor, Tensor]:
    """Where each step begins, and where the teacher's guided substeps lead from there: (S, B, C, h, w) each.

    student: whose steps lead from one beginning to the next; without it the teacher's.
    """
    plan = trailing(settings.few_steps)
    x = torch.randn(len(states), *shape, device=states.device)
    begins, ends = [], []
    for start, fine in zip(plan[:-1], fine_plan(plan, settings.teacher_substeps), strict=True):
        begins.append(x)
        y = x
        for now, then in itertools.pairwise(fine):
            y = guided_step(teacher, levels, y, states, now, then, settings.guidance_scale, empty)
        ends.append(y)
        x = y if student is None else guided_step(student, levels, x, states, start, fine[-1], 1.0, None)
    return torch.stack(begins), torch.stack(ends)


def train(
    unet: Any,
    captions: Captions,
    settings: BurstSettings,
    seconds: float,
    output: Path,
    compiled: bool = False,
    buffer: int = 32,
) -> Any:
    """The student, trained for so many seconds; it goes to `output/student-*.safetensors`.

    Args:
        unet: the teacher; it is frozen.
        buffer: batches of trajectories that are kept and learned from; the oldest is replaced as new ones are drawn.
    """
    device = captions.states.device
    levels, log = Levels(process_of(settings), device), Log(output / "log.jsonl", "distillation")
    student_unet = copy.deepcopy(unet)
    teacher = as_network(unet.eval().requires_grad_(False), compiled)
    student, drawing = as_network(student_unet, compiled), as_network(student_unet, False)
    adam = optimizer(student_unet, settings.distil_rate)
    average = EMAModel(student_unet.parameters(), 0.998, foreach=True)
    clock = Clock(seconds, settings.distil_rate, warmup=100, fall=0.5)
    plan = torch.tensor(trailing(settings.few_steps), device=device)
    side, running = settings.latent_size, torch.zeros((), device=device)
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    while not clock.over:
        index = torch.randint(0, len(captions.counts), (settings.distil_batch,), device=device)
        states = captions.draw(index, 0.0)
        follows = drawing if clock.share > settings.on_policy else None
        shape = (settings.latent_channels, side, side)
        begins, ends = trajectories(teacher, follows, levels, states, captions.empty, settings, shape)
        kept = [*kept[-(buffer - 1) :], (begins, ends, states)]
        for number in [len(kept) - 1, *torch.randint(0, len(kept), (settings.distil_updates - 1,)).tolist()]:
            begins, ends, states = kept[number]
            step = torch.randint(0, settings.few_steps, (len(states),), device=device)
            rows = torch.arange(len(states), device=device)
            now, then, noisy = plan[step], plan[step + 1], begins[step, rows]
            wanted = levels.velocity_between(noisy, ends[step, rows], now, then)
            noisy = noisy.contiguous(memory_format=torch.channels_last)
            error = (student(noisy, now, states).float() - wanted).square().mean((1, 2, 3))
            # Pseudo-Huber (Song & Dhariwal 2023, Sec. 3.3), so that few ambiguous states do not rule
            loss = ((error + 0.03**2).sqrt() - 0.03).mean()
            apply_update(loss, student_unet, adam, clock)
            average.step(student_unet.parameters())
            running = torch.lerp(running, error.detach().mean(), 0.02)
        if clock.updates % (settings.distil_updates * 10) == 0:
            log(updates=clock.updates, error=float(running), own=float(follows is not None))
    average.copy_to(student_unet.parameters())
    log(updates=clock.updates, error=float(running))
    save_half(student_unet.state_dict(), output, "student")
    return student_unet
