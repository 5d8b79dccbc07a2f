"""Fewer steps and whole bounds against the released code, and timesteps drawn by their losses.

``released_respacing.json`` holds what openai/improved-diffusion gives in float32 for a 2x2 network of sines and a
hyperbolic tangent (`network` below): ``space_timesteps`` of several arguments, and of ``SpacedDiffusion`` its betas and
``calc_bpd_loop`` with clipping, where the noise of its n-th call is `wave(2.3 + n / 100)` times 1.4.
"""

import json
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.utils import torch_utils
from released import check, wave
from torch import Tensor

from latentdiff.diffusion import GaussianDiffusion, bits_per_dimension
from latentdiff.diffusion.losses import bound_term, discretized_gaussian_log_likelihood, training_losses
from latentdiff.diffusion.timesteps import LossSecondMoment, space_timesteps

REFERENCE: dict[str, Any] = json.loads(Path(__file__).with_name("released_respacing.json").read_text())
PROCESSES = [key.split() for key in REFERENCE if len(key.split()) == 4]


@pytest.mark.parametrize("key", [key for key in REFERENCE if len(key.split()) == 2])
def test_kept_timesteps(key: str) -> None:
    number, sections = key.split()
    assert space_timesteps(int(number), sections) == REFERENCE[key]
    if not sections.startswith("ddim"):
        assert space_timesteps(int(number), [int(part) for part in sections.split(",")]) == REFERENCE[key]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ("ddim60", "no stride"),
        ("ddim", "is not a number"),
        ("fast", "'fast' is not a number"),
        ("10,x", "is not a number"),
        (0, "0 timesteps cannot be kept"),
        (101, "of a section of 100"),
        ([40, 61], "61 timesteps cannot be kept of a section of 50"),
        ([], "0 sections"),
    ],
)
def test_timesteps_that_are_not_there(sections: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GaussianDiffusion("linear", 100).respaced(sections)


def network(learns_variance: bool) -> Any:
    def predict(x: Tensor, timesteps: Tensor) -> Tensor:
        mean = 0.4 * x + 0.3 * torch.sin(timesteps.float() / 150)[:, None, None, None]
        return torch.cat([mean, torch.tanh(x)], dim=1) if learns_variance else mean

    return predict


@pytest.mark.parametrize(("schedule", "prediction", "variance", "sections"), PROCESSES)
def test_bound_of_fewer_steps(
    schedule: str, prediction: str, variance: str, sections: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = REFERENCE[f"{schedule} {prediction} {variance} {sections}"]
    whole = GaussianDiffusion(schedule, prediction_type=prediction, variance_type=variance)
    process = whole.respaced(sections)
    assert process.model_time(torch.arange(process.num_timesteps)).tolist() == reference["kept"]
    check(process.betas, reference["betas"], rtol=1e-8, atol=1e-12)
    calls = count()  # theirs begin with the last timestep
    monkeypatch.setattr(
        torch_utils, "randn_tensor", lambda *_args, **_: 1.4 * wave(2.3 + (process.num_timesteps - next(calls)) / 100)
    )
    x_start = torch.round((wave(1.7) + 1) * 127.5) / 127.5 - 1
    x_start[0, 0, 0, 0], x_start[0, 0, 0, 1] = -1, 1
    found = bits_per_dimension(
        process,
        network(process.learns_variance),
        x_start,
        log_likelihood=discretized_gaussian_log_likelihood,
        clip_denoised=True,
    )
    for name, values in found._asdict().items():
        # Their divergences lose digits to cancellation, which ours keep.
        check(values, reference[name], rtol=1e-4 if name == "terms" else 2e-5, atol=1e-6)


def test_fewer_steps_of_fewer_steps() -> None:
    process = GaussianDiffusion("cosine", 1000, "v_prediction", zero_terminal_snr=True)
    once, twice = process.respaced(100), process.respaced(100).respaced(10)
    kept = twice.model_time(torch.arange(10))
    assert kept.tolist() == [once.model_time(torch.tensor(t)).item() for t in space_timesteps(100, 10)]
    torch.testing.assert_close(twice.alphas_cumprod, process.alphas_cumprod[kept], rtol=1e-12, atol=1e-15)
    assert twice.alphas_cumprod[-1] == 0


def test_relatives_of_the_prediction_agree() -> None:
    x_start, noise, timesteps = wave(1.1), wave(2.2), torch.tensor([0, 1, 2, 500, 998, 999])
    for kind in ("epsilon", "v_prediction", "sample"):
        process = GaussianDiffusion("linear", prediction_type=kind)
        x_t = process.q_sample(x_start.double(), timesteps, noise.double())
        target = process.target(x_start.double(), noise.double(), timesteps)
        torch.testing.assert_close(process.predict_start(target, timesteps, x_t), x_start.double())
        torch.testing.assert_close(process.predict_noise(target, timesteps, x_t), noise.double())


def test_p2_weighs_the_same_error_of_x0_alike_whatever_is_predicted() -> None:
    """The weight of an error of x_0, of which the errors of epsilon and v are fixed multiples."""
    timesteps = torch.tensor([1, 300, 700, 999])
    found = []
    for kind in ("epsilon", "v_prediction", "sample"):
        process = GaussianDiffusion("linear", prediction_type=kind)
        snr = process.snr(timesteps)
        factor = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[kind]
        found.append(process.p2_weight(timesteps, gamma=0.5, k=1.0) * factor)
        if kind == "epsilon":
            torch.testing.assert_close(process.p2_weight(timesteps, 0.5), (1 / (1 + snr) ** 0.5).float())
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=0)


def test_losses_by_name() -> None:
    x_start, noise, timesteps = wave(1.1), wave(2.2), torch.tensor([0, 1, 2, 500, 998, 999])
    prediction, weight = wave(3.3), torch.arange(1.0, 7.0)
    error = prediction - noise
    cases = {"simple": error.square(), "l1": error.abs()}
    for name, wanted in cases.items():
        process = GaussianDiffusion("linear", loss_type=name)
        found = training_losses(process, prediction, x_start, timesteps, noise, weight)
        torch.testing.assert_close(found, weight * wanted.flatten(1).mean(1))
    process = GaussianDiffusion("linear", loss_type="bound")
    found = training_losses(process, prediction, x_start, timesteps, noise, weight)
    x_t = process.q_sample(x_start, timesteps, noise)
    torch.testing.assert_close(found, 1000 * bound_term(process, prediction, x_start, timesteps, x_t))
    assert GaussianDiffusion("linear").loss_type == "simple"
    assert GaussianDiffusion("linear", variance_type="learned_range").loss_type == "hybrid"
    with pytest.raises(ValueError, match="'hybrid' teaches variances, and variance_type='fixed_small' has none"):
        GaussianDiffusion("linear", loss_type="hybrid")
    with pytest.raises(ValueError, match="unknown loss_type 'l3'; choose one of simple, l1, hybrid, bound"):
        GaussianDiffusion("linear", loss_type="l3")


def test_timesteps_with_large_losses_are_drawn_more_often() -> None:
    """The estimate keeps its expectation and loses variance."""
    sampler = LossSecondMoment(8, history=3, uniform=0.01)
    losses = torch.tensor([9.0, 3, 1, 1, 1, 0.5, 0.5, 0.1])
    grid = (torch.arange(8000) + 0.5) / 8000
    for _ in range(2):
        sampler.update(torch.arange(8), losses)
        assert torch.equal(sampler.draw(grid)[1], torch.ones(8000))  # not yet
    sampler.update(torch.arange(8), losses)
    timesteps, weights = sampler.draw(grid)
    expected = 0.99 * losses / losses.sum() + 0.01 / 8
    torch.testing.assert_close(torch.bincount(timesteps, minlength=8) / 8000, expected, atol=2e-4, rtol=0)
    torch.testing.assert_close(weights, 1 / (8 * expected[timesteps]))
    weighted = weights * losses[timesteps]
    assert weighted.mean().item() == pytest.approx(losses.mean().item(), rel=1e-3)
    assert weighted.std() < 0.2 * losses.std()
    assert sampler.draw(torch.tensor([0.0, 1 - 1e-9]))[0].tolist() == [0, 7]


def test_history_is_of_the_last_losses() -> None:
    sampler = LossSecondMoment(2, history=3)
    sampler.update(torch.tensor([0, 1, 0, 0, 0, 1]), torch.tensor([1.0, 7, 2, torch.nan, 3, 8]))
    sampler.update(torch.tensor([0]), torch.tensor([4.0]))
    assert sampler.history[0].tolist() == [2, 3, 4]
    assert sampler.counts.tolist() == [3, 2]
    again = LossSecondMoment(2, history=3)
    again.load_state_dict(sampler.state_dict())
    assert torch.equal(again.history, sampler.history)
    with pytest.raises(ValueError, match="history=0"):
        LossSecondMoment(2, history=0)
