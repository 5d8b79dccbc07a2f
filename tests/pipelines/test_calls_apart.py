"""Calls of one pipeline at the same time: in threads, in streams read in turn, within callbacks, under offloading."""

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path
from threading import Barrier, BrokenBarrierError
from typing import Any

import accelerate
import diffusers
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from loras import diffusers_lora
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from torch import Tensor, nn

from latentdiff import ImageToImagePipeline, InpaintPipeline
from latentdiff.pipelines.core.scheduler_names import change_scheduler

CALLS = [  # each with its own steps, guidance and size
    {"prompt": "a red car", "seed": 1, "num_inference_steps": 3, "guidance_scale": 2.0},
    {"prompt": "the sun", "seed": 2, "num_inference_steps": 7, "guidance_scale": 1.0},
    {"prompt": "a cat", "seed": 3, "num_inference_steps": 5, "guidance_scale": 9.0, "guidance_rescale": 0.5},
    {"prompt": "a house in the sun", "seed": 4, "num_inference_steps": 9, "guidance_interval": (0.5, 5.0)},
    {"prompt": ["a hat", "a cup"], "seed": 5, "num_inference_steps": 4, "height": 32, "width": 24},
]


def draw(pipeline: Any, call: dict[str, Any]) -> Tensor:
    return pipeline(**call, output_type="pt").images


