"""Distillation's losses, against diffusers' schedulers and closed forms, on real networks of a few weights."""

import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from tiny import UNET
from torch import Tensor

from latentdiff.conditioning import Conditioning
from latentdiff.diffusion import GaussianDiffusion, RectifiedFlow
from latentdiff.models import UNet2DConditionModel
from latentdiff.models.discriminator import FeatureDiscriminator
from latentdiff.training.batch.batch_types import DiffusionBatch
from latentdiff.training.objectives.adversarial import (
    AdversarialObjective,
    FeatureDiscriminatorObjective,
    feature_widths,
    slope_at,
)
from latentdiff.training.objectives.consistency import ConsistencyObjective
from latentdiff.training.objectives.distillation import follow, follower, further_noise
from latentdiff.training.objectives.distribution_matching import DistributionMatchingObjective
from latentdiff.training.objectives.objective import RealAndFake
from latentdiff.training.objectives.progressive import ProgressiveObjective
from latentdiff.training.objectives.trajectory import KEPT, TrajectoryObjective
from latentdiff.training.settings import DistillationSettings
from latentdiff.training.trainers.distill import student_of

LCM = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
ZERO_SNR = GaussianDiffusion("scaled_linear", 1000, "v_prediction", zero_terminal_snr=True)
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


def test_lcm_of_a_flow_is_diffusers_step_along_it_between_two_answers_of_its_lcm_scheduler(
    batch: DiffusionBatch, empty: Tensor
) -> None:
    taught, student, chosen = teacher(), teacher().requires_grad_(True), settings(guidance_scale=3, solver_steps=10)
    objective = ConsistencyObjective(student, taught, RectifiedFlow(2.0), (3.0, 3.0), empty, chosen)
    assert objective.target is not None
    with torch.no_grad():
        objective.target.conv_out.bias.add_(0.3)
    plan, losses = plan_of_a_flow(10), []
    lcm = diffusers.FlowMatchLCMScheduler()

    def answer(network: Any, sample: Tensor, time: float, sigma: float, own: Tensor) -> Tensor:
        lcm._step_index, lcm.sigmas = 0, torch.tensor([sigma, 0.0])
        return lcm.step(network(sample, time, own).sample, torch.tensor(time), sample).prev_sample

    for i, draw in enumerate(batch.draws.tolist()):
        place, own = 9 - min(int(draw * 10), 9), batch.condition.states[i : i + 1]
        (time, sigma), (less, then) = plan[place : place + 2]
        noisy = (1 - sigma) * batch.latents[i : i + 1] + sigma * batch.noise[i : i + 1]
        with torch.no_grad():
            nearer = euler(taught, noisy, plan[place : place + 2], empty, own)
            wanted = answer(objective.target, nearer, less, then, own) if then else nearer
        losses.append(((answer(student, noisy, time, sigma, own) - wanted).square() + 0.001**2).sqrt().mean() - 0.001)
    torch.testing.assert_close(objective(batch).loss, torch.stack(losses).mean(), atol=0, rtol=1e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_true_consistency_function_of_a_flow_has_no_loss(shift: float) -> None:
    """Of N(mean, spread^2) it is mean + spread (x - (1 - t) mean) / sqrt((1 - t)^2 spread^2 + t^2)."""
    mean, spread = 0.7, 0.4

    class Known(torch.nn.Module):
        def __init__(self, is_student: bool) -> None:
            super().__init__()
            self.is_student, self.config = is_student, SimpleNamespace()

        def forward(self, sample: Tensor, timestep: Tensor, **_: Any) -> SimpleNamespace:
            t = timestep.view(-1, 1, 1, 1) / 1000
            variance, off = (1 - t) ** 2 * spread**2 + t**2, sample - (1 - t) * mean
            clean = mean + (spread / variance.sqrt() if self.is_student else (1 - t) * spread**2 / variance) * off
            return SimpleNamespace(sample=(sample - clean) / t.clamp(min=1e-6))

    def loss(student: Known, steps: int) -> float:
        chosen = settings(guidance_scale=1, solver_steps=steps, loss="l2", target_decay=0)
        flow, given = RectifiedFlow(shift), Conditioning(torch.zeros(2000, 1, 1))
        objective = ConsistencyObjective(student, Known(False), flow, (1.0, 1.0), torch.zeros(1, 1, 1), chosen)
        generator = torch.Generator().manual_seed(0)
        clean, noise = torch.randn(2, 2000, 1, 2, 2, generator=generator)
        draws = torch.rand(2000, generator=generator, dtype=torch.float64)
        return float(objective(DiffusionBatch(mean + spread * clean, noise, draws, given, torch.ones(2000))).loss)

    coarse, fine = (loss(Known(True), steps) for steps in (50, 200))
    assert fine < coarse / 100  # of Euler's step alone, whose error is of second order
    assert coarse < loss(Known(False), 50) / 10


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


def progressive(empty: Tensor, stages: tuple[int, ...], predicts: str = "v_prediction") -> ProgressiveObjective:
    process = GaussianDiffusion("scaled_linear", 1000, predicts, zero_terminal_snr=predicts != "epsilon")
    return ProgressiveObjective(teacher().requires_grad_(True), process, (3.0, 3.0), empty, stages, stage_steps=2)


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction"])
def test_progressive_ends_in_one_step_where_diffusers_ddim_ends_in_two(
    batch: DiffusionBatch, empty: Tensor, predicts: str
) -> None:
    objective = progressive(empty, (4,), predicts)
    with torch.no_grad():
        objective.teacher.conv_out.bias.add_(0.3)
    schedulers = [
        diffusers.DDIMScheduler(
            **LCM,
            prediction_type=predicts,
            timestep_spacing="trailing",
            rescale_betas_zero_snr=predicts != "epsilon",
        )
        for _ in range(2)
    ]
    coarse, fine = schedulers
    coarse.set_timesteps(4)
    fine.set_timesteps(8)
    losses = []
    for i, draw in enumerate(batch.draws.tolist()):
        place = int(draw * 4)
        t, states = int(coarse.timesteps[3 - place]), batch.condition.states[i : i + 1]
        noisy = fine.add_noise(batch.latents[i : i + 1], batch.noise[i : i + 1], torch.tensor([t]))
        ended = noisy
        with torch.no_grad():
            for step in fine.timesteps[6 - 2 * place : 8 - 2 * place].tolist():
                ended = fine.step(objective.teacher(ended, step, states).sample, step, ended).prev_sample
        # what DDIM's single step must be told to end there too: affine in the prediction, so from two trials
        at_zero, at_one = (coarse.step(torch.full_like(noisy, one), t, noisy).prev_sample for one in (0.0, 1.0))
        wanted = (ended - at_zero) / (at_one - at_zero)
        own = objective.student(noisy, t, states).sample
        level = float(coarse.alphas_cumprod[t])
        per_clean = level / (1 - level) if predicts == "epsilon" else 1 / (1 - level)
        error = (own - wanted).square().mean() / per_clean  # of x_0
        losses.append(error * max(1.0, level / (1 - level)))
    torch.testing.assert_close(objective(batch).loss, torch.stack(losses).mean(), atol=0, rtol=2e-4)


def test_the_first_stage_takes_the_guidance_over(batch: DiffusionBatch, empty: Tensor) -> None:
    objective = progressive(empty, (0, 8, 4))
    times = (batch.draws * 1000).long()
    noisy = objective.process.mix(batch.latents, batch.noise, times)
    states = batch.condition.states
    with torch.no_grad():
        without = objective.teacher(noisy, times, empty.expand(SIZE, -1, -1)).sample
        with_prompt = objective.teacher(noisy, times, states).sample
    error = 2.0 * (with_prompt - without)  # of v; that of x_0 is sigma times it
    _, sigma = objective.process.coefficients(times, noisy)
    weight = objective.process.snr(times).clamp(min=1).float()
    wanted = ((sigma * error).square().flatten(1).mean(1) * weight).mean()
    torch.testing.assert_close(objective(batch).loss, wanted, rtol=1e-4, atol=1e-6)


def test_after_each_stage_the_student_teaches(empty: Tensor) -> None:
    objective = progressive(empty, (0, 8, 4))
    weights = [network.conv_in.bias for network in (objective.student, objective.teacher)]
    seen = []
    for number in range(8):
        with torch.no_grad():
            weights[0].fill_(number)
        objective.after_update(True)
        seen.append((objective.steps, float(weights[1][0])))
    first = seen[0][1]
    assert seen == [(0, first), (8, 1.0), (8, 1.0), (4, 3.0), (4, 3.0), (4, 3.0), (4, 3.0), (4, 3.0)]


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction"])
def test_each_step_of_a_trajectory_ends_where_diffusers_guided_ddim_ends(
    batch: DiffusionBatch, empty: Tensor, predicts: str
) -> None:
    zero_snr = predicts != "epsilon"
    process = GaussianDiffusion("scaled_linear", 1000, predicts, zero_terminal_snr=zero_snr)
    taught, student = teacher(), teacher().requires_grad_(True)
    with torch.no_grad():
        student.conv_out.bias.add_(0.3)
    kind = {"steps": 2, "substeps": 2, "repeats": 1, "own_from": 0, "huber_c": 0.1}
    objective = TrajectoryObjective(student, taught, process, (3.0, 3.0), empty, **kind)
    common = {**LCM, "prediction_type": predicts, "timestep_spacing": "trailing", "rescale_betas_zero_snr": zero_snr}
    coarse, fine = diffusers.DDIMScheduler(**common), diffusers.DDIMScheduler(**common)
    coarse.set_timesteps(2)
    fine.set_timesteps(4)
    for turn in range(2):
        objective.updates.fill_(turn * KEPT)
        losses = []
        for i, draw in enumerate(batch.draws.tolist()):
            place = (int(draw * 2) + turn) % 2  # the other step at the other turn
            state, states = batch.noise[i : i + 1], batch.condition.states[i : i + 1]
            with torch.no_grad():
                if place == 0:  # where the student's own first step ends
                    state = coarse.step(student(state, 999, states).sample, 999, state).prev_sample
                ended = state
                for t in fine.timesteps[2 - 2 * place : 4 - 2 * place]:
                    without, with_prompt = (taught(ended, t, own).sample for own in (empty, states))
                    ended = fine.step(without + 3 * (with_prompt - without), t, ended).prev_sample
            now = int(coarse.timesteps[1 - place])
            at_zero, at_one = (coarse.step(torch.full_like(state, one), now, state).prev_sample for one in (0.0, 1.0))
            wanted = (ended - at_zero) / (at_one - at_zero)
            error = (student(state, now, states).sample - wanted).square().mean()
            error = error / (1 if zero_snr else coarse.alphas_cumprod[now])  # of v
            losses.append((error + 0.1**2).sqrt() - 0.1)
        torch.testing.assert_close(objective(batch).loss, torch.stack(losses).mean(), atol=0, rtol=5e-4)


def plan_of_a_flow(steps: int) -> list[tuple[float, float]]:
    """diffusers' times and noise levels of a flow, from noise."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0)
    scheduler.set_timesteps(sigmas=[0.999 * (steps - i) / steps for i in range(steps)])
    return list(zip([*scheduler.timesteps.tolist(), 0.0], scheduler.sigmas.tolist(), strict=True))


@torch.no_grad()
def euler(network: Any, state: Tensor, plan: list[tuple[float, float]], *texts: Tensor) -> Tensor:
    """Steps of dx = u dsigma, with a guidance of 3 if there are two texts, the empty one first."""
    for (time, sigma), (_, then) in itertools.pairwise(plan):
        answers = [network(state, time, text).sample for text in texts]
        velocity = answers[0] if len(answers) == 1 else answers[0] + 3 * (answers[1] - answers[0])
        state = state + (then - sigma) * velocity
    return state


def test_each_step_of_a_flows_trajectory_ends_where_diffusers_times_lead(batch: DiffusionBatch, empty: Tensor) -> None:
    taught, student = teacher(), teacher().requires_grad_(True)
    with torch.no_grad():
        student.conv_out.bias.add_(0.3)
    kind = {"steps": 2, "substeps": 2, "repeats": 1, "own_from": 0, "huber_c": 0.1}
    objective = TrajectoryObjective(student, taught, RectifiedFlow(2.0), (3.0, 3.0), empty, **kind)
    coarse, fine = plan_of_a_flow(2), plan_of_a_flow(4)
    for turn in range(2):
        objective.updates.fill_(turn * KEPT)
        losses = []
        for i, draw in enumerate(batch.draws.tolist()):
            first = 1 - (int(draw * 2) + turn) % 2  # the other step at the other turn
            state, states = batch.noise[i : i + 1], batch.condition.states[i : i + 1]
            state = euler(student, state, coarse[: first + 1], states)  # where the student's own steps end
            ended = euler(taught, state, fine[2 * first : 2 * first + 3], empty, states)
            (time, sigma), (_, then) = coarse[first : first + 2]
            wanted = (ended - state) / (then - sigma)
            error = (student(state, time, states).sample - wanted).square().mean()
            losses.append((error + 0.1**2).sqrt() - 0.1)
        torch.testing.assert_close(objective(batch).loss, torch.stack(losses).mean(), atol=0, rtol=5e-4)


def test_progressive_ends_in_one_step_of_a_flow_where_its_teacher_ends_in_two(
    batch: DiffusionBatch, empty: Tensor
) -> None:
    student, process = teacher().requires_grad_(True), RectifiedFlow(2.0)
    objective = ProgressiveObjective(student, process, (3.0, 3.0), empty, (0, 4), stage_steps=1)
    with torch.no_grad():
        objective.teacher.conv_out.bias.add_(0.3)
    assert objective(batch).loss.isfinite()  # of the guided stage, also next to the picture
    objective.updates.fill_(1)
    coarse, fine, losses = plan_of_a_flow(4), plan_of_a_flow(8), []
    for i, draw in enumerate(batch.draws.tolist()):
        first, states = 3 - int(draw * 4), batch.condition.states[i : i + 1]
        (time, sigma), (_, then) = coarse[first : first + 2]
        noisy = (1 - sigma) * batch.latents[i : i + 1] + sigma * batch.noise[i : i + 1]
        ended = euler(objective.teacher, noisy, fine[2 * first : 2 * first + 3], states)
        error = student(noisy, time, states).sample - (ended - noisy) / (then - sigma)
        losses.append(error.square().mean() * sigma**2 * max(1.0, ((1 - sigma) / sigma) ** 2))  # of x_0
    torch.testing.assert_close(objective(batch).loss, torch.stack(losses).mean(), atol=0, rtol=5e-4)


def test_a_cycle_has_a_few_batches_and_each_step_of_them_equally_often(batch: DiffusionBatch, empty: Tensor) -> None:
    objective = TrajectoryObjective(
        teacher().requires_grad_(True),
        teacher(),
        ZERO_SNR,
        (3.0, 3.0),
        empty,
        steps=2,
        substeps=3,
        repeats=3,
        own_from=50,
        huber_c=0.1,
    )
    cycle = 6 * KEPT
    found = [objective.batch_of(update) for update in range(2 * cycle)]
    assert found == [*range(KEPT)] * 6 + [*range(KEPT, 2 * KEPT)] * 6
    times = [objective.relative_time(update) for update in range(2 * cycle)]
    assert sum(times) == pytest.approx(2 * cycle)
    assert times[0] == times[cycle + KEPT - 1] > times[KEPT] == times[-1]
    drawn = objective.trajectories(batch.noise, batch.condition, torch.full((SIZE,), 3.0))
    torch.testing.assert_close(drawn.begins[0], drawn.ends[1])
    assert torch.equal(drawn.begins[1], batch.noise)
    assert objective.drawing is not None
    seen = []
    for _ in range(2 * cycle):
        with torch.no_grad():
            objective.student.conv_in.bias.fill_(float(objective.updates))
        objective.after_update(True)
        seen.append(float(objective.drawing.conv_in.bias[0]))
    assert seen[cycle - 1 :] == [cycle - 1] * cycle + [2 * cycle - 1]  # as it was at the last cycle's end
    assert objective(batch).figures["own_states"] == 1  # 50 was in the second cycle, 96 begins the third


def test_held_out_trajectories_are_the_teachers_and_one_for_each_picture(empty: Tensor, batch: DiffusionBatch) -> None:
    objective = TrajectoryObjective(
        teacher().requires_grad_(True),
        teacher(),
        ZERO_SNR,
        (3.0, 3.0),
        empty,
        steps=2,
        substeps=2,
        own_from=0,
        huber_c=0.1,
    )
    with torch.no_grad():
        objective.student.conv_out.bias.add_(0.3)
    named = replace(batch, names=("a", "b", "a", "b", "c", "c"))
    firsts, rows = torch.tensor([0, 1, 4]), torch.tensor([0, 1, 0, 1, 2, 2])
    drawn = objective.trajectories(batch.noise[firsts], batch.condition.select(firsts), torch.full((3,), 3.0))
    index = (batch.draws * 2).long()
    wanted = objective.errors(drawn.some(index, rows), index, batch.condition, torch.full((SIZE,), 3.0))
    for _ in range(2):
        torch.testing.assert_close(objective(named, held_out=True).figures["val_loss"], wanted)


def adversarial(empty: Tensor, **values: Any) -> AdversarialObjective:
    chosen = settings(method="adversarial", discriminator_channels=8, guidance_scale=3, **values)
    taught = teacher()
    process = GaussianDiffusion("scaled_linear", 1000, "v_prediction", zero_terminal_snr=True)
    discriminator = FeatureDiscriminator(feature_widths(taught), 8)
    student = teacher().requires_grad_(True)
    return AdversarialObjective(student, taught, process, (3.0, 3.0), empty, discriminator, chosen)


def test_adversarial_is_the_distance_to_the_teacher_and_the_discriminators_word(
    batch: DiffusionBatch, empty: Tensor
) -> None:
    objective = adversarial(empty, few_steps=4, distillation_weight=2.0, discriminator_weight=0.5)
    process, states = objective.process, batch.condition.states
    result = objective(batch)
    asked = torch.tensor([999, 999, 749, 749, 249, 249])  # of draws in four equal parts
    with torch.no_grad():
        noisy = process.mix(batch.latents, batch.noise, asked)
        answer = objective.meaning(noisy, objective.student(noisy, asked, states).sample, asked).clean
        noise, uniform = further_noise(batch, 2)
        times = ((0.02 + 0.96 * uniform) * 999).long()
        judged = process.mix(answer, noise[0], times)
        one, other = (objective.teacher(judged, times, own).sample for own in (empty.expand(SIZE, -1, -1), states))
        wanted = objective.meaning(judged, one + 3 * (other - one), times).clean
        signal, _ = process.coefficients(times, judged)
        distance = (signal * (answer - wanted).square()).mean()
        judge = objective._discriminator[0]
        seen = objective.features(judged, times, batch.condition)
        torch.testing.assert_close(result.loss, 2 * distance - 0.5 * judge(seen).mean(), rtol=1e-4, atol=1e-6)
    assert result.for_adversary is not None
    real = objective.features(process.mix(batch.latents, noise[1], times), times, batch.condition)
    for found, expected in zip(result.for_adversary.real, real, strict=True):
        torch.testing.assert_close(found, expected)
    result.loss.backward()
    assert all(parameter.grad is not None for parameter in objective.student.parameters())
    assert all(parameter.grad is None for parameter in [*objective.teacher.parameters(), *judge.parameters()])
    early = adversarial(empty, discriminator_start=1)
    assert early(batch).for_adversary is None
    early.after_update(True)
    assert early(batch).for_adversary is not None


@pytest.mark.parametrize("method", ["adversarial", "dmd"])
def test_a_flow_is_judged_where_it_is_drawn(batch: DiffusionBatch, empty: Tensor, method: str) -> None:
    taught, student, process = teacher(), teacher().requires_grad_(True), RectifiedFlow(3.0)
    common = (student, taught, process, (1.0, 1.0), empty)
    objective: Any
    if method == "dmd":
        objective = DistributionMatchingObjective(*common, teacher(), settings(method=method, few_steps=2))
    else:
        discriminator = FeatureDiscriminator(feature_widths(taught), 8)
        objective = AdversarialObjective(*common, discriminator, settings(method=method, few_steps=2))
    answer, _ = objective.answer(batch)
    times = torch.tensor([1000.0, 1000, 1000, 1000, 750, 750])  # of draws in two halves; 3 / 2 / (1 + 2 / 2) is 3/4
    signal, sigma = process.coefficients(times, batch.latents)
    noisy = signal * batch.latents + sigma * batch.noise
    torch.testing.assert_close(answer, noisy - sigma * student(noisy, times, batch.condition.states).sample)
    objective(batch).loss.backward()
    assert student.conv_in.weight.grad.isfinite().all()


def test_the_teachers_features_are_what_its_way_up_starts_from(batch: DiffusionBatch, empty: Tensor) -> None:
    objective = adversarial(empty)
    times = torch.full((SIZE,), 300)
    found = objective.features(batch.latents, times, batch.condition)
    assert [tuple(one.shape[1:]) for one in found] == [(8, 4, 4), (16, 4, 4), (16, 4, 4)]
    middle = objective.teacher.mid_block.register_forward_hook(lambda *_: found[-1])
    again = objective.teacher(batch.latents, times, batch.condition.states).sample
    middle.remove()
    assert torch.equal(again, objective.teacher(batch.latents, times, batch.condition.states).sample)
    assert not any(block._forward_hooks for block in objective.teacher.modules())


def test_further_noise_is_a_pictures_own(batch: DiffusionBatch) -> None:
    noise, uniform = further_noise(batch, 2)
    part = DiffusionBatch(
        batch.latents[2:4], batch.noise[2:4], batch.draws[2:4], batch.condition.select(slice(2, 4)), torch.ones(2)
    )
    torch.testing.assert_close(further_noise(part, 2), (noise[:, 2:4], uniform[2:4]), rtol=0, atol=0)
    assert noise.shape == (2, *batch.latents.shape)
    assert len({float(one) for one in noise[:, :, 0, 0, 0].flatten()}) == 2 * SIZE


def test_a_discriminator_of_features_learns() -> None:
    generator = torch.Generator().manual_seed(0)
    real = tuple(torch.randn(8, width, 4, 4, generator=generator) for width in (4, 6))
    fake = tuple(one.mean((2, 3), keepdim=True).expand_as(one) for one in real)
    objective = FeatureDiscriminatorObjective(FeatureDiscriminator((4, 6), 8), r1_weight=1e-3)
    optimizer = torch.optim.Adam(objective.parameters(), 1e-2)
    results = []
    for _ in range(40):
        results.append(objective(RealAndFake(real, fake)))
        optimizer.zero_grad()
        results[-1].loss.backward()
        optimizer.step()
    assert results[-1].figures["discriminator_accuracy"] > 0.9
    assert results[-1].loss < 0.5 * results[0].loss


def test_the_slope_is_that_of_each_pictures_mean_logit() -> None:
    features = [torch.randn(3, 2, 1, 1, requires_grad=True), torch.randn(3, 1, 2, 2, requires_grad=True)]
    logits = torch.cat([2 * features[0].flatten(1), 3 * features[1].flatten(1)], dim=1)  # (3, 6)
    assert slope_at(logits, features) == pytest.approx((2 * 2**2 + 4 * 3**2) / 6**2)


def test_distribution_matching_goes_where_the_teachers_score_is_larger(batch: DiffusionBatch, empty: Tensor) -> None:
    taught, student, follows = teacher(), teacher().requires_grad_(True), teacher()
    torch.nn.init.normal_(follows.conv_out.bias, std=0.3)
    process = GaussianDiffusion("scaled_linear", 1000, "v_prediction", zero_terminal_snr=True)
    chosen = settings(method="dmd", guidance_scale=3)
    objective = DistributionMatchingObjective(student, taught, process, (3.0, 3.0), empty, follows, chosen)
    result = objective(batch)
    answer, scales = objective.answer(batch)
    noise, uniform = further_noise(batch, 2)
    times = ((0.02 + 0.96 * (uniform.double() * 1000).floor() / 1000) * 999).long()
    noisy = process.mix(answer.detach(), noise[0], times)
    of_teacher = objective.guided_guess(noisy, times, batch.condition, scales).clean
    of_student = objective.guess(follows, noisy, times, batch.condition).clean
    size = (answer - of_teacher).abs().mean((1, 2, 3), keepdim=True)
    step = ((of_student - of_teacher) / size).detach()
    torch.testing.assert_close(result.loss, 0.5 * step.square().mean(), rtol=1e-4, atol=1e-6)
    wanted = (answer * step / answer.numel()).sum()  # its gradient is DMD's
    own, other = (torch.autograd.grad(one, student.conv_in.weight)[0] for one in (result.loss, wanted))
    torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-6)
    assert result.for_adversary is not None
    torch.testing.assert_close(result.for_adversary.fake.latents, answer.detach())
    assert not result.for_adversary.fake.latents.requires_grad
