"""Rectified flow: times, weights, velocity and samplers, against closed forms, diffusers and v-prediction."""

import math
from typing import Any

import diffusers
import pytest
import torch
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from torch import Tensor

from latentdiff.diffusion import GaussianDiffusion, RectifiedFlow, process_from_config, process_of
from latentdiff.diffusion.flow import resolution_shift
from latentdiff.diffusion.guidance import ClassifierFreeGuidance
from latentdiff.diffusion.probability_flow import log_likelihood, random_signs
from latentdiff.pipelines.core.sampling import Sampler, denoise
from latentdiff.pipelines.core.scheduler_names import change_scheduler

T = torch.tensor([0.02, 0.3, 0.5, 0.9])
SAMPLERS = ("euler", "heun", "dpm++", "unipc")


def pictures(*shape: int) -> tuple[Tensor, Tensor]:
    clean, noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    return clean, noise


def on_the_same_path(prediction_type: str) -> GaussianDiffusion:
    """Gaussian diffusion through the levels T, each x_t of the flow scaled to variance 1."""
    t = T.double()
    return GaussianDiffusion(alphas_cumprod=(1 - t) ** 2 / ((1 - t) ** 2 + t**2), prediction_type=prediction_type)


def test_the_path_is_straight_and_the_network_is_told_where_on_it() -> None:
    flow = RectifiedFlow()
    clean, noise = pictures(4, 2, 4, 4)
    line = T.view(-1, 1, 1, 1)
    torch.testing.assert_close(flow.mix(clean, noise, 1000 * T), (1 - line) * clean + line * noise)
    torch.testing.assert_close(flow.target(clean, noise, 1000 * T), noise - clean)
    assert torch.equal(flow.model_time(1000 * T), 1000 * T)
    assert flow.mix(clean.bfloat16(), noise.bfloat16(), 1000 * T).dtype is torch.bfloat16


def test_v_prediction_on_the_same_path_is_the_same_model() -> None:
    """The same network, through v of the scaled x_t and through the velocity: picture, noise, weights and steps."""
    flow, gaussian = RectifiedFlow(times="uniform"), on_the_same_path("v_prediction")
    clean, noise = pictures(4, 2, 4, 4)
    steps, times = torch.arange(4), 1000 * T
    scale = ((1 - T) ** 2 + T**2).sqrt().view(-1, 1, 1, 1)
    torch.testing.assert_close(flow.mix(clean, noise, times) / scale, gaussian.mix(clean, noise, steps))
    signal, sigma = gaussian.coefficients(steps, clean)
    v = gaussian.target(clean, noise, steps) + 0.1 * pictures(4, 2, 4, 4)[1].flip(0)  # not quite right
    velocity = (sigma - signal) * gaussian.mix(clean, noise, steps) + (signal + sigma) * v
    for i in range(4):
        one, time = slice(i, i + 1), float(times[i])
        found = flow.clean(flow.mix(clean, noise, times)[one], velocity[one], time)
        expected = gaussian.clean(gaussian.mix(clean, noise, steps)[one], v[one], i)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
        assert flow.noise_level(time) == pytest.approx(gaussian.noise_level(i), rel=1e-5)
    torch.testing.assert_close(flow.snr(times), gaussian.snr(steps), rtol=1e-5, atol=0)
    losses = [
        flow.loss(velocity, clean, noise, times, flow.min_snr_weight(times)),
        gaussian.loss(v, clean, noise, steps, gaussian.min_snr_weight(steps)),
        gaussian.predicts.clean(gaussian.mix(clean, noise, steps), v, signal, sigma).sub(clean).square().mean((1, 2, 3))
        * gaussian.snr(steps).clamp(max=5).float(),
    ]
    for loss in losses[1:]:
        torch.testing.assert_close(losses[0], loss, rtol=1e-4, atol=1e-7)


def test_an_euler_step_is_ddims_on_the_same_path() -> None:
    flow, gaussian = RectifiedFlow(), on_the_same_path("v_prediction")
    clean, noise = (picture.double() for picture in pictures(1, 2, 4, 4))
    begin, end = 0.9, 0.5
    stepped = flow.mix(clean, noise, torch.tensor([1000 * begin])) + (end - begin) * (noise - clean)
    signal, sigma = gaussian.level(2)
    assert T[2] == end
    torch.testing.assert_close(stepped / math.hypot(1 - end, end), signal * clean + sigma * noise)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_times_are_those_of_diffusers_training_scripts(shift: float) -> None:
    """Which draw an index into the scheduler's timesteps, and those fall: u there is 1 - t here."""
    uniform = (torch.arange(20_000) + 0.5) / 20_000
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    ways: dict[str, dict[str, Any]] = {
        "uniform": {},
        "logit_normal": {"logit_mean": 0.4, "logit_std": 0.8},
        "mode": {"mode_scale": 1.29},
    }
    for name, options in ways.items():
        theirs = compute_density_for_timestep_sampling(
            name, 20_000, **options, generator=torch.Generator().manual_seed(0)
        )
        drawn = scheduler.timesteps[(theirs * 1000).long()].sort().values
        mean = {"logit_mean": -0.4} if name == "logit_normal" else {}
        ours = RectifiedFlow(shift, name, **{**options, **mean}).times(uniform).sort().values.float()
        if name == "mode":  # which they apply to 1 - t, and the paper to t
            ours = flipped(shift, ours)
        assert (ours - drawn).abs().mean() < 6, name
    assert RectifiedFlow(3.0).held_out_times(torch.tensor([0.25])).tolist() == [250]