@pytest.mark.parametrize("scheduler", ["ddim", "dpm++", "euler-ancestral"])
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_threads_draw_what_each_draws_alone(pipeline: Any, scheduler: str) -> None:
    pipeline.scheduler = change_scheduler(pipeline.scheduler, scheduler)
    alone = [draw(pipeline, call) for call in CALLS]
    barrier = Barrier(len(CALLS))

    def in_step(call: dict[str, Any]) -> Tensor:
        """All have begun before any makes its second step."""

        def wait(view: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if step == 0:
                barrier.wait(60)
            return tensors

        return draw(pipeline, {**call, "callback_on_step_end": wait})

    with ThreadPoolExecutor(len(CALLS)) as pool:
        for found, wanted in zip(pool.map(in_step, CALLS), alone, strict=True):
            assert torch.equal(found, wanted)


def test_streams_that_are_read_in_turn_draw_what_each_draws_alone(pipeline: Any) -> None:
    alone = [draw(pipeline, call) for call in CALLS]
    streams = [pipeline.stream(**call, output_type="pt") for call in CALLS]
    last: list[Any] = [None] * len(CALLS)
    for row in zip_longest(*streams):
        last = [new or old for new, old in zip(row, last, strict=True)]
    for progress, wanted in zip(last, alone, strict=True):
        assert torch.equal(progress.output.images, wanted)


@pytest.fixture
def own(pipeline: Any) -> Any:
    """A pipeline whose networks are its own: LoRAs change them in place."""
    pipeline.unet, pipeline.text_encoder = copy.deepcopy((pipeline.unet, pipeline.text_encoder))
    return pipeline


def test_streams_with_their_own_lora_scales(own: Any, tmp_path: Path) -> None:
    own.load_lora_weights(diffusers_lora(own, tmp_path))
    calls = [{**CALLS[0], "cross_attention_kwargs": {"scale": scale}} for scale in (0.0, 1.0, 3.0)]
    alone = [draw(own, call) for call in calls]
    assert (alone[0] - alone[2]).abs().max() > 1e-3
    for row in zip(*[own.stream(**call, output_type="pt") for call in calls], strict=True):
        last = row
    for progress, wanted in zip(last, alone, strict=True):
        assert torch.equal(progress.output.images, wanted)


@pytest.mark.parametrize("where", ["unet", "text_encoder"])
def test_threads_with_their_own_lora_scales(own: Any, tmp_path: Path, where: str) -> None:
    """None sees the scale of another, nor does one without a scale; they meet inside the network, if they can."""
    own.load_lora_weights(diffusers_lora(own, tmp_path))
    scales: list[dict[str, Any]] = [{"cross_attention_kwargs": {"scale": scale}} for scale in (0.0, 3.0)]
    calls = [{**CALLS[1], **scale} for scale in (*scales, {})]
    alone = [draw(own, call) for call in calls]
    assert (alone[0] - alone[2]).abs().max() > 1e-3
    barrier = Barrier(len(calls))

    def meet(*args: Any) -> None:
        with suppress(BrokenBarrierError):
            barrier.wait(0.2)

    first = next(module for module in getattr(own, where).modules() if isinstance(module, BaseTunerLayer))
    handle = first.register_forward_pre_hook(meet)
    with ThreadPoolExecutor(len(calls)) as pool:
        found = list(pool.map(lambda call: draw(own, call), calls))
    handle.remove()
    for one, wanted in zip(found, alone, strict=True):
        assert torch.equal(one, wanted)


def test_a_call_within_a_callback_changes_nothing(pipeline: Any) -> None:
    alone = draw(pipeline, CALLS[2])
    other = draw(pipeline, CALLS[1])
    within: list[Tensor] = []

    def callback(view: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            within.append(draw(pipeline, CALLS[1]))
            within.append(draw(view, CALLS[1]))
        assert view.guidance_scale == 9.0
        assert view.num_timesteps == 5
        return tensors

    assert torch.equal(draw(pipeline, {**CALLS[2], "callback_on_step_end": callback}), alone)
    assert all(torch.equal(one, other) for one in within)
    assert len(within) == 2


def test_a_call_within_a_callback_with_its_own_size_and_lora_scale(own: Any, tmp_path: Path) -> None:
    own.load_lora_weights(diffusers_lora(own, tmp_path))
    outer = {**CALLS[0], "cross_attention_kwargs": {"scale": 2.0}}
    inner = {**CALLS[4], "cross_attention_kwargs": {"scale": 0.5}}
    alone, other = draw(own, outer), draw(own, inner)
    within: list[Tensor] = []

    def callback(view: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        within.append(draw(view if step else own, inner))
        return tensors

    assert torch.equal(draw(own, {**outer, "callback_on_step_end": callback}), alone)
    assert all(torch.equal(one, other) for one in within)
    assert len(within) == 3


def test_an_interruption_is_of_one_call(pipeline: Any) -> None:
    first, second = (pipeline.stream(**call, output_type="pt") for call in (CALLS[1], CALLS[3]))
    next(first), next(second)
    steps = []

    def stop(view: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        steps.append(step)
        view._interrupt = True
        return tensors

    draw(pipeline, {**CALLS[0], "callback_on_step_end": stop})
    assert steps == [0]
    assert [one.step for one in first] == [*range(1, 7), 6]
    pipeline._interrupt = True  # from outside: all that are running
    assert [one.step for one in second] == [0]
    assert len(list(pipeline.stream(**CALLS[0]))) == 4  # and none that comes later


def test_the_pipelines_own_scheduler_is_not_touched(pipeline: Any) -> None:
    before = pipeline.scheduler.timesteps.clone()
    draw(pipeline, CALLS[0])
    assert torch.equal(pipeline.scheduler.timesteps, before)
    assert pipeline.guidance_scale == 2.0  # of the call before, as callbacks for diffusers expect
    assert pipeline.num_timesteps == 3


@pytest.mark.parametrize("change", ["loaded", "scaled", "fused"])
def test_a_lora_changed_in_a_callback_acts_wholly(own: Any, tmp_path: Path, change: str) -> None:
    """From the next step on the UNet is the changed one, also in what it makes of the text."""
    call: dict[str, Any] = {"prompt": "a red car", "seed": 1, "num_inference_steps": 4, "output_type": "pt"}
    file = diffusers_lora(own, tmp_path, text=False)
    if change == "scaled":
        own.load_lora_weights(file, scale=0.0)

    def callback(view: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 1 and change == "scaled":
            own.set_adapters("default_0", 4.0)
        elif step == 1:
            own.load_lora_weights(file, scale=4.0)
            if change == "fused":
                own.fuse_lora()
        return tensors

    shown = list(own.stream(**call, callback_on_step_end=callback))
    states, negative = own.encode_prompt("a red car")
    scaled = torch.cat([shown[2].scaled] * 2)
    with torch.no_grad():
        both = own.unet(scaled, shown[2].timestep, torch.cat([negative, states]), return_dict=False)[0]
    without, with_prompt = both.chunk(2)
    wanted = without + own.defaults["guidance_scale"] * (with_prompt - without)
    torch.testing.assert_close(shown[2].prediction, wanted, atol=1e-4, rtol=1e-4)


class Elsewhere(ModelHook):
    """Model offload without a GPU: the weights rest on "meta", where nothing is computed, and work on the CPU."""

    execution_device = torch.device("cpu")

    def __init__(self, module: nn.Module) -> None:
        self.weights = {name: weight.clone() for name, weight in tensors_of(module)}

    def init_hook(self, module: nn.Module) -> nn.Module:
        return module.to("meta")

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for name, tensor in tensors_of(module.to_empty(device="cpu")):
            tensor.copy_(self.weights[name])
        return args, kwargs


def tensors_of(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*((name, weight.data) for name, weight in module.named_parameters()), *module.named_buffers()]


def offload_models(pipeline: Any) -> None:
    for name in ("text_encoder", "unet", "vae"):
        add_hook_to_module(getattr(pipeline, name), Elsewhere(getattr(pipeline, name)))


def offload_layers(pipeline: Any) -> None:
    for name in ("text_encoder", "unet", "vae"):
        accelerate.cpu_offload(getattr(pipeline, name), "cpu", offload_buffers=True)


@pytest.mark.parametrize("offload", [offload_models, offload_layers])
@pytest.mark.parametrize("kind", [ImageToImagePipeline, InpaintPipeline])
def test_pictures_go_where_the_networks_compute(
    twins: Callable[..., Any], kind: type, offload: Callable[[Any], None]
) -> None:
    theirs = {ImageToImagePipeline: diffusers.StableDiffusionImg2ImgPipeline}.get(
        kind, diffusers.StableDiffusionInpaintPipeline
    )
    pipeline, _ = twins(kind, theirs)
    pipeline.text_encoder = copy.deepcopy(pipeline.text_encoder)
    picture, mask = Image.new("RGB", (16, 16), "red"), Image.new("L", (16, 16), 255)
    call = {"image": picture, "strength": 0.6, "seed": 0, "num_inference_steps": 4, "output_type": "pt"}
    call |= {"mask_image": mask} if kind is InpaintPipeline else {}
    wanted = pipeline("a red car", **call).images
    offload(pipeline)
    assert pipeline.vae.device.type == "meta"
    torch.testing.assert_close(pipeline("a red car", **call).images, wanted, atol=1e-5, rtol=0)
