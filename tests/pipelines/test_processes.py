"""Pipelines with a process that the package does not know: its scheduler, its guidance interval, its previews."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image
from straight import Straight
from torch import Tensor

from latentdiff import ImageToImagePipeline
from latentdiff.diffusion import RectifiedFlow, process, register_process
from latentdiff.diffusion.guidance import ClassifierFreeGuidance
from latentdiff.pipelines.core.sampling import Sampler, denoise
from latentdiff.pipelines.core.scheduler_names import change_scheduler

FLOW = {"prediction_type": "flow_prediction"}


@pytest.fixture
def straight() -> Iterator[Straight]:
    register_process(Straight)
    yield Straight()
    process.PROCESSES.remove(Straight)


@pytest.fixture(params=["straight", "euler", "heun", "dpm++", "unipc"])
def scheduler(request: pytest.FixtureRequest) -> Any:
    """Of a process of an extension, and those of the package's flow."""
    if request.param == "straight":
        return request.getfixturevalue("straight").scheduler()
    return change_scheduler(RectifiedFlow(2.0).scheduler(), request.param)


def test_a_perfect_network_is_sampled_to_its_picture(scheduler: Any) -> None:
    sampler = Sampler(scheduler)
    straight = sampler.process
    exact = 1e-4 if straight.name == "straight" else 5e-4 if "Match" in type(scheduler).__name__ else 3e-3
    picture, start = torch.randn(2, 1, 4, 6, 6, generator=torch.Generator().manual_seed(0))

    class Perfect:
        guidance = ClassifierFreeGuidance(1.0)

        def __call__(self, latents: Tensor, timestep: Any, guided: bool = True) -> Tensor:
            signal, sigma = straight.level(timestep)
            return straight.predicts.of(picture, (latents - signal * picture) / sigma, signal, sigma)

    for progress in denoise(Perfect(), sampler, start, sampler.plan(5, torch.device("cpu"))):
        torch.testing.assert_close(progress.clean, picture, atol=exact, rtol=0)
    torch.testing.assert_close(progress.latents, picture, atol=exact, rtol=0)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("DDIMScheduler", FLOW, "the DDIMScheduler steps between noise levels, .* predicts a flow .*; FlowMatchEuler"),
        ("EulerDiscreteScheduler", FLOW, "the EulerDiscreteScheduler steps between noise levels"),
        ("PNDMScheduler", FLOW, "the PNDMScheduler steps between noise levels"),
        ("DPMSolverMultistepScheduler", FLOW, "UniPCMultistepScheduler with use_flow_sigmas=True"),
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True}, "of a flow with the network of another process"),
        ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}, "use_dynamic_shifting=True, .* not supp"),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 0}, "shift=0 must be above 0"),
    ],
)
def test_schedulers_that_do_not_sample_from_a_flow(
    name: str, config: dict[str, Any], message: str, pipeline: Any
) -> None:
    pipeline.scheduler = getattr(diffusers, name)(**config)
    calls: list[int] = []
    pipeline.unet.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=message):
        pipeline("a red car", num_inference_steps=4)
    assert not calls


def test_pipelines_draw_with_it(scheduler: Any, pipeline: Any) -> None:
    pipeline.scheduler = scheduler
    straight = process.process_of(scheduler)
    rows: list[int] = []
    handle = pipeline.unet.conv_in.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    call = {"num_inference_steps": 4, "seed": 0, "guidance_scale": 3.0}
    shown = list(pipeline.stream("a red car", guidance_interval=(0.5, 2.0), **call))
    handle.remove()
    assert [row == 2 for row in rows] == [0.5 < straight.noise_level(one.timestep) <= 2.0 for one in shown[:-1]]
    assert 2 in rows
    assert [one.preview()[0].size for one in shown] == [(8, 8)] * len(shown)
    last, whole = shown[-2], "Multistep" in type(scheduler).__name__  # whose timesteps are cut to whole numbers
    torch.testing.assert_close(last.clean, last.latents, atol=2e-3 if whole else 1e-5, rtol=1e-5)


def test_pictures_are_changed_with_it(scheduler: Any, pipeline: Any) -> None:
    pipeline.scheduler = scheduler
    redraw = ImageToImagePipeline.from_pipe(pipeline)
    picture = Image.new("RGB", (16, 16), "red")
    call = {"image": picture, "num_inference_steps": 8, "seed": 0, "output_type": "latent"}
    start = redraw.vae.encode(torch.zeros(1, 3, 16, 16)).latent_dist.mean.shape
    little, much = (redraw("a red car", strength=strength, **call).images for strength in (0.15, 0.9))
    assert little.shape == much.shape == start
    assert (little - much).abs().max() > 1e-2


def test_another_scheduler_must_sample_from_the_process(straight: Straight) -> None:
    with pytest.raises(ValueError, match="the EulerDiscreteScheduler cannot sample from the straight process"):
        change_scheduler(straight.scheduler(), "euler")


@pytest.mark.parametrize("name", ["dpm++", "euler"])
def test_a_flow_in_a_single_file_is_the_same(pipeline: Any, tmp_path: Path, name: str) -> None:
    pipeline.scheduler = change_scheduler(RectifiedFlow(2.0).scheduler(), name)
    pipeline.save_single_file(tmp_path / "flow.safetensors")
    again = type(pipeline).from_single_file(tmp_path / "flow.safetensors")
    assert type(again.scheduler) is type(pipeline.scheduler)
    assert process.process_of(again.scheduler).scheduler_config() == RectifiedFlow(2.0).scheduler_config()
    call = {"seed": 0, "num_inference_steps": 2, "output_type": "latent"}
    torch.testing.assert_close(again("a cup", **call).images, pipeline("a cup", **call).images)
