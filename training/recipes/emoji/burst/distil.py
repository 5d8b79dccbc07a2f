"""A few-step student of the denoiser: each of its steps learns to end where several guided steps of the teacher end.

Progressive distillation (Salimans & Ho 2022) of a guided teacher (Meng et al. 2023), straight to the last number of
steps, on the states that drawing meets: first those of the teacher's own trajectories, then those that the student
itself reaches (as DAgger, Ross et al. 2011), since its errors lead to states that the teacher never sees.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor

from .clock import Clock, Log, descend, optimizer, repeated, save_half
from .denoiser import Captions, as_network, build, process_of, warm_up
from .sampling import Levels, Network, guided_step, trailing
from .settings import BurstSettings


def fine_plan(plan: list[int], substeps: int) -> list[list[int]]:
    """For each step of `plan` the timesteps of `substeps` smaller ones from its begin to its end."""
    return [
        [round(start + (end - start) * i / substeps) for i in range(substeps)] + [end]
        for start, end in itertools.pairwise(plan)
    ]


@dataclass
class Networks:
    """Teacher and student: two UNets, and the functions of tensors that training calls.

    `drawing` is the student too, as it draws while it learns.
    """

    teacher_unet: Any
    student_unet: Any
    teacher: Network
    student: Network
    drawing: Network

    @classmethod
    def warm(cls, settings: BurstSettings, text_width: int, device: torch.device) -> Self:
        """With no weights yet, but compiled where that can be done, for the batches of `settings`."""
        compiled = device.type == "cuda"
        batch = settings.distil_batch
        student_unet = build(settings, text_width, device)
        student = warm_up(student_unet, settings, batch, text_width, device, compiled)
        teacher_unet = build(settings, text_width, device).eval().requires_grad_(False)
        teacher = warm_up(teacher_unet, settings, 2 * batch, text_width, device, compiled)
        return cls(teacher_unet, student_unet, teacher, student, as_network(student_unet, False))

    def begin(self, weights: Mapping[str, Tensor]) -> None:
        """Both with the teacher's weights."""
        self.teacher_unet.load_state_dict(weights)
        self.student_unet.load_state_dict(weights)


@torch.no_grad()
def trajectories(
    teacher: Network,
    student: Network | None,
    levels: Levels,
    noise: Tensor,
    states: Tensor,
    empty: Tensor,
    settings: BurstSettings,
) -> tuple[Tensor, Tensor]:
    """Where each step begins, and where the teacher's guided substeps lead from there: (S, B, C, h, w) each.

    student: whose steps lead from one beginning to the next; without it the teacher's.
    """
    plan = trailing(settings.few_steps)
    x = noise
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
    networks: Networks,
    captions: Captions,
    settings: BurstSettings,
    seconds: float,
    output: Path,
    buffer: int = 32,
) -> Any:
    """The student, trained for so many seconds; it goes to `output/student-*.safetensors`.

    Args:
        buffer: batches of trajectories that are kept and learned from; the oldest is replaced as new ones are drawn.
    """
    device, unet, batch = captions.states.device, networks.student_unet, settings.distil_batch
    levels, log = Levels(process_of(settings), device), Log(output / "log.jsonl", "distillation")
    adam = optimizer(unet, settings.distil_rate)
    average = EMAModel(unet.parameters(), 0.998, foreach=True)
    clock = Clock(seconds, settings.distil_rate, warmup=100, fall=0.5)
    plan = torch.tensor(trailing(settings.few_steps), device=device)
    side, running = settings.latent_size, torch.zeros((), device=device)
    # What graphs read and write: a batch of trajectories that is drawn, and one of states that is learned from
    noise = torch.zeros(batch, settings.latent_channels, side, side, device=device)
    said = torch.zeros(batch, *captions.states.shape[1:], device=device, dtype=captions.states.dtype)
    begins, ends = (torch.zeros(settings.few_steps, *noise.shape, device=device) for _ in range(2))
    noisy, wanted = torch.zeros_like(noise), torch.zeros_like(noise)
    now, states = torch.full((batch,), int(plan[0]), device=device), torch.zeros_like(said)

    def drawn_by(student: Network | None) -> None:
        found = trajectories(networks.teacher, student, levels, noise, said, captions.empty, settings)
        begins.copy_(found[0])
        ends.copy_(found[1])

    def update() -> None:
        error = (networks.student(noisy, now, states).float() - wanted).square().mean((1, 2, 3))
        # Pseudo-Huber (Song & Dhariwal 2023, Sec. 3.3), so that few ambiguous states do not rule
        descend(((error + 0.03**2).sqrt() - 0.03).mean(), unet, adam)
        running.lerp_(error.detach().mean(), 0.02)

    draw = repeated(lambda: drawn_by(None), device, first=1)
    own, learn = None, None
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    while not clock.over:
        if own is None and clock.share > settings.on_policy:
            draw = own = repeated(lambda: drawn_by(networks.drawing), device, first=1)
        said.copy_(captions.draw(torch.randint(0, len(captions.counts), (batch,), device=device), 0.0))
        noise.normal_()
        draw()
        kept = [*kept[-(buffer - 1) :], (begins.clone(), ends.clone(), said.clone())]
        for number in [len(kept) - 1, *torch.randint(0, len(kept), (settings.distil_updates - 1,)).tolist()]:
            step = torch.randint(0, settings.few_steps, (batch,), device=device)
            rows = torch.arange(batch, device=device)
            from_here, to_there, caption = kept[number]
            noisy.copy_(from_here[step, rows])
            now.copy_(plan[step])
            wanted.copy_(levels.velocity_between(noisy, to_there[step, rows], now, plan[step + 1]))
            states.copy_(caption)
            clock.begin_update(adam)
            learn = learn or repeated(update, device)
            learn()
            average.step(unet.parameters())
        error = float(running)  # waits for the device, or the clock would run far behind it
        if clock.updates % (settings.distil_updates * 10) == 0:
            log(updates=clock.updates, error=error, own=float(own is not None))
    average.copy_to(unet.parameters())
    log(updates=clock.updates, error=float(running))
    save_half(unet.state_dict(), output, "student")
    return unet
