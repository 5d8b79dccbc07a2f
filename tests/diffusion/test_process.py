"""The process against diffusers' schedulers (same tables, other code) and closed forms."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from latentdiff.diffusion import (
    GaussianDiffusion,
    build_scheduler,
    make_betas,
    process_from_config,
    rescale_zero_terminal_snr,
)
from latentdiff.diffusion.betas import SCHEDULES

PEER_BETAS = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012), "squaredcos_cap_v2": (1e-4, 0.02)}


def peer(schedule: str, zero_terminal_snr: bool = False, **settings: object) -> DDIMScheduler:
    start, end = PEER_BETAS[schedule]
    return DDIMScheduler(
        beta_schedule=schedule, beta_start=start, beta_end=end, rescale_betas_zero_snr=zero_terminal_snr, **settings
    )


@pytest.mark.parametrize("schedule", sorted(PEER_BETAS))
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_tables_agree_with_diffusers(schedule: str, zero_terminal_snr: bool) -> None:
    process = GaussianDiffusion(schedule, prediction_type="v_prediction", zero_terminal_snr=zero_terminal_snr)
    theirs = peer(schedule, zero_terminal_snr)
    torch.testing.assert_close(process.betas.float(), theirs.betas, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(process.alphas_cumprod.float(), theirs.alphas_cumprod, atol=2e-6, rtol=1e-4)


def test_what_the_papers_say_of_their_schedules() -> None:
    linear, cosine = GaussianDiffusion("linear"), GaussianDiffusion("cosine")
    assert (float(linear.betas[0]), float(linear.betas[-1])) == pytest.approx((1e-4, 0.02))  # DDPM, Sec. 4
    assert 0.9 / 127.5 > float(cosine.betas[0].sqrt()) > 0.4 / 127.5  # Improved DDPM, Sec. 3.2: less than a pixel's bin
    assert float(cosine.betas.max()) == pytest.approx(0.999)  # the same: no larger, against singularities
    ratio = (
        linear.posterior_variance / linear.betas
    )  # Fig. 1: the two fixed variances are almost equal but at the start
    assert float(ratio[0]) == 0
    assert float(ratio[100:].min()) > 0.98


def test_cosine_alpha_bar_is_the_papers() -> None:
    """Improved DDPM, Eq. 17: alpha-bar is cos^2, where the clip of beta has not set in."""
    alpha_bar = GaussianDiffusion("cosine").alphas_cumprod
    t = torch.arange(1, 991, dtype=torch.float64) / 1000
    angle = torch.pi / 2 / 1.008
    expected = torch.cos((t + 0.008) * angle) ** 2 / torch.cos(torch.tensor(0.008 * angle, dtype=torch.float64)) ** 2
    torch.testing.assert_close(alpha_bar[:990], expected, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_zero_terminal_snr_ends_in_pure_noise_and_keeps_the_start(schedule: str) -> None:
    betas = make_betas(schedule)
    rescaled = (1 - rescale_zero_terminal_snr(betas)).cumprod(0)
    assert rescaled[-1] == 0
    torch.testing.assert_close(rescaled[0], 1 - betas[0])
    assert (rescaled[1:] < rescaled[:-1]).all()


def test_q_sample_and_velocity_agree_with_diffusers() -> None:
    process = GaussianDiffusion("scaled_linear", prediction_type="v_prediction")
    theirs = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    x, noise = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8)
    timesteps = torch.tensor([0, 250, 700, 999])
    torch.testing.assert_close(
        process.q_sample(x, timesteps, noise), theirs.add_noise(x, noise, timesteps), atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(
        process.target(x, noise, timesteps), theirs.get_velocity(x, noise, timesteps), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_predict_start_inverts_the_target(prediction_type: str) -> None:
    process = GaussianDiffusion("cosine", prediction_type=prediction_type)
    x, noise = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8)
    timesteps = torch.tensor([0, 100, 500, 900])
    x_t = process.q_sample(x, timesteps, noise)
    target = process.target(x, noise, timesteps)
    torch.testing.assert_close(process.predict_start(target, timesteps, x_t), x, atol=1e-4, rtol=1e-4)


def test_min_snr_weights_the_same_x0_error_alike_whatever_is_predicted() -> None:
    """The weighted loss of a given error of x_0 must not depend on which quantity the network predicts."""
    timesteps = torch.arange(10, 990, 49)
    x0_error = 0.1
    losses = []
    for prediction_type in ("sample", "epsilon", "v_prediction"):
        process = GaussianDiffusion("linear", prediction_type=prediction_type)
        signal, sigma = process.alphas_cumprod[timesteps].sqrt(), (1 - process.alphas_cumprod[timesteps]).sqrt()
        x_t = torch.zeros(len(timesteps), dtype=torch.float64)
        wrong = {  # the prediction whose x_0 is off by x0_error, from a true x_0 = x_t = 0
            "sample": torch.full_like(signal, x0_error),
            "epsilon": (x_t - signal * x0_error) / sigma,
            "v_prediction": (signal * x_t - x0_error) / sigma,
        }[prediction_type]
        losses.append(wrong**2 * process.min_snr_weight(timesteps, 5.0).double())
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(losses[2], losses[0], rtol=1e-5, atol=0)


def test_min_snr_is_finite_at_zero_terminal_snr() -> None:
    process = GaussianDiffusion("scaled_linear", prediction_type="v_prediction", zero_terminal_snr=True)
    weights = process.min_snr_weight(torch.arange(1000), 5.0)
    assert weights.isfinite().all()
    assert weights[-1] == 0


@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"]
)
def test_scheduler_has_the_betas_of_the_process(name: str) -> None:
    process = GaussianDiffusion("scaled_linear", prediction_type="v_prediction")
    scheduler = build_scheduler(process, name)
    torch.testing.assert_close(scheduler.betas, process.betas.float(), atol=1e-7, rtol=1e-5)
    assert scheduler.config.prediction_type == "v_prediction"


def test_a_perfect_network_is_sampled_back_to_the_data() -> None:
    """DDIM with the true velocity must end at x_0: training and sampling agree on every convention."""
    process = GaussianDiffusion("scaled_linear", prediction_type="v_prediction", zero_terminal_snr=True)
    scheduler = build_scheduler(process)
    scheduler.set_timesteps(10)
    x_start, x = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    assert scheduler.timesteps[0] == 999
    for t in scheduler.timesteps:
        signal, sigma = process.alphas_cumprod[t].sqrt().float(), (1 - process.alphas_cumprod[t]).sqrt().float()
        noise = (x - signal * x_start) / sigma
        velocity = process.target(x_start, noise, t.repeat(2))
        x = scheduler.step(velocity, t, x).prev_sample
    torch.testing.assert_close(x, x_start, atol=1e-3, rtol=1e-3)


def test_errors_name_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="unknown noise schedule 'quadratic'"):
        GaussianDiffusion("quadratic")
    with pytest.raises(ValueError, match="unknown prediction_type 'velocity'"):
        GaussianDiffusion(prediction_type="velocity")
    with pytest.raises(ValueError, match="zero terminal SNR"):
        GaussianDiffusion(prediction_type="epsilon", zero_terminal_snr=True)
    for number in (10**9, -1, 1000.5, "1000", True):
        with pytest.raises(ValueError, match=rf"num_timesteps must be .* at most 100,000, not {number!r}"):
            process_from_config({"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": number})
    with pytest.raises(ValueError, match="at least 2"):
        GaussianDiffusion(num_timesteps=1)
    with pytest.raises(ValueError, match=r"timesteps must lie in \[0, 999\]"):
        GaussianDiffusion().q_sample(torch.zeros(1, 1), torch.tensor([1000]), torch.zeros(1, 1))
    with pytest.raises(ValueError, match="no scheduler named 'FooScheduler'"):
        build_scheduler(GaussianDiffusion(), "FooScheduler")
