"""Distillation where the right answer is known: numbers that are normally distributed."""

import copy
import itertools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from latentdiff.conditioning import Conditioning
from latentdiff.diffusion import GaussianDiffusion, RectifiedFlow
from latentdiff.training.batch.batch_types import DiffusionBatch
from latentdiff.training.objectives.consistency import ConsistencyObjective
from latentdiff.training.objectives.distillation import DistillationObjective
from latentdiff.training.objectives.distribution_matching import DistributionMatchingObjective, FollowerObjective
from latentdiff.training.objectives.progressive import ProgressiveObjective
from latentdiff.training.objectives.trajectory import TrajectoryObjective
from latentdiff.training.settings import DistillationSettings

pytestmark = pytest.mark.slow

MEAN, SPREAD = 0.7, 0.4
ZERO_SNR = GaussianDiffusion("scaled_linear", 1000, "v_prediction", zero_terminal_snr=True)
FLOW = RectifiedFlow()


class Affine(nn.Module):
    """Of normally distributed numbers the right prediction is affine in the noisy ones; here it is, for every time."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace()
        signal, sigma = ZERO_SNR.sqrt_alphas_cumprod, ZERO_SNR.sqrt_one_minus_alphas_cumprod
        gain = signal * SPREAD**2 / (signal**2 * SPREAD**2 + sigma**2)  # E[x_0] = MEAN + gain (x_t - signal MEAN)
        rows = torch.stack(
            [(signal - gain) / sigma, (gain * signal - 1) * MEAN / sigma]
        )  # v = (signal x_t - x_0)/sigma
        self.rows = nn.Parameter(rows.float())

    def forward(self, sample: Tensor, timestep: Tensor, **_: Any) -> SimpleNamespace:
        slope, offset = self.rows[:, timestep].view(2, -1, 1, 1, 1)
        return SimpleNamespace(sample=slope * sample + offset)


class AffineFlow(nn.Module):
    """The same of a flow, for each of 50 times."""

    def __init__(self) -> None:
        super().__init__()
        self.config, t = SimpleNamespace(), FLOW.even_times(50)[1:] / 1000
        gain = (1 - t) * SPREAD**2 / ((1 - t) ** 2 * SPREAD**2 + t**2)
        rows = torch.stack([(1 - gain) / t, (gain * (1 - t) - 1) * MEAN / t])  # u = (x_t - x_0) / t
        self.rows = nn.Parameter(torch.cat([torch.zeros(2, 1), rows], 1))

    def forward(self, sample: Tensor, timestep: Tensor, **_: Any) -> SimpleNamespace:
        slope, offset = self.rows[:, (timestep * 50 / 999).round().long()].view(2, -1, 1, 1, 1)
        return SimpleNamespace(sample=slope * sample + offset)


def settings(**values: Any) -> DistillationSettings:
    return DistillationSettings.load(None, {"data": "d", "output": "o", "model": "m", **values})


def learn(objective: DistillationObjective, updates: int, adversary: FollowerObjective | None = None) -> None:
    torch.manual_seed(0)
    groups = [{"params": [one for one in objective.parameters() if one.requires_grad]}]
    if adversary is not None:
        groups.append({"params": list(adversary.parameters())})
    optimizer, rate = torch.optim.Adam(groups, 0.05), 0.02 if adversary is None else 0.01
    for number in range(updates):
        optimizer.param_groups[0]["lr"] = rate * min(1.0, 2 * (1 - number / updates))
        latents = MEAN + SPREAD * torch.randn(128, 1, 2, 2)
        draws, condition = torch.rand(128, dtype=torch.float64), Conditioning(torch.zeros(128, 1, 1))
        result = objective(DiffusionBatch(latents, torch.randn_like(latents), draws, condition, torch.ones(128)))
        loss = result.loss if adversary is None else result.loss + adversary(result.for_adversary).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        objective.after_update(True)


def ddim(objective: DistillationObjective, network: Any, noise: Tensor, times: Sequence[int] | Tensor) -> Tensor:
    sample, condition = noise, Conditioning(torch.zeros(len(noise), 1, 1))
    for now, then in itertools.pairwise(torch.as_tensor(times)[:, None].expand(-1, len(noise))):
        sample = objective.moved(objective.guess(network, sample, now, condition), then)
    return sample.detach()


@pytest.mark.parametrize("method", ["lcm", "progressive", "trajectory"])
def test_a_student_ends_in_one_step_where_its_teacher_ends_in_many(method: str) -> None:
    taught, student, none = Affine().requires_grad_(False), Affine(), torch.zeros(1, 1, 1)
    objective: DistillationObjective
    if method == "lcm":
        chosen = settings(guidance_scale=1, target_decay=0.9)
        objective = ConsistencyObjective(student, taught, ZERO_SNR, (1.0, 1.0), none, chosen)
        learn(objective, 1000)
        times = [*range(999, 0, -20), 0]
    elif method == "trajectory":
        objective = TrajectoryObjective(
            student, taught, ZERO_SNR, (1.0, 1.0), none, steps=1, substeps=32, own_from=300, huber_c=0.03
        )
        learn(objective, 600)
        times = [round(1000 * i / 32) - 1 for i in range(32, -1, -1)]
    else:
        objective = ProgressiveObjective(student, ZERO_SNR, (1.0, 1.0), none, (16, 8, 4, 2, 1), 150)
        learn(objective, 750)
        times = [round(1000 * i / 32) - 1 for i in range(32, -1, -1)]
    noise = torch.randn(500, 1, 1, 1, generator=torch.Generator().manual_seed(1))
    wanted = ddim(objective, taught, noise, times)
    alone = (ddim(objective, taught, noise, [999, -1]) - wanted).abs().mean()
    found = (ddim(objective, student, noise, [999, -1]) - wanted).abs().mean()
    assert alone > 0.2  # the mean alone, whatever the noise
    assert found < 0.003


def test_lcm_of_a_flow_learns_the_consistency_function() -> None:
    taught, student, none = AffineFlow().requires_grad_(False), AffineFlow(), torch.zeros(1, 1, 1)
    objective = ConsistencyObjective(
        student, taught, FLOW, (1.0, 1.0), none, settings(guidance_scale=1, target_decay=0.9)
    )
    learn(objective, 1000)
    noise = torch.randn(500, 1, 1, 1, generator=torch.Generator().manual_seed(1))
    one, many = torch.tensor([999.0, 0.0]), FLOW.even_times(50).flip(0)
    wanted, found = (ddim(objective, *one_of) for one_of in ((taught, noise, many), (student, noise, one)))
    assert (found - wanted).abs().mean() < 0.003
    assert (found - (MEAN + SPREAD * noise)).abs().mean() < 0.02  # the closed form, from which Euler's steps differ
    assert (ddim(objective, taught, noise, one) - wanted).abs().mean() > 0.2


def test_the_pictures_of_one_step_are_distributed_as_the_teachers() -> None:
    taught, student, none = Affine().requires_grad_(False), Affine(), torch.zeros(1, 1, 1)
    with torch.no_grad():
        student.rows[0, 999] = -0.1  # or it has no way to tell up from down
    follows, chosen = copy.deepcopy(student), settings(method="dmd", guidance_scale=1, few_steps=1)
    objective = DistributionMatchingObjective(student, taught, ZERO_SNR, (1.0, 1.0), none, follows, chosen)
    learn(objective, 800, FollowerObjective(follows, ZERO_SNR))
    noise = torch.randn(20_000, 1, 1, 1, generator=torch.Generator().manual_seed(1))
    drawn = ddim(objective, student, noise, [999, -1])
    assert float(drawn.mean()) == pytest.approx(MEAN, abs=0.03)
    assert float(drawn.std()) == pytest.approx(SPREAD, abs=0.04)
