"""A recorded step gives what the step itself gives, and is recorded anew when something else would come of it."""

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig
from recorded import Recorder
from tiny import tiny_pipeline
from tiny_sdxl import tiny_sdxl
from tiny_transformers import dit_folder, pixart_folder

from latentdiff import ClassConditionalPipeline, TextToImagePipeline
from latentdiff.pipelines.core.step_runner import MOST_GRAPHS, StepRunner, network_state

CALL: dict[str, Any] = {"num_inference_steps": 3, "seed": 1, "output_type": "latent"}


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def runner(recorder: Recorder) -> StepRunner:
    return StepRunner(compiled=False, graphs=True, record=recorder)


def own() -> TextToImagePipeline:
    pipeline = tiny_pipeline("clip")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def both(pipeline: Any, runner: StepRunner, **call: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Drawn without and with the runner."""
    drawn = []
    for one in (None, runner):
        pipeline.step_runner = one
        drawn.append(pipeline(**{**CALL, **call}).images)
    return drawn[0], drawn[1]


def test_each_shape_is_recorded_once(runner: StepRunner, recorder: Recorder) -> None:
    pipeline = own()
    for prompt in ("a cup", "a red cup"):
        assert torch.equal(*both(pipeline, runner, prompt=prompt, guidance_scale=3.0))
    assert recorder.count == 1
    assert torch.equal(*both(pipeline, runner, prompt=["a cup"] * 2, guidance_scale=3.0))
    assert torch.equal(*both(pipeline, runner, prompt="a cup", height=32, width=16, guidance_scale=3.0))
    assert recorder.count == 3
    interval = {"guidance_interval": (0.5, 100.0), "num_inference_steps": 10}
    assert torch.equal(*both(pipeline, runner, prompt="a cup", guidance_scale=3.0, **interval))
    assert recorder.count == 4  # some steps without guidance


@pytest.mark.parametrize("kind", ["masked text", "sdxl", "dit", "pixart"])
def test_of_every_network(kind: str, runner: StepRunner, recorder: Recorder, tmp_path: Any) -> None:
    call: dict[str, Any] = {"prompt": "a cup", "guidance_scale": 3.0}
    if kind == "masked text":
        pipeline: Any = tiny_pipeline()
    elif kind == "sdxl":
        tiny_sdxl().save_pretrained(tmp_path)
        pipeline = TextToImagePipeline.from_pretrained(tmp_path)
    elif kind == "dit":
        pipeline = ClassConditionalPipeline.from_pretrained(dit_folder(tmp_path))
        call = {"class_labels": [3, 999]}
    else:
        pipeline = TextToImagePipeline.from_pretrained(pixart_folder(tmp_path))
    pipeline.set_progress_bar_config(disable=True)
    assert torch.equal(*both(pipeline, runner, **call))
    assert recorder.count == 1


def test_no_more_are_kept_than_some(runner: StepRunner, recorder: Recorder) -> None:
    pipeline = own()
    pipeline.step_runner = runner
    for height in range(16, 16 + 16 * (MOST_GRAPHS + 1), 16):
        pipeline("a cup", **CALL, height=height, width=16)
    assert recorder.count == MOST_GRAPHS + 1
    pipeline("a cup", **CALL, height=height, width=16)
    assert recorder.count == MOST_GRAPHS + 1
    pipeline("a cup", **CALL, height=16, width=16)
    assert recorder.count == MOST_GRAPHS + 2


def test_what_a_network_is_set_to_is_noticed(runner: StepRunner, recorder: Recorder) -> None:
    pipeline = own()
    assert torch.equal(*both(pipeline, runner, prompt="a cup"))
    pipeline.unet.enable_freeu(0.5, 0.5, 2.0, 2.0)
    without, changed = both(pipeline, runner, prompt="a cup")
    assert torch.equal(without, changed)
    assert recorder.count == 2
    pipeline.unet.conv_in.weight = torch.nn.Parameter(pipeline.unet.conv_in.weight * 1.1)
    assert torch.equal(*both(pipeline, runner, prompt="a cup"))
    assert recorder.count == 3
    with torch.no_grad():
        pipeline.unet.conv_out.weight *= 1.1  # where it was
    assert torch.equal(*both(pipeline, runner, prompt="a cup"))
    assert recorder.count == 3


def test_loras_and_their_strength_are_noticed(runner: StepRunner, recorder: Recorder) -> None:
    pipeline = own()
    assert torch.equal(*both(pipeline, runner, prompt="a cup"))
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False), "style")
    strong, _ = found = both(pipeline, runner, prompt="a cup")
    assert torch.equal(*found)
    weak, _ = found = both(pipeline, runner, prompt="a cup", cross_attention_kwargs={"scale": 0.3})
    assert torch.equal(*found)
    assert not torch.allclose(strong, weak)
    pipeline.unet.disable_adapters()
    plain, _ = found = both(pipeline, runner, prompt="a cup")
    assert torch.equal(*found)
    assert not torch.allclose(strong, plain)


def test_threads_with_loras_of_different_strength(runner: StepRunner) -> None:
    pipeline = own()
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False), "style")
    calls = [{**CALL, "prompt": "a cup", "cross_attention_kwargs": {"scale": scale}} for scale in (1.0, 0.2) * 3]
    expected = [pipeline(**call).images for call in calls[:2]] * 3
    pipeline.step_runner = runner
    with ThreadPoolExecutor(2) as pool:
        drawn = list(pool.map(lambda call: pipeline(**call).images, calls))
    assert all(map(torch.equal, drawn, expected))


def test_a_callback_that_changes_the_network_or_guidance(runner: StepRunner) -> None:
    pipeline = own()

    def change(view: Any, step: int, timestep: Any, tensors: Any) -> dict[str, Any]:
        if step == 0:
            view._guidance_scale = 1.0
        pipeline.unet.enable_freeu(1.0, 1.0, 1.0 + (step + 1) % 3, 1.0)  # and after the last as at first
        return {}

    pipeline.unet.enable_freeu(1.0, 1.0, 1.0, 1.0)
    assert torch.equal(*both(pipeline, runner, prompt="a cup", guidance_scale=3.0, callback_on_step_end=change))


def test_gradients_are_those_of_the_steps(runner: StepRunner, recorder: Recorder) -> None:
    unet = own().unet
    latents, states = torch.randn(2, 4, 8, 8, requires_grad=True), torch.randn(2, 5, 16)
    runner(unet, network_state(unet), latents, unet.embed_time(5), unet.encode_text(states)).square().mean().backward()
    assert latents.grad is not None
    assert recorder.count == 0


def test_under_autocast_steps_run_as_they_are(runner: StepRunner, recorder: Recorder) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(*both(own(), runner, prompt="a cup"))
    assert recorder.count == 0


def test_weights_that_are_loaded_as_they_are_needed_are_not_recorded(runner: StepRunner, recorder: Recorder) -> None:
    pipeline = own()
    cpu_offload(pipeline.unet, torch.device("cpu"))  # as enable_sequential_cpu_offload
    assert next(pipeline.unet.parameters()).device.type == "meta"
    assert torch.equal(*both(pipeline, runner, prompt="a cup"))
    assert recorder.count == 0


def test_a_copy_of_a_pipeline_records_its_own(runner: StepRunner, recorder: Recorder) -> None:
    pipeline = own()
    expected, _ = both(pipeline, runner, prompt="a cup")
    copied = copy.deepcopy(pipeline)
    assert copied.step_runner is not runner
    assert torch.equal(copied("a cup", **CALL).images, expected)
    assert recorder.count == 2


def test_without_a_gpu_steps_run_as_they_are() -> None:
    assert torch.equal(*both(own(), StepRunner(compiled=True, graphs=True), prompt="a cup"))