def flipped(shift: float, times: Tensor) -> Tensor:
    """Shifted times of 1 - t for shifted times of t."""
    t = times / 1000 / (shift - (shift - 1) * times / 1000)
    return (1000 * shift * (1 - t) / (1 + (shift - 1) * (1 - t))).flip(0)


def test_times_in_closed_form() -> None:
    half = torch.tensor([0.5], dtype=torch.float64)
    assert RectifiedFlow(times="uniform").times(torch.tensor([0.1, 0.9])).tolist() == pytest.approx([100, 900])
    assert RectifiedFlow(shift=3.0, times="uniform").times(half).tolist() == pytest.approx([750])
    assert RectifiedFlow(logit_mean=1.0).times(half).tolist() == pytest.approx([1000 / (1 + math.exp(-1))])
    one_deviation = torch.tensor([0.5 + math.erf(2**-0.5) / 2], dtype=torch.float64)
    assert RectifiedFlow(logit_std=0.5).times(one_deviation).tolist() == pytest.approx([1000 / (1 + math.exp(-0.5))])
    assert RectifiedFlow(times="mode", mode_scale=0).times(torch.tensor([0.2])).tolist() == pytest.approx([800])
    every = RectifiedFlow(5.0).times(torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64))
    assert every.isfinite().all()
    assert resolution_shift(1024 * 1024, 512 * 512) == 2


@pytest.mark.parametrize("weighting", ["none", "sigma_sqrt", "cosmap"])
def test_weights_are_those_of_diffusers_training_scripts(weighting: str) -> None:
    flow = RectifiedFlow(weighting=weighting)
    clean, noise = pictures(4, 2, 4, 4)
    found = flow.loss(noise - clean + 0.5, clean, noise, 1000 * T, torch.tensor([1, 1, 1, 2]))
    expected = 0.25 * compute_loss_weighting_for_sd3(weighting, T) * torch.tensor([1, 1, 1, 2])
    torch.testing.assert_close(found, expected)
    at_the_ends = flow.loss(noise + 0.5, clean, noise, torch.tensor([0.0, 0.0, 1000.0, 1000.0]))
    assert at_the_ends.isfinite().all()


class OfGaussian:
    """The true velocity where pictures are N(mean, deviation^2) in every value."""

    guidance = ClassifierFreeGuidance(1.0)

    def __init__(self, mean: float | Tensor, deviation: float | Tensor) -> None:
        self.mean, self.deviation = mean, deviation

    def __call__(self, noisy: Tensor, timestep: Any, guided: bool = True) -> Tensor:
        t = timestep / 1000
        share = ((1 - t) * self.deviation**2 - t) / ((1 - t) ** 2 * self.deviation**2 + t**2)
        return -share * (noisy - (1 - t) * self.mean) - self.mean


