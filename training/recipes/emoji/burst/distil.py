"""A few-step student of the denoiser, as `latentdiff distill method=trajectory` makes one, in so many seconds.

Trajectories are kept in a buffer whose oldest batch gives way to each new one, drawn by the student of that moment:
nothing has to go on from a checkpoint here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor

from latentdiff.conditioning import Conditioning
from latentdiff.training.objectives.trajectory import Trajectories, TrajectoryObjective, pseudo_huber
from latentdiff.training.settings.distillation import HUBER_C

from .clock import Clock, Log, descend, optimizer, repeated, save_half
from .denoiser import Captions, as_network, build, process_of, warm_up
from .sampling import Network
from .settings import BurstSettings


class Denoiser:
    """A `Network` that is called as denoisers are, by keyword and with an answer that has a name."""

    def __init__(self, network: Network) -> None:
        self.network, self.config = network, SimpleNamespace()

    def __call__(self, noisy: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=self.network(noisy, timestep, encoder_hidden_states))


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


def objective_of(networks: Networks, empty: Tensor, settings: BurstSettings) -> TrajectoryObjective:
    """What `latentdiff distill method=trajectory` minimises. empty: text states (1, L, D) of no prompt."""
    return TrajectoryObjective(
        Denoiser(networks.student),
        Denoiser(networks.teacher),
        process_of(settings),
        (settings.guidance_scale, settings.guidance_scale),
        empty,
        steps=settings.few_steps,
        substeps=settings.teacher_substeps,
        huber_c=HUBER_C,
    )


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
    objective, log = objective_of(networks, captions.empty, settings), Log(output / "log.jsonl", "distillation")
    adam = optimizer(unet, settings.distil_rate)
    average = EMAModel(unet.parameters(), 0.998, foreach=True)
    clock = Clock(seconds, settings.distil_rate, warmup=100, fall=0.5)
    side, running = settings.latent_size, torch.zeros((), device=device)
    # What graphs read and write: a batch of trajectories that is drawn, and one of states that is learned from
    noise = torch.zeros(batch, settings.latent_channels, side, side, device=device)
    said = torch.zeros(batch, *captions.states.shape[1:], device=device, dtype=captions.states.dtype)
    drawn = Trajectories(*(torch.zeros(settings.few_steps, *noise.shape, device=device) for _ in range(2)))
    learned, states = Trajectories(torch.zeros_like(noise), torch.zeros_like(noise)), torch.zeros_like(said)
    index = torch.full((batch,), settings.few_steps - 1, device=device)
    rows, scales = torch.arange(batch, device=device), torch.full((batch,), settings.guidance_scale, device=device)

    def drawn_by(student: Network | None) -> None:
        own = None if student is None else Denoiser(student)
        copy(objective.trajectories(noise, Conditioning(said), scales, own), drawn)

    def update() -> None:
        error = objective.errors(learned, index, Conditioning(states), scales)
        descend(pseudo_huber(error, objective.huber_c).mean(), unet, adam)
        running.lerp_(error.detach().mean(), 0.02)

    draw = repeated(lambda: drawn_by(None), device, first=1)
    own, learn = None, None
    kept: list[tuple[Trajectories, Tensor]] = []
    while not clock.over:
        if own is None and clock.share > settings.on_policy:
            draw = own = repeated(lambda: drawn_by(networks.drawing), device, first=1)
        said.copy_(captions.draw(torch.randint(0, len(captions.counts), (batch,), device=device), 0.0))
        noise.normal_()
        draw()
        kept = [*kept[-(buffer - 1) :], (Trajectories(*(states.clone() for states in drawn)), said.clone())]
        for number in [len(kept) - 1, *torch.randint(0, len(kept), (settings.distil_updates - 1,)).tolist()]:
            index.random_(0, settings.few_steps)
            trajectories, caption = kept[number]
            copy(trajectories.some(index, rows), learned)
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


def copy(found: Trajectories, place: Trajectories) -> None:
    """What was found to where a graph wants it."""
    for one, other in zip(found, place, strict=True):
        other.copy_(one)
