"""Posterior, reverse step and bound against direct computation, and against diffusers' DDPM step by step."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from latentdiff.diffusion import GaussianDiffusion, build_scheduler
from latentdiff.diffusion.losses import (
    bound_term,
    discretized_gaussian_log_likelihood,
    gaussian_log_likelihood,
    hybrid_bound,
    normal_kl,
    prior_term,
)

VARIANCES = ("fixed_small", "fixed_large", "learned_range")
PREDICTIONS = ("epsilon", "v_prediction", "sample")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_posterior_is_bayes_rule() -> None:
    """q(x_{t-1} | x_t, x_0) from q(x_t | x_{t-1}) and q(x_{t-1} | x_0): precisions add."""
    process = GaussianDiffusion("scaled_linear")
    x_start, x_t = draw(3, 2), draw(3, 2, seed=1)
    timesteps = torch.tensor([1, 400, 999])
    beta, before = process.betas[timesteps, None], process.alphas_cumprod[timesteps - 1, None]
    precision = (1 - beta) / beta + 1 / (1 - before)
    expected = ((1 - beta).sqrt() / beta * x_t + before.sqrt() / (1 - before) * x_start) / precision
    mean, variance, log_variance = process.q_posterior_mean_variance(x_start, x_t, timesteps)
    torch.testing.assert_close(mean, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(variance, 1 / precision, rtol=1e-9, atol=0)
    torch.testing.assert_close(log_variance, variance.log())


def test_q_mean_variance_is_what_q_sample_draws() -> None:
    process = GaussianDiffusion("cosine")
    x_start, timesteps = draw(1, 3).expand(4000, 3), torch.full((4000,), 300)
    samples = process.q_sample(x_start, timesteps, draw(4000, 3, seed=1))
    mean, variance, log_variance = process.q_mean_variance(x_start, timesteps)
    torch.testing.assert_close(samples.mean(0), mean[0], atol=0.06, rtol=0)
    torch.testing.assert_close(samples.var(0), variance[0].expand(3), rtol=0.1, atol=0)
    torch.testing.assert_close(log_variance, variance.log())


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("variance_type", VARIANCES)
def test_bound_term_is_the_divergence(prediction_type: str, variance_type: str) -> None:
    process = GaussianDiffusion("linear", prediction_type=prediction_type, variance_type=variance_type)
    timesteps = torch.tensor([1, 2, 500, 999])
    x_start, noise = draw(4, 2, 3, 3), draw(4, 2, 3, 3, seed=1)
    x_t = process.q_sample(x_start, timesteps, noise)
    prediction = process.target(x_start, noise, timesteps) + 0.1 * draw(4, 2, 3, 3, seed=2)
    if process.learns_variance:
        prediction = torch.cat([prediction, 0.5 * draw(4, 2, 3, 3, seed=3)], dim=1)
    step = process.p_mean_variance(prediction, x_t, timesteps)
    mean, variance, _ = process.q_posterior_mean_variance(x_start, x_t, timesteps)
    divergence = kl_divergence(Normal(mean, variance.sqrt()), Normal(step.mean, step.variance.sqrt()))
    found = bound_term(process, prediction, x_start, timesteps, x_t)
    torch.testing.assert_close(found, divergence.mean((1, 2, 3)) / math.log(2), rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_the_reverse_step_does_not_depend_on_what_is_predicted(prediction_type: str) -> None:
    timesteps = torch.tensor([0, 10, 500, 999])
    x_start, noise = draw(4, 2, 3, 3), draw(4, 2, 3, 3, seed=1)
    means = []
    for kind in ("sample", prediction_type):
        process = GaussianDiffusion("linear", prediction_type=kind)
        x_t = process.q_sample(x_start, timesteps, noise)
        target = process.target(x_start, noise, timesteps)
        means.append(process.p_mean_variance(target, x_t, timesteps).mean)
    torch.testing.assert_close(means[1], means[0], rtol=1e-7, atol=1e-7)


def test_learned_variance_lies_between_the_fixed_ones() -> None:
    """-1 is beta-tilde, 1 is beta, and 0 their geometric mean (Improved DDPM, Eq. 15)."""
    timesteps, x_t = torch.tensor([1, 500, 999]), draw(3, 1, 2, 2)

    def variance(kind: str, channel: float | None = None) -> Tensor:
        prediction = torch.zeros_like(x_t)
        if channel is not None:
            prediction = torch.cat([prediction, torch.full_like(x_t, channel)], dim=1)
        process = GaussianDiffusion(variance_type=kind)
        return process.p_mean_variance(prediction, x_t, timesteps).variance.expand_as(x_t)

    small, large = variance("fixed_small"), variance("fixed_large")
    torch.testing.assert_close(variance("learned_range", -1), small)
    torch.testing.assert_close(variance("learned_range", 1), large)
    torch.testing.assert_close(variance("learned_range", 0), (small * large).sqrt())


@pytest.mark.parametrize("variance_type", VARIANCES)
@pytest.mark.parametrize(
    ("prediction_type", "zero_terminal_snr"),
    [(kind, zero) for kind in PREDICTIONS for zero in (False, True) if not (zero and kind == "epsilon")],
)
def test_the_reverse_step_is_that_of_diffusers_ddpm(
    variance_type: str, prediction_type: str, zero_terminal_snr: bool
) -> None:
    process = GaussianDiffusion(
        "scaled_linear",
        prediction_type=prediction_type,
        zero_terminal_snr=zero_terminal_snr,
        variance_type=variance_type,
    )
    scheduler = build_scheduler(process, "DDPMScheduler")
    assert scheduler.config.variance_type == variance_type
    x_t = draw(2, 3, 4, 4).float()
    prediction = draw(2, 6 if process.learns_variance else 3, 4, 4, seed=1).float()
    for t in (999, 998, 700, 30, 1, 0):
        timesteps = torch.full((2,), t)
        generator = torch.Generator().manual_seed(t)
        theirs = scheduler.step(prediction, t, x_t, generator=generator)
        step = process.p_mean_variance(prediction, x_t, timesteps)
        noise = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(t)) if t else torch.zeros_like(x_t)
        ours = step.mean + (0.5 * step.log_variance).exp() * noise
        torch.testing.assert_close(step.x_start, theirs.pred_original_sample, rtol=2e-4, atol=2e-4)
        torch.testing.assert_close(ours, theirs.prev_sample, rtol=2e-4, atol=2e-4)


def test_hybrid_teaches_the_variance_only() -> None:
    process = GaussianDiffusion("cosine", num_timesteps=500, variance_type="learned_range")
    x_start, noise, timesteps = draw(3, 2, 4, 4), draw(3, 2, 4, 4, seed=1), torch.tensor([0, 5, 499])
    prediction = draw(3, 4, 4, 4, seed=2).requires_grad_()
    loss = hybrid_bound(process, prediction, x_start, timesteps, noise)
    x_t = process.q_sample(x_start, timesteps, noise)
    torch.testing.assert_close(loss, bound_term(process, prediction, x_start, timesteps, x_t) * 0.5)  # T / 1000
    (gradient,) = torch.autograd.grad(loss.sum(), prediction)
    assert (gradient[:, :2] == 0).all()
    assert (gradient[:, 2:] != 0).all()


def test_the_best_learned_variance_is_that_of_the_errors() -> None:
    """Of a fixed mean, the bound is lowest where the variance is the posterior's and the squared error's together."""
    process = GaussianDiffusion("linear", variance_type="learned_range")
    x_start, noise, timesteps = draw(1, 1, 20, 20), draw(1, 1, 20, 20, seed=1), torch.tensor([3])
    x_t = process.q_sample(x_start, timesteps, noise)
    mean = noise + 0.5 * draw(1, 1, 20, 20, seed=2)
    channel = torch.zeros(1, 1, 1, 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([channel], line_search_fn="strong_wolfe", tolerance_grad=1e-12)

    def closure() -> Tensor:
        optimizer.zero_grad()
        prediction = torch.cat([mean, channel.expand_as(mean)], dim=1)
        loss = bound_term(process, prediction, x_start, timesteps, x_t).sum()
        loss.backward()
        return loss

    for _ in range(20):
        optimizer.step(closure)
    step = process.p_mean_variance(torch.cat([mean, channel.detach().expand_as(mean)], dim=1), x_t, timesteps)
    true_mean, true_variance, _ = process.q_posterior_mean_variance(x_start, x_t, timesteps)
    best = true_variance + (step.mean - true_mean).square().mean()
    torch.testing.assert_close(step.variance.mean(), best.mean(), rtol=1e-5, atol=0)


def test_the_prior_of_pictures_costs_as_little_as_ddpm_says() -> None:
    """Sec. 4: about 1e-5 bits per dimension, with a thousand steps of the linear schedule and pixels in [-1, 1]."""
    pixels = torch.rand(64, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert 5e-6 < float(prior_term(GaussianDiffusion("linear", 1000), pixels).mean()) < 2e-5


def test_prior_term_of_ddpm() -> None:
    """For unit-variance data L_T is -log(1 - alpha-bar_T) / 2 nats; the linear schedule leaves 4.0e-5 of alpha-bar."""
    process = GaussianDiffusion("linear")
    assert process.alphas_cumprod[-1] == pytest.approx(4.0358e-5, rel=1e-4)
    expected = -0.5 * math.log(1 - float(process.alphas_cumprod[-1])) / math.log(2)
    signs = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    assert float(prior_term(process, signs)) == pytest.approx(expected, rel=1e-9)


def test_normal_kl_keeps_its_digits_where_two_normals_are_nearly_one() -> None:
    log_variance = torch.tensor([1e-4], dtype=torch.float32)
    zero = torch.zeros(1)
    exact = 0.5 * (math.expm1(1e-4) - 1e-4)
    assert float(normal_kl(zero, log_variance, zero, zero)) == pytest.approx(exact, rel=1e-2)


def test_gaussian_log_likelihood_is_the_density() -> None:
    x, mean, log_variance = draw(50), draw(50, seed=1), draw(50, seed=2)
    expected = Normal(mean, (0.5 * log_variance).exp()).log_prob(x)
    torch.testing.assert_close(gaussian_log_likelihood(x, mean, log_variance), expected)


@pytest.mark.parametrize("spread", [0.004, 0.05, 0.8])
def test_discretized_likelihoods_are_probabilities(spread: float) -> None:
    """Over all 256 values they sum to one, and each is that of its interval."""
    values = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    log_variance = torch.full_like(values, 2 * math.log(spread))
    for mean in (-1.1, -0.2, 0.9):
        probability = discretized_gaussian_log_likelihood(values, torch.full_like(values, mean), log_variance).exp()
        assert float(probability.sum()) == pytest.approx(1, abs=1e-6)
        normal = Normal(mean, spread)
        edges = values[:-1] + 1 / 255
        below = torch.cat([torch.zeros(1), normal.cdf(edges), torch.ones(1)])
        torch.testing.assert_close(probability, below.diff(), atol=5e-4, rtol=0)


def test_predictions_of_the_wrong_width_are_refused() -> None:
    process, x_t = GaussianDiffusion(variance_type="learned_range"), torch.zeros(1, 3, 2, 2)
    with pytest.raises(ValueError, match=r"'learned_range' a prediction for 3 channels has 6, not 3"):
        process.p_mean_variance(x_t, x_t, torch.tensor([5]))
    with pytest.raises(ValueError, match="gives 2C channels, not 3"):
        process.split_variance(x_t)
    with pytest.raises(ValueError, match=r"'fixed_small' a prediction for 3 channels has 3, not 6"):
        GaussianDiffusion().p_mean_variance(torch.zeros(1, 6, 2, 2), x_t, torch.tensor([5]))
    with pytest.raises(ValueError, match="unknown variance_type 'learned'; choose one of fixed_small"):
        GaussianDiffusion(variance_type="learned")
