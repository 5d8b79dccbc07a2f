"""Training with the losses of the papers, from the settings to a picture."""

import json
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from latentdiff import TextToImagePipeline
from latentdiff.diffusion import GaussianDiffusion
from latentdiff.training.settings import DenoiserSettings
from latentdiff.training.trainers.denoiser import train_denoiser


def test_a_model_with_learned_variances_is_trained_saved_and_draws(
    denoiser_settings: dict[str, object], tmp_path: Path
) -> None:
    changes = {"loss": "hybrid", "max_steps": 4, "sample_every": 4, "gradient_checkpointing": True, "sample_steps": 3}
    out = train_denoiser(DenoiserSettings.load(None, {**denoiser_settings, **changes, "output": str(tmp_path / "out")}))
    rows = [json.loads(line) for line in (out / "training" / "metrics.jsonl").read_text().splitlines()]
    held_out = next(row for row in rows if "val_loss" in row)
    assert {"val_loss_0_249", "val_loss_250_499", "val_loss_500_749", "val_loss_750_999"} <= held_out.keys()

    pipeline = TextToImagePipeline.from_pretrained(out)
    assert pipeline.unet.config.out_channels == 2 * pipeline.vae.config.latent_channels
    assert isinstance(pipeline.scheduler, diffusers.DDPMScheduler)
    process = GaussianDiffusion.from_scheduler_config(pipeline.scheduler.config)
    assert process.learns_variance
    pipeline.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 3, "output_type": "latent", "seed": 0, "return_dict": False}
    latents, _ = pipeline("a red thing", **call)
    assert latents.isfinite().all()
    with torch.no_grad():
        pipeline.unet.conv_out.bias[4:] += 0.5
    assert not torch.equal(pipeline("a red thing", **call)[0], latents)


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": "l1", "p2_gamma": 0.5},
        {"loss": "bound", "num_train_timesteps": 3, "timestep_sampler": "loss_second_moment", "max_steps": 40},
    ],
)
def test_other_losses_learn_and_resume_exactly(
    changes: dict[str, object], denoiser_settings: dict[str, object], tmp_path: Path
) -> None:
    """With so few timesteps their histories are full before the run is cut."""
    steps = int(str(changes.get("max_steps", 6)))

    def train(name: str, most: int) -> Path:
        given = {**denoiser_settings, "log_every": 1, "sample_every": 100, "sample_steps": 2, **changes}
        given |= {"max_steps": most, "output": str(tmp_path / name), "gradient_accumulation_steps": 2}
        return train_denoiser(DenoiserSettings.load(None, given))

    straight = train("straight", steps)
    train("cut", steps - 2)
    cut = train("cut", steps)
    last = f"training/checkpoints/step-{steps:08d}/trained.safetensors"
    one, other = load_file(straight / last), load_file(cut / last)
    assert all(torch.equal(one[name], other[name]) for name in one)
    if "timestep_sampler" in changes:
        assert one["timestep_sampler.counts"].tolist() == [10, 10, 10]
        history = one["timestep_sampler.history"]
        assert history.isfinite().all()
        assert len(history.unique()) == 30
        saved = load_file(cut / "unet" / "diffusion_pytorch_model.safetensors")
        assert not any("timestep_sampler" in name for name in saved)
