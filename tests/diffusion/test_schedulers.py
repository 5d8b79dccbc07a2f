"""A process from a scheduler's config, and a scheduler from a process."""

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from latentdiff.diffusion import GaussianDiffusion, build_scheduler
from latentdiff.diffusion.schedulers import takes_variance

SCHEDULERS: list[tuple[str, dict[str, Any]]] = [
    ("DDPMScheduler", {}),
    ("DDPMScheduler", {"beta_schedule": "sigmoid", "variance_type": "fixed_large"}),
    ("DDPMScheduler", {"beta_schedule": "squaredcos_cap_v2", "variance_type": "learned_range"}),
    ("DDPMScheduler", {"variance_type": "fixed_small_log", "num_train_timesteps": 400}),
    ("PNDMScheduler", {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}),
    ("DDIMScheduler", {"beta_start": 0.0015, "beta_end": 0.0195, "beta_schedule": "scaled_linear"}),
    ("DDIMScheduler", {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}),
    ("DDIMScheduler", {"trained_betas": [0.01, 0.02, 0.04, 0.2], "num_train_timesteps": 4}),
    ("DDIMScheduler", {"trained_betas": [0.1, 0.2, 0.4], "num_train_timesteps": 3, "prediction_type": "sample"}),
    ("EulerDiscreteScheduler", {"beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}),
    ("DPMSolverMultistepScheduler", {"beta_schedule": "squaredcos_cap_v2"}),
    ("UniPCMultistepScheduler", {}),
    ("LCMScheduler", {}),
]


@pytest.mark.parametrize(("name", "settings"), SCHEDULERS)
def test_a_process_has_the_tables_of_the_scheduler_it_is_made_from(name: str, settings: dict[str, Any]) -> None:
    scheduler = getattr(diffusers, name)(**settings)
    process = GaussianDiffusion.from_scheduler_config(scheduler.config)
    assert process.num_timesteps == scheduler.config.num_train_timesteps
    assert process.prediction_type == scheduler.config.prediction_type
    torch.testing.assert_close(process.alphas_cumprod.float(), scheduler.alphas_cumprod, atol=3e-6, rtol=1e-4)


@pytest.mark.parametrize(("name", "settings"), SCHEDULERS)
def test_process_scheduler_process(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    process = GaussianDiffusion.from_scheduler_config(getattr(diffusers, name)(**settings).config)
    again = GaussianDiffusion.from_scheduler_config(process.scheduler_config())
    build_scheduler(process, "DDPMScheduler").save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    for other in (again, GaussianDiffusion.from_scheduler_config(saved)):
        assert other.betas.equal(process.betas)
        for name in ("num_timesteps", "prediction_type", "variance_type", "zero_terminal_snr"):
            assert getattr(other, name) == getattr(process, name)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(diffusers.FlowMatchEulerDiscreteScheduler().config), "neither beta_schedule nor trained_betas"),
        (dict(diffusers.EDMEulerScheduler().config), "neither beta_schedule nor trained_betas"),
        ({"_class_name": "DDPMScheduler", "beta_schedule": "laplace"}, "DDPMScheduler has beta_schedule='laplace'"),
        ({"beta_schedule": "linear", "variance_type": "learned"}, "has variance_type='learned'"),
        ({"beta_schedule": "linear", "use_flow_sigmas": True}, "use_flow_sigmas=True"),
        ({"beta_schedule": "linear", "prediction_type": "flow_prediction"}, "prediction_type 'flow_prediction'"),
        ({"beta_schedule": "linear", "rescale_betas_zero_snr": True}, "cannot be used with zero terminal SNR"),
        ({"trained_betas": [0.1, 1.5]}, "betas must lie above 0 and not above 1"),
        ({"trained_betas": [0.1, 1.0]}, "cannot be used with zero terminal SNR"),
        ({"beta_schedule": "linear", "beta_end": -1.0}, "betas must lie above 0"),
    ],
)
def test_what_the_process_cannot_be_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GaussianDiffusion.from_scheduler_config(config)


def test_ends_of_a_schedule_that_has_none_are_refused() -> None:
    with pytest.raises(ValueError, match="the cosine schedule has no beta_start"):
        GaussianDiffusion("cosine", beta_start=0.1)


@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"])
def test_only_ddpm_is_told_of_learned_variances(name: str) -> None:
    process = GaussianDiffusion("scaled_linear", variance_type="learned_range")
    assert takes_variance(build_scheduler(process, "DDPMScheduler"))
    other = build_scheduler(process, name)
    assert other.config.get("variance_type") is None
    assert not takes_variance(other)


def test_schedulers_of_latents_do_not_clip() -> None:
    assert not build_scheduler(GaussianDiffusion(), "DDPMScheduler").config.clip_sample


def test_a_scheduler_that_cannot_sample_from_the_process_is_refused() -> None:
    process = GaussianDiffusion(prediction_type="v_prediction", zero_terminal_snr=True)
    with pytest.raises(ValueError, match="PNDMScheduler cannot sample from a process with zero terminal SNR"):
        build_scheduler(process, "PNDMScheduler")
    with pytest.raises(ValueError, match="no prediction_type, so it cannot sample"):
        build_scheduler(process, "FlowMatchEulerDiscreteScheduler")


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "cosine"])
@pytest.mark.parametrize(
    ("name", "prediction_type"),
    [
        (name, prediction_type)
        for name in (
            "DDIMScheduler",
            "DPMSolverMultistepScheduler",
            "EulerDiscreteScheduler",
            "UniPCMultistepScheduler",
        )
        for prediction_type in ("epsilon", "v_prediction", "sample")
    ],
)
def test_every_step_lies_on_the_way_that_training_knows(name: str, prediction_type: str, schedule: str) -> None:
    """With the true prediction each sampler without noise goes from q_sample(x_0, t, eps) to q_sample(x_0, t', eps)."""
    process = GaussianDiffusion(schedule, prediction_type=prediction_type)
    scheduler = build_scheduler(process, name)
    scheduler.set_timesteps(10)  # diffusers' DDIM steps beside its own timesteps where their number does not divide T
    torch.manual_seed(0)
    x_start, noise = torch.randn(2, 1, 3, 4, 4, dtype=torch.float64)
    timesteps = [int(t) for t in scheduler.timesteps]
    assert timesteps[0] == 999

    def on_the_way(t: int) -> torch.Tensor:
        return process.q_sample(x_start, torch.tensor([t]), noise)

    # The cosine schedule's last alpha-bar is 2e-9, of which the float32 of schedulers keeps few digits.
    tolerance = 1e-2 if (schedule, prediction_type) == ("cosine", "epsilon") else 2e-3
    x = on_the_way(999)
    if name == "EulerDiscreteScheduler":
        x = x_start + scheduler.sigmas[0] * noise
    for i, t in enumerate(timesteps):
        seen = scheduler.scale_model_input(x, scheduler.timesteps[i])
        torch.testing.assert_close(seen, on_the_way(t), atol=tolerance, rtol=tolerance)
        target = process.target(x_start, noise, torch.tensor([t]))
        x = scheduler.step(target, scheduler.timesteps[i], x).prev_sample
    torch.testing.assert_close(x, x_start, atol=2e-2, rtol=2e-2)