@pytest.mark.parametrize("shift", [1.0, 2.0])
@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_follow_the_true_flow(name: str, shift: float) -> None:
    """N(0, 1) flows to N(mean, deviation^2) by z -> mean + deviation z."""
    start = torch.randn(1, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    sampler = Sampler(change_scheduler(RectifiedFlow(shift).scheduler(), name))
    assert sampler.process.scheduler_config() == RectifiedFlow(shift).scheduler_config()
    for progress in denoise(OfGaussian(0.7, 0.5), sampler, start, sampler.plan(200, torch.device("cpu"))):
        assert progress.clean.isfinite().all()
    assert (progress.latents - (0.7 + 0.5 * start)).abs().max() < (0.06 if name == "euler" else 0.02)


@pytest.mark.parametrize("name", ["ddim", "ddpm", "pndm", "tcd", "deis", "euler-ancestral"])
def test_schedulers_of_noise_levels_are_refused(name: str) -> None:
    with pytest.raises(
        ValueError, match="cannot sample from the flow process, for it steps between noise levels; euler"
    ):
        change_scheduler(RectifiedFlow().scheduler(), name)


@pytest.mark.parametrize("name", ["flow-euler", "FlowMatchHeunDiscreteScheduler", "flow-lcm"])
def test_schedulers_of_flows_are_refused_to_models_of_noise_levels(name: str) -> None:
    with pytest.raises(ValueError, match="samples from flows, and this model is of the gaussian process"):
        change_scheduler(diffusers.DDIMScheduler(), name)
    assert type(change_scheduler(RectifiedFlow().scheduler(), name)).__name__.startswith("FlowMatch")


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_new_noise_is_put_in_where_an_even_plan_has_it(shift: float) -> None:
    process, noise = RectifiedFlow(shift), torch.randn(2, 2, 64, 64, generator=torch.Generator().manual_seed(0))
    sampler = Sampler.of(process.renoising_scheduler(4, 1000))
    assert process_of(sampler.scheduler).scheduler_config() == process.scheduler_config()
    times = sampler.plan(4, torch.device("cpu"))
    assert float(times[0]) == 1000
    assert float(times[-1]) == pytest.approx(1000 * shift / (shift + 3))
    generators = [torch.Generator().manual_seed(one) for one in (1, 2)]
    steps = denoise(OfGaussian(0.7, 0.0), sampler, noise, times, **sampler.step_options(generators, 0.0))
    sigmas = [*(times / 1000).tolist()[1:], 0.0]
    for sigma, progress in zip(sigmas, steps, strict=True):  # every answer is the one picture
        assert (progress.clean - 0.7).abs().max() < 1e-4
        assert float(progress.latents.mean()) == pytest.approx(0.7 * (1 - sigma), abs=0.05)
        assert float(progress.latents.std()) == pytest.approx(sigma, abs=0.05)
    assert sampler.plan(1, torch.device("cpu")).tolist() == [1000]
    assert change_scheduler(sampler.scheduler, "lcm") is sampler.scheduler


def test_a_scheduler_names_its_flow() -> None:
    for scheduler in (
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0),
        diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0),
    ):
        found = process_of(scheduler)
        assert isinstance(found, RectifiedFlow)
        assert found.shift == 3.0
    assert type(process_of(diffusers.DPMSolverMultistepScheduler())) is GaussianDiffusion


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_flow_sigmas": True, "prediction_type": "epsilon"}, "use_flow_sigmas and prediction_type='epsilon'"),
        ({"prediction_type": "flow_prediction", "beta_schedule": "linear"}, "prediction_type 'flow_prediction'"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 0}, "shift=0 must be above 0"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": "3"}, "shift='3' must be a number"),
        ({"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": -1.0}, "flow_shift"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}, "use_dynamic_shifting=True"),
    ],
)
def test_schedulers_that_cannot_be(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        process_from_config(config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shift": 0}, "shift=0 must be above 0"),
        ({"shift": math.inf}, "shift=inf must be a number"),
        ({"logit_std": -1.0}, "logit_std=-1.0 must be above 0"),
        ({"times": "normal"}, "unknown times 'normal'; choose one of uniform, logit_normal, mode"),
        ({"weighting": "snr"}, "unknown weighting 'snr'"),
        ({"mode_scale": 2.0}, r"mode_scale=2.0 must lie in \[-1, 1.7519\]"),
    ],
)
def test_flows_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RectifiedFlow(**options)


@pytest.mark.parametrize("time", [-1.0, 1000.5])
def test_times_out_of_range(time: float) -> None:
    clean, noise = pictures(1, 2, 4, 4)
    with pytest.raises(ValueError, match=r"times must lie in \[0, 1000\]"):
        RectifiedFlow().mix(clean, noise, torch.tensor([time]))


def test_the_likelihood_is_that_of_a_gaussian() -> None:
    """The true velocity of independent normal values with mean and deviation of their own, in closed form."""
    mean, deviation = torch.linspace(-1, 1, 8).view(2, 2, 2), torch.linspace(0.2, 2, 8).view(2, 2, 2)
    model, signs = OfGaussian(mean, deviation), [torch.Generator().manual_seed(i) for i in range(5)]
    clean = mean + deviation * torch.randn(5, 2, 2, 2)
    found = log_likelihood(
        RectifiedFlow(shift=3.0),
        lambda x, times: model(x, times.view(-1, 1, 1, 1)),
        clean,
        random_signs(clean, signs),
        steps=40,
    )
    expected = torch.distributions.Normal(mean, deviation).log_prob(clean).flatten(1).sum(1)
    torch.testing.assert_close(found.float(), expected, atol=2e-4, rtol=1e-4)


def test_hutchinsons_estimate_has_no_bias() -> None:
    """Of a Gaussian whose values depend on each other, single probes are wrong and their mean is not."""
    spread = torch.tensor([[1.0, 0.6], [0.6, 0.8]])
    identity = torch.eye(2)

    def velocity(x: Tensor, times: Tensor) -> Tensor:
        t = times[0] / 1000
        covariance = (1 - t) ** 2 * spread + t**2 * identity
        return x @ torch.linalg.solve(covariance, t * identity - (1 - t) * spread)

    clean = torch.tensor([[0.5, -1.0]]).repeat(4, 1)
    every_sign = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    found = log_likelihood(RectifiedFlow(), velocity, clean, every_sign, steps=40)
    expected = torch.distributions.MultivariateNormal(torch.zeros(2), spread).log_prob(clean[0])
    assert found.std() > 0.05
    torch.testing.assert_close(found.mean().float(), expected, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="steps=0 must be 1 or more"):
        log_likelihood(RectifiedFlow(), velocity, clean, every_sign, steps=0)
