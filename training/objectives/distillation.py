"""What all distillation has: a student, a teacher that is guided, and what both make of noisy latents."""

import copy
from typing import Any, NamedTuple, Self, TypeVar

import torch
from torch import Tensor, nn

from latentdiff.conditioning import Conditioning
from latentdiff.diffusion.process import Process
from latentdiff.pipelines.core.denoiser import guidance_embedding
from latentdiff.training.batch.batch_types import DiffusionBatch
from latentdiff.training.batch.random_choices import generator_of
from latentdiff.training.objectives.objective import Objective

Network = TypeVar("Network", bound=nn.Module)


class Guess(NamedTuple):
    """What a prediction stands for, (B, C, h, w) each."""

    clean: Tensor
    noise: Tensor


class DistillationObjective(Objective[DiffusionBatch]):
    """A student that learns to do in few steps what its teacher does in many, with the teacher's guidance in it.

    Args:
        student: called as denoisers are; one with ``time_cond_proj_dim`` is told the guidance scale.
        teacher: frozen; called as the student, but never told the scale.
        process: of both.
        guidance: least and largest scale; where both are equal, all of training has that one.
        empty: what guidance keeps away from: text states (1, L, D) of the empty prompt, or all conditions that differ
            from one's without it (a pooled embedding for SDXL, a mask for PixArt; of a DiT the label of no class).
    """

    def __init__(
        self, student: Any, teacher: Any, process: Process, guidance: tuple[float, float], empty: Tensor | Conditioning
    ) -> None:
        super().__init__()
        self.student, self.teacher, self.process, self.guidance = student, teacher, process, guidance
        nothing = Conditioning(empty) if isinstance(empty, Tensor) else empty
        self.empty_names = [name for name, _ in nothing.items()]
        for name, tensor in nothing.items():
            self.register_buffer(f"empty_{name}", tensor.float() if name == "states" else tensor, persistent=False)
        self.updates: Tensor  # so far; checkpoints keep it
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))

    def after_update(self, made: bool) -> None:
        """Count it, made or not."""
        self.updates += 1

    def train(self, mode: bool = True) -> Self:
        """The student's mode; all else stays as in drawing."""
        super().train(mode)
        for child in self.children():
            child.train(mode and child is self.student)
        return self

    def places(self, draws: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Two independent uniform numbers of each draw (B,): which of `count` equal parts it lies in, and where there.

        Returns:
            (B,) long from 0 to count - 1, and (B,) float32 in [0, 1), on the device of the networks.
        """
        scaled = draws.double() * count
        index = scaled.long().clamp(max=count - 1)
        return index.to(self.updates.device), (scaled - index).float().to(self.updates.device)

    def scales(self, uniform: Tensor) -> Tensor:
        """Guidance scales (B,) for uniform numbers."""
        least, most = self.guidance
        return least + (most - least) * uniform

    def told(self, network: Any, condition: Conditioning, scales: Tensor) -> Conditioning:
        """The condition as `network` takes it: with the embedded scale (Meng et al. 2023), if it takes one."""
        width = getattr(network.config, "time_cond_proj_dim", None)
        return condition if width is None else condition.replace(guidance=guidance_embedding(scales, width))

    def guess(self, network: Any, noisy: Tensor, times: Tensor, condition: Conditioning) -> Guess:
        """What `network` makes of noisy latents at the times (B,)."""
        prediction = network(noisy, timestep=self.process.model_time(times), **condition.arguments()).sample.float()
        return self.meaning(noisy, prediction, times)

    def guided_guess(self, noisy: Tensor, times: Tensor, condition: Conditioning, scales: Tensor) -> Guess:
        """What the teacher makes of them under classifier-free guidance of the scales (B,) (Ho & Salimans 2022)."""
        if self.guidance == (1.0, 1.0):
            return self.guess(self.teacher, noisy, times, condition)
        both = Conditioning.cat([self.without_prompt(condition), condition])
        twice = self.process.model_time(times).repeat(2)
        prediction = self.teacher(torch.cat([noisy] * 2), timestep=twice, **both.arguments()).sample.float()
        without, with_prompt = prediction.chunk(2)
        guided = without + scales.view(-1, 1, 1, 1) * (with_prompt - without)
        return self.meaning(noisy, guided, times)

    def without_prompt(self, condition: Conditioning) -> Conditioning:
        """The empty prompt in place of those in `condition`, with the same sizes."""
        count, empty = condition.batch_size or 1, {name: getattr(self, f"empty_{name}") for name in self.empty_names}
        expanded = {name: tensor.expand(count, *tensor.shape[1:]) for name, tensor in empty.items()}
        return condition.replace(**{"mask": None, **expanded})

    def meaning(self, noisy: Tensor, prediction: Tensor, times: Tensor) -> Guess:
        """The clean latents and the noise that a prediction stands for; of its channels the first C count."""
        target, levels = self.process.predicts, self.process.coefficients(times, noisy)
        prediction = prediction[:, : noisy.shape[1]]
        return Guess(target.clean(noisy, prediction, *levels), target.noise(noisy, prediction, *levels))

    def moved(self, guess: Guess, times: Tensor) -> Tensor:
        """DDIM's deterministic step (Song et al. 2021, Eq. 12) to the times (B,); before 0 the latents are clean.

        On the line of a flow it is Euler's.
        """
        signal, sigma = self.levels(times, guess.clean)
        return signal * guess.clean + sigma * guess.noise

    def levels(self, times: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """signal and sigma, (B, 1, 1, 1); before time 0 they are 1 and 0."""
        signal, sigma = self.process.coefficients(times.clamp(min=0), like)
        clean = (times < 0).view(-1, 1, 1, 1)
        return signal.masked_fill(clean, 1.0), sigma.masked_fill(clean, 0.0)

    def grid(self, steps: int) -> Tensor:
        """The times of a plan from the least, which is clean: (steps + 1,)."""
        return self.process.even_times(steps).to(self.updates.device)

    def clean_between(self, begin: Tensor, end: Tensor, start_times: Tensor, end_times: Tensor) -> Tensor:
        """The x_0 with which a single DDIM step leads from `begin` to `end`. Salimans & Ho, Alg. 2 and App. G."""
        (signal, sigma), (then_signal, then_sigma) = (self.levels(t, begin) for t in (start_times, end_times))
        ratio = then_sigma / sigma
        return (end - ratio * begin) / (then_signal - ratio * signal)


def given_condition(batch: DiffusionBatch) -> Conditioning:
    """Text states of a batch, or its classes."""
    assert isinstance(batch.condition, Conditioning)
    return batch.condition


def further_noise(batch: DiffusionBatch, count: int) -> tuple[Tensor, Tensor]:
    """More that is random, of each picture's draw, so that it does not depend on which process has the picture.

    Returns:
        `count` times standard normal noise (count, B, C, h, w), and uniform numbers (B,), on the device of the latents.
    """
    shape, noise, uniform = (count, *batch.latents.shape[1:]), [], []
    for bits in batch.draws.double().view(torch.int64).tolist():
        generator = generator_of(bits)
        noise.append(torch.randn(shape, generator=generator))
        uniform.append(torch.rand((), generator=generator))
    device = batch.latents.device
    return torch.stack(noise, dim=1).to(device), torch.stack(uniform).to(device)


def follower(network: Network) -> Network:
    """A copy that learns without gradients what the network learns: by `follow`. Checkpoints keep what it learned."""
    copied = copy.deepcopy(network).eval()
    for mine, its in zip(copied.parameters(), network.parameters(), strict=True):
        mine.requires_grad_(False)
        mine.learns_without_gradient = its.requires_grad  # type: ignore[attr-defined]
    return copied


@torch.no_grad()
def follow(copied: nn.Module, network: nn.Module, share: float) -> None:
    """Move a `follower`'s weights by `share` of the way to those of its network."""
    pairs = [(a, b) for a, b in zip(copied.parameters(), network.parameters(), strict=True) if b.requires_grad]
    torch._foreach_lerp_([a for a, _ in pairs], [b for _, b in pairs], share)
