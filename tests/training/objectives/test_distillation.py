"""Distillation's losses, against diffusers' schedulers and closed forms, on real networks of a few weights."""

from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from tiny import UNET
from torch import Tensor

from latentdiff.conditioning import Conditioning
from latentdiff.diffusion import GaussianDiffusion
from latentdiff.models import UNet2DConditionModel
from latentdiff.training.batch.batch_types import DiffusionBatch
from latentdiff.training.objectives.consistency import ConsistencyObjective
from latentdiff.training.objectives.distillation import follow, follower
from latentdiff.training.settings import DistillationSettings
from latentdiff.training.trainers.distill import student_of

LCM = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
SIZE = 6


def settings(**values: Any) -> DistillationSettings:
    return DistillationSettings.load(None, {"data": "d", "output": "o", "model": "m", **values})


@pytest.fixture(scope="module")
def batch() -> DiffusionBatch:
    generator = torch.Generator().manual_seed(0)
    return DiffusionBatch(
        latents=torch.randn(SIZE, 4, 8, 8, generator=generator),
        noise=torch.randn(SIZE, 4, 8, 8, generator=generator),
        draws=torch.tensor([0.0, 0.013, 0.3, 0.49, 0.77, 0.9999], dtype=torch.float64),
        condition=Conditioning(torch.randn(SIZE, 5, 16, generator=generator)),
        loss_weight=torch.ones(SIZE),
    )


@pytest.fixture(scope="module")
def empty() -> Tensor:
    return torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(1))


def teacher() -> Any:
    torch.manual_seed(2)
    return UNet2DConditionModel(**UNET).eval().requires_grad_(False)


@pytest.mark.parametrize("loss", ["huber", "l2"])
@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction", "sample"])
def test_lcm_is_a_step_of_diffusers_ddim_between_two_answers_of_its_lcm_scheduler(
    batch: DiffusionBatch, empty: Tensor, predicts: str, loss: str
) -> None:
    taught, chosen = teacher(), settings(loss=loss, guidance_scale=[2, 6], huber_c=0.1)
    student = student_of(chosen, taught)
    torch.nn.init.normal_(student.time_embedding.cond_proj.weight, std=0.1)
    process = GaussianDiffusion("scaled_linear", 1000, predicts)
    objective = ConsistencyObjective(student, taught, process, (2.0, 6.0), empty, chosen)
    assert objective.target is not None
    with torch.no_grad():
        objective.target.conv_out.bias.add_(0.3)  # another network than the student
    ddim = diffusers.DDIMScheduler(**LCM, prediction_type=predicts, timestep_spacing="trailing", set_alpha_to_one=False)
    lcm = diffusers.LCMScheduler(**LCM, prediction_type=predicts)
    ddim.set_timesteps(50)
    lcm.set_timesteps(50)
    states = batch.condition.states
    losses = []
    for i, draw in enumerate(batch.draws.tolist()):
        place = min(int(draw * 50), 49)
        t = int(ddim.timesteps[49 - place])
        assert t == 20 * place + 19
        scale, own = 2 + 4 * (draw * 50 - place), states[i : i + 1]
        embedded = diffusers.LatentConsistencyModelPipeline.get_guidance_scale_embedding(
            None, torch.tensor([scale - 1]), 256
        )
        noisy = lcm.add_noise(batch.latents[i : i + 1], batch.noise[i : i + 1], torch.tensor([t]))

        def answer(network: Any, sample: Tensor, t: int, own: Tensor = own, told: Tensor = embedded) -> Tensor:
            lcm._step_index, lcm.timesteps = 0, torch.tensor([t])
            return lcm.step(network(sample, t, own, timestep_cond=told).sample, t, sample).denoised

        with torch.no_grad():
            without, with_prompt = (taught(noisy, t, one).sample for one in (empty, own))
            nearer = ddim.step(without + scale * (with_prompt - without), t, noisy).prev_sample
            difference = answer(student, noisy, t) - answer(objective.target, nearer, max(t - 20, 0))
        huber = (difference.square() + 0.1**2).sqrt() - 0.1
        losses.append(huber.mean() if loss == "huber" else difference.square().mean())
    torch.testing.assert_close(objective(batch).loss, torch.stack(losses).mean(), atol=0, rtol=1e-5)


def test_without_a_teacher_the_nearer_point_has_less_of_the_same_noise(batch: DiffusionBatch, empty: Tensor) -> None:
    chosen = settings(method="consistency", loss="l2", solver_steps=10)
    student = teacher().requires_grad_(True)
    process = GaussianDiffusion("scaled_linear", 1000, "v_prediction")
    objective = ConsistencyObjective(student, None, process, (1.0, 1.0), empty, chosen)
    assert objective.target is None  # its own answer, held fixed
    start = (batch.draws * 10).long() * 100 + 99
    end = (start - 100).clamp(min=0)
    answers = [
        objective.consistent(student, process.mix(batch.latents, batch.noise, times), times, batch.condition)
        for times in (start, end)
    ]
    wanted = F.mse_loss(answers[0], answers[1].detach())
    loss = objective(batch).loss
    torch.testing.assert_close(loss, wanted)
    own, other = (torch.autograd.grad(one, student.conv_in.weight)[0] for one in (loss, wanted))
    torch.testing.assert_close(own, other)


def test_at_time_0_the_answer_is_the_picture_itself(batch: DiffusionBatch, empty: Tensor) -> None:
    process = GaussianDiffusion("scaled_linear", 1000, "v_prediction")
    objective = ConsistencyObjective(teacher(), teacher(), process, (3.0, 3.0), empty, settings(guidance_scale=3))
    times = torch.zeros(SIZE, dtype=torch.long)
    answer = objective.consistent(objective.student, batch.latents, times, batch.condition)
    assert torch.equal(answer, batch.latents)


def test_a_draw_is_two_independent_uniform_numbers(empty: Tensor) -> None:
    objective = ConsistencyObjective(
        teacher(), teacher(), GaussianDiffusion(), (1.0, 1.0), empty, settings(guidance_scale=1)
    )
    draws = torch.rand(40_000, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    index, uniform = objective.places(draws, 50)
    assert torch.bincount(index, minlength=50).min() > 650
    assert 0 <= uniform.min() < 0.001
    assert 0.999 < uniform.max() < 1
    assert torch.corrcoef(torch.stack([index.float(), uniform]))[0, 1].abs() < 0.02
    assert objective.scales(uniform).eq(1).all()


def test_a_student_begins_as_its_teacher_whatever_the_scale(batch: DiffusionBatch) -> None:
    taught = teacher()
    student = student_of(settings(guidance_scale=[1, 8]), taught)
    told = torch.randn(SIZE, 256)
    states, times = batch.condition.states, torch.full((SIZE,), 500)
    of_student = student(batch.latents, times, states, timestep_cond=told).sample
    assert torch.equal(of_student, taught(batch.latents, times, states).sample)
    of_student.sum().backward()
    assert student.time_embedding.cond_proj.weight.grad.abs().max() > 0


def test_a_follower_moves_by_its_share_where_the_network_learns() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    network[0].requires_grad_(False)
    copied = follower(network)
    before = copied[1].weight.clone()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1.0)
    follow(copied, network, 0.25)
    torch.testing.assert_close(copied[1].weight, before + 0.25)
    torch.testing.assert_close(copied[0].weight, network[0].weight - 1)
    assert not any(parameter.requires_grad for parameter in copied.parameters())
