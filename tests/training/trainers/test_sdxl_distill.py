"""Distillation of SDXL: the student draws in diffusers as here, and is told sizes and pooled embeddings."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from lives import calm_and_killed, forks
from safetensors.torch import load_file
from tiny import draw
from tiny_sdxl import tiny_refiner, tiny_sdxl

from latentdiff import TextToImagePipeline
from latentdiff.conditioning import Conditioning
from latentdiff.diffusion import process_of
from latentdiff.training.objectives.trajectory import TrajectoryObjective
from latentdiff.training.settings import DistillationSettings
from latentdiff.training.trainers.distill import distill, empty_prompt

SMALL = {"batch_size": 2, "max_steps": 2, "checkpoint_every": 1, "sample_every": 2, "learning_rate": 1e-2}
METHODS: dict[str, dict[str, object]] = {
    "lcm": {"method": "lcm", "few_steps": 2},
    "lcm-lora": {"method": "lcm", "few_steps": 2, "lora_rank": 2},
    "trajectory": {"method": "trajectory", "few_steps": 2, "trajectory_repeats": 1, "own_states_after": 0.3},
    "consistency": {"method": "consistency", "few_steps": 2},
    "progressive": {"method": "progressive", "few_steps": 2, "start_steps": 2, "stage_steps": 1},
    "adversarial": {"method": "adversarial", "few_steps": 2, "discriminator_channels": 4},
    "dmd": {"method": "dmd", "few_steps": 2, "lora_rank": 2},
}
QUICK = ("lcm-lora", "trajectory")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdxl") / "model"
    tiny_sdxl().save_pretrained(folder)
    return folder


def run(pictures: Path, model: Path, output: Path, method: str, **changes: object) -> Path:
    places = {"data": str(pictures), "model": str(model), "output": str(output)}
    return distill(DistillationSettings.load(None, {**SMALL, **METHODS[method], **places, **changes}))


def unet(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize(
    "method", [one if one in QUICK else pytest.param(one, marks=pytest.mark.slow) for one in METHODS]
)
def test_a_student_draws_in_plain_diffusers_as_here(pictures: Path, model: Path, tmp_path: Path, method: str) -> None:
    out = run(pictures, model, tmp_path / "out", method)
    ours = TextToImagePipeline.from_pretrained(out)
    theirs = diffusers.StableDiffusionXLPipeline.from_pretrained(out, add_watermarker=False)
    assert ours.defaults["num_inference_steps"] == 2
    call: dict[str, Any] = {**ours.defaults, "original_size": (64, 48)}
    drawn = []
    for pipeline in (ours, theirs):
        pipeline.set_progress_bar_config(disable=True)
        drawn.append(draw(pipeline, generator=torch.Generator().manual_seed(3), **call))
    torch.testing.assert_close(*drawn, atol=1e-4, rtol=0)
    before, after = unet(model), unet(out)
    learned = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    assert not torch.equal(before[learned], after[learned])
    if method != "lcm-lora" and method != "dmd":
        assert not torch.equal(before["add_embedding.linear_1.weight"], after["add_embedding.linear_1.weight"])
    if "lora" in method:
        fresh = diffusers.StableDiffusionXLPipeline.from_pretrained(model, add_watermarker=False)
        fresh.scheduler = diffusers.LCMScheduler.from_config(theirs.scheduler.config)
        fresh.set_progress_bar_config(disable=True)
        fresh.load_lora_weights(str(out / "pytorch_lora_weights.safetensors"))
        loaded = draw(fresh, generator=torch.Generator().manual_seed(3), **call)
        torch.testing.assert_close(loaded, drawn[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("zeros", [True, False])
@torch.no_grad()
def test_the_teacher_is_guided_as_diffusers_guides_it(zeros: bool) -> None:
    theirs = tiny_sdxl()
    theirs.register_to_config(force_zeros_for_empty_prompt=zeros)
    ours: Any = TextToImagePipeline.from_pipe(theirs)
    empty = empty_prompt(ours)
    states, negative, pooled, negative_pooled = theirs.encode_prompt("a car")
    kind = {"steps": 2, "substeps": 2, "huber_c": 0.1}
    objective = TrajectoryObjective(ours.unet, ours.unet, process_of(ours.scheduler), (3.0, 3.0), empty, **kind)
    told = torch.tensor([[64.0, 48, 3, 5, 16, 16]])
    noisy, times = torch.randn(1, 4, 8, 8), torch.tensor([400])
    found = objective.guided_guess(
        noisy, times, Conditioning(states, pooled=pooled, time_ids=told), torch.tensor([3.0])
    )
    without, with_prompt = (
        theirs.unet(noisy, times, text, added_cond_kwargs={"text_embeds": vector, "time_ids": told}).sample
        for text, vector in ((negative, negative_pooled), (states, pooled))
    )
    torch.testing.assert_close(found.noise, without + 3.0 * (with_prompt - without), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@forks
def test_kills_change_nothing(pictures: Path, model: Path, tmp_path: Path) -> None:
    common: dict[str, object] = {"max_steps": 6, "sample_every": 100}
    calm_and_killed(lambda name: run(pictures, model, tmp_path / name, "lcm", **common), tmp_path / "log.txt")
    calm, killed = (unet(tmp_path / name) for name in ("calm", "killed"))
    assert all(torch.equal(killed[name], one) for name, one in calm.items())


def test_a_refiner_is_not_distilled(pictures: Path, tmp_path: Path) -> None:
    refiner = tiny_refiner(tiny_sdxl())
    refiner.save_pretrained(tmp_path / "refiner")
    with pytest.raises(ValueError, match="has the second text encoder alone, as SDXL's refiner, which is not trained"):
        run(pictures, tmp_path / "refiner", tmp_path / "out", "lcm")
