"""The contract of a process: what everybody else asks, for Gaussian diffusion and for one made in this file."""

import math
from collections.abc import Iterator
from typing import Any

import diffusers
import pytest
import torch
from straight import Straight
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from latentdiff.diffusion import (
    GaussianDiffusion,
    Process,
    RectifiedFlow,
    known_processes,
    process_from_config,
    process_of,
    register_process,
)
from latentdiff.diffusion.process import PROCESSES, TARGETS

TIMES = torch.tensor([3, 400, 999])
FLOWS = {"straight": Straight, "flow": RectifiedFlow}


@pytest.fixture
def straight() -> Iterator[Straight]:
    register_process(Straight)
    yield Straight()
    PROCESSES.remove(Straight)


def pictures(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, *shape, generator=generator)
    return clean, noise


def test_a_scheduler_names_its_process(straight: Straight) -> None:
    assert type(process_of(straight.scheduler())) is Straight
    assert type(process_of(diffusers.DDIMScheduler())) is GaussianDiffusion
    assert type(process_from_config(diffusers.DDIMScheduler().config)) is GaussianDiffusion
    assert set(known_processes()) == {"straight", "flow", "gaussian"}
    with pytest.raises(ValueError, match="neither beta_schedule nor trained_betas"):
        process_from_config({"_class_name": "EDMEulerScheduler"})


@pytest.mark.parametrize("kind", [*TARGETS, *FLOWS])
def test_a_correct_prediction_is_the_picture_and_costs_nothing(kind: str) -> None:
    process: Process = FLOWS[kind]() if kind in FLOWS else GaussianDiffusion("cosine", prediction_type=kind)
    clean, noise = pictures(3, 2, 4, 4)
    times = process.times(torch.tensor([0.003, 0.4, 0.9]))
    noisy, target = process.mix(clean, noise, times), process.target(clean, noise, times)
    for i, time in enumerate(process.model_time(times)):
        one = slice(i, i + 1)
        torch.testing.assert_close(process.clean(noisy[one], target[one], time), clean[one], atol=1e-4, rtol=1e-4)
        signal, sigma = process.level(time)
        assert process.noise_level(time) == pytest.approx(sigma / signal)
    for cost in (process.error, process.loss):
        assert cost(target, clean, noise, times).tolist() == pytest.approx([0, 0, 0], abs=1e-10)
        assert cost(target + 0.5, clean, noise, times).tolist() == pytest.approx([0.25] * 3, rel=1e-5)
    assert process.loss(target + 0.5, clean, noise, times, torch.tensor([0, 1, 2])).tolist() == pytest.approx(
        [0, 0.25, 0.5], rel=1e-5
    )


@pytest.mark.parametrize("kind", [*TARGETS, *FLOWS])
def test_a_gradient_moves_the_noise_alike_whatever_is_predicted(kind: str) -> None:
    process: Process = FLOWS[kind]() if kind in FLOWS else GaussianDiffusion("cosine", prediction_type=kind)
    noisy, prediction = pictures(1, 2, 4, 4)
    gradient = torch.full_like(noisy, 0.3)
    time = torch.tensor(400)
    signal, sigma = process.level(time)
    moved = process.with_gradient(prediction, noisy, time, gradient)
    before, after = (process.predicts.noise(noisy, one, signal, sigma) for one in (prediction, moved))
    torch.testing.assert_close(after - before, -sigma * gradient, atol=1e-5, rtol=1e-4)


def test_weights_of_the_picture_are_those_of_every_target() -> None:
    """min(SNR, gamma) is of the error of x_0; the same error through a prediction must cost the same."""
    times = torch.tensor([0.1, 0.5, 0.9])
    snr = Straight().snr(times)
    assert snr.tolist() == pytest.approx([81, 1, 1 / 81])
    weights = Straight().min_snr_weight(times)
    assert weights.tolist() == pytest.approx([5 / 100, 1 / 4, (1 / 81) / (1 + 1 / 9) ** 2])


def test_times_are_spread_over_all_of_them() -> None:
    process = GaussianDiffusion("linear", 10)
    assert process.times(torch.tensor([0.0, 0.0999, 0.1, 0.95, 1 - 1e-9])).tolist() == [0, 0, 1, 9, 9]


def test_pure_noise_says_nothing_of_the_picture() -> None:
    process = GaussianDiffusion("linear", prediction_type="v_prediction", zero_terminal_snr=True)
    noisy, prediction = pictures(1, 2, 4, 4)
    assert math.isinf(process.noise_level(999))
    assert process.clean(noisy, prediction, 999).isfinite().all()
    assert torch.equal(process.with_gradient(prediction, noisy, 999, torch.ones_like(noisy)), prediction)


class Copies(TorchDispatchMode):
    """Counts the tensors that are copied into another dtype or onto another device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "_to_copy" in str(func)
        return func(*args, **(kwargs or {}))


def test_a_process_of_fewer_steps_knows_the_networks_timesteps() -> None:
    whole = GaussianDiffusion("cosine", 1000)
    few = whole.respaced(10)
    for timestep in few.model_time(torch.arange(10)).tolist():
        assert few.level(timestep) == pytest.approx(whole.level(timestep))


def test_tables_are_copied_once() -> None:
    process = GaussianDiffusion("cosine", prediction_type="v_prediction", variance_type="learned_range")
    clean, noise = pictures(3, 2, 4, 4)
    prediction = torch.cat([clean, noise], dim=1)

    def work() -> None:
        process.loss(prediction, clean, noise, TIMES, process.min_snr_weight(TIMES))

    work()
    with Copies() as copies:
        work()
    assert copies.count == 1  # the weights (B,), which are computed in float64


def test_tables_made_in_inference_mode_serve_training() -> None:
    process = GaussianDiffusion("cosine")
    clean, noise = pictures(3, 2, 4, 4)
    with torch.inference_mode():
        process.mix(clean, noise, TIMES)
    clean.requires_grad_()
    process.mix(clean, noise, TIMES).sum().backward()
    assert clean.grad is not None


def test_a_scheduler_gives_its_own_tables() -> None:
    scheduler = diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2")
    process = process_of(scheduler)
    assert isinstance(process, GaussianDiffusion)
    assert torch.equal(process.alphas_cumprod.float(), scheduler.alphas_cumprod)


@pytest.mark.parametrize("what", ["first_order_scheduler", "renoising_scheduler"])
def test_a_process_that_says_nothing_of_it_is_not_distilled(what: str) -> None:
    with pytest.raises(ValueError, match=f"the straight process has no {what}"):
        getattr(Straight(), what)(*([4, 1000] if what.startswith("re") else []))
