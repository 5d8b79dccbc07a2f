"""Calls of the pipeline: seeds, sizes, outputs, and what is refused."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPVisionConfig

from latentdiff import ImageToImagePipeline, TextToImagePipeline, UNet2DConditionModel

FEW = {"num_inference_steps": 3}


def draw(pipeline: Any, *prompts: str, **call: Any) -> np.ndarray:
    return pipeline(list(prompts), **{**FEW, "output_type": "np", **call}).images


def test_a_seed_is_a_picture_whatever_the_batch(pipeline: Any) -> None:
    pipeline.scheduler = pipeline.scheduler.from_config(pipeline.scheduler.config)
    together = draw(pipeline, "a red car", "sun", seed=4, eta=1.0, num_images_per_prompt=2)
    alone = [draw(pipeline, prompt, seed=4 + i, eta=1.0)[0] for i, prompt in enumerate(["a red car"] * 2 + ["sun"] * 2)]
    np.testing.assert_allclose(together, np.stack(alone), atol=1e-5)
    listed = draw(pipeline, "a red car", "sun", seed=[6, 4], eta=1.0)
    np.testing.assert_allclose(listed[1], draw(pipeline, "sun", seed=4, eta=1.0)[0], atol=1e-5)
    assert np.abs(together[0] - together[1]).max() > 1e-3


def test_a_seed_means_the_same_in_half_precision(pipeline: Any, folder: Any) -> None:
    half = TextToImagePipeline.from_pretrained(folder, dtype=torch.bfloat16)
    difference = np.abs(draw(pipeline, "a red car", seed=3) - draw(half, "a red car", seed=3))
    assert (
        difference.mean() < 0.05 < np.abs(draw(pipeline, "a red car", seed=9) - draw(half, "a red car", seed=3)).mean()
    )


@pytest.mark.parametrize(
    ("output_type", "kind", "shape"),
    [("pil", list, None), ("np", np.ndarray, (1, 16, 24, 3)), ("pt", torch.Tensor, (1, 3, 16, 24)),
     ("latent", torch.Tensor, (1, 4, 8, 12))],
)  # fmt: skip
def test_outputs(pipeline: Any, output_type: str, kind: type, shape: tuple[int, ...] | None) -> None:
    images, flags = pipeline("a red car", width=24, output_type=output_type, return_dict=False, seed=0, **FEW)
    assert flags is None
    assert isinstance(images, kind)
    if shape is None:
        assert isinstance(images[0], Image.Image)
        assert images[0].size == (24, 16)
    else:
        assert tuple(images.shape) == shape


def test_text_is_looked_at_once_per_prompt_and_not_once_per_step(pipeline: Any) -> None:
    calls = []
    handle = pipeline.unet.cross_attentions[0].to_k.register_forward_hook(lambda *_: calls.append(1))
    pipeline("a red car", num_inference_steps=5)
    handle.remove()
    assert len(calls) == 1


@pytest.mark.slow
def test_a_compiled_unet_is_called_whole(pipeline: Any) -> None:
    compiled_calls = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled_calls.append(1)
        return graph.forward

    expected = draw(pipeline, "a red car", seed=0)
    unet = pipeline.unet
    pipeline.unet = torch.compile(unet, backend=backend)
    np.testing.assert_allclose(draw(pipeline, "a red car", seed=0), expected, atol=1e-5)
    pipeline.unet = unet
    assert compiled_calls


def test_the_progress_bar_counts_every_step(pipeline: Any, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline.set_progress_bar_config(disable=False)
    pipeline("a red car", num_inference_steps=3)
    pipeline.set_progress_bar_config(disable=True)
    assert "3/3" in capsys.readouterr().err


def test_a_callback_can_stop_the_run(pipeline: Any) -> None:
    steps = []

    def callback(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        steps.append(step)
        pipeline._interrupt = step == 1
        return tensors

    pipeline("a red car", num_inference_steps=5, callback_on_step_end=callback)
    assert steps == [0, 1]


def test_one_negative_prompt_serves_all(pipeline: Any) -> None:
    one = draw(pipeline, "a red car", "sun", negative_prompt="blue", seed=0)
    np.testing.assert_allclose(one, draw(pipeline, "a red car", "sun", negative_prompt=["blue"] * 2, seed=0))
    assert np.abs(one - draw(pipeline, "a red car", "sun", seed=0)).max() > 1e-4


def test_the_empty_prompt_draws(pipeline: Any) -> None:
    assert draw(pipeline, "", seed=0).shape == (1, 16, 16, 3)


def test_a_long_prompt_is_cut_with_a_warning(pipeline: Any, caplog: pytest.LogCaptureFixture) -> None:
    long = draw(pipeline, "a red car and its wheels", seed=0)
    assert "The text encoder takes 12 tokens; this part of the prompt was cut: 'its wheels'" in caplog.text
    assert np.isfinite(long).all()


REFUSED = [
    ({"prompt": 3}, TypeError, "prompt must be a string or a list of strings, not int"),
    ({"prompt": ["a", None]}, TypeError, r"prompt\[1\] must be a string, not NoneType"),
    ({"prompt": []}, ValueError, "prompt is an empty list"),
    ({"prompt": None}, ValueError, "give a prompt"),
    ({"prompt_embeds": torch.zeros(1, 12, 16)}, ValueError, "either prompt or prompt_embeds"),
    ({"negative_prompt": 1.5}, TypeError, "negative_prompt must be a string"),
    ({"negative_prompt": ["a", "b"]}, ValueError, "2 negative prompts were given for 1 prompts"),
    ({"prompt": None, "prompt_embeds": torch.zeros(12, 16)}, ValueError, r"shape \(prompts, tokens, width\)"),
    ({"negative_prompt_embeds": torch.zeros(1, 3, 16)}, ValueError, "must have the same shape"),
    ({"height": 17}, ValueError, "height=17 is not a multiple of 2; the nearest that this model draws: 16 or 18"),
    ({"width": 1}, ValueError, "width=1 is not a multiple of 2; .*: 2"),
    ({"width": -16}, ValueError, "width=-16"),
    ({"height": 16.5}, ValueError, "height=16.5"),
    ({"num_inference_steps": 0}, ValueError, r"num_inference_steps must lie in \[1, 1000\], not 0"),
    ({"num_inference_steps": 1001}, ValueError, "num_inference_steps"),
    ({"num_inference_steps": 2.5}, TypeError, "num_inference_steps"),
    ({"timesteps": [1], "sigmas": [1.0]}, ValueError, "either timesteps or sigmas"),
    ({"sigmas": [1.0]}, ValueError, "DDIMScheduler does not take its own sigmas"),
    ({"num_images_per_prompt": 0}, ValueError, "num_images_per_prompt"),
    ({"seed": -1}, ValueError, "seed"),
    ({"seed": "1"}, TypeError, "seed"),
    ({"seed": [1, 2]}, ValueError, "2 seeds were given for 1 images"),
    ({"seed": 1, "generator": torch.Generator()}, ValueError, "either seed or generator"),
    ({"generator": [torch.Generator()] * 2}, ValueError, "2 generators were given for 1 images"),
    ({"latents": torch.zeros(1, 4, 9, 8)}, ValueError, r"latents must have the shape \(1, 4, 8, 8\)"),
    ({"ip_adapter_image": 1}, ValueError, "ip_adapter_image is not supported"),
    ({"cross_attention_kwargs": {"gligen": 1}}, ValueError, "cross_attention_kwargs: gligen is not supported"),
    ({"candidate": 3}, TypeError, "unexpected argument 'candidate'; did you mean candidates"),
    ({"candidates": 3}, ValueError, "candidates are compared by a CLIP model"),
    ({"reranker": "x"}, ValueError, "a reranker needs candidates"),
    ({"guidance_interval": (3, 1)}, ValueError, r"guidance_interval must be two noise levels.*\(3.0, 1.0\)"),
    ({"guidance_rescale": 1.5}, ValueError, r"guidance_rescale must lie in \[0, 1\]"),
    ({"guidance_scale": [1.0, 2.0, 3.0]}, ValueError, "3 guidance scales were given for 1 images"),
    ({"variation_seed": 3}, ValueError, "a variation needs both"),
    ({"variation_seed": 3, "variation_strength": 2.0}, ValueError, r"variation_strength must lie in \[0, 1\]"),
    ({"clip_skip": 7}, ValueError, "clip_skip"),
    ({"callback_on_step_end": print, "callback_on_step_end_tensor_inputs": ["x"]}, ValueError, "there is no 'x'"),
    ({"output_type": "jpeg"}, ValueError, "output_type"),
]


@pytest.mark.parametrize(
    ("call", "error", "message"), REFUSED, ids=[f"{i}-{next(iter(c[0]))}" for i, c in enumerate(REFUSED)]
)
def test_bad_calls_are_refused(pipeline: Any, call: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pipeline(**{"prompt": "a red car", **FEW, **call})


def test_components_that_do_not_fit_are_refused(pipeline: Any) -> None:
    with pytest.raises(ValueError, match="image_encoder"):
        TextToImagePipeline(**{**pipeline.components, "image_encoder": torch.nn.Identity()})
    with pytest.raises(ValueError, match="feature_extractor"):
        TextToImagePipeline(**{**pipeline.components, "safety_checker": torch.nn.Identity()})


def test_an_inpainting_unet_is_refused(pipeline: Any) -> None:
    config = {key: value for key, value in pipeline.unet.config.items() if not key.startswith("_")}
    unet = UNet2DConditionModel(**{**config, "in_channels": 9})
    painter = TextToImagePipeline(**{**pipeline.components, "unet": unet})
    with pytest.raises(ValueError, match="takes 9 channels and the autoencoder's latents have 4"):
        painter("a red car")


def test_the_safety_checker_is_asked(pipeline: Any) -> None:
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision.to_dict(), projection_dim=8)).eval()
    checker.concept_embeds_weights.data.fill_(-2.0)  # every picture is over the threshold
    extractor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    parts = {**pipeline.components, "safety_checker": checker, "feature_extractor": extractor}
    output = TextToImagePipeline(**parts)("a red car", seed=0, output_type="np", **FEW)
    assert output.nsfw_content_detected == [True]
    assert not output.images.any()


@pytest.mark.parametrize(
    ("size", "warned"),
    [({}, False), ({"height": 24}, False), ({"height": 8, "width": 24}, True), ({"height": 24, "width": 24}, True)],
)
def test_a_size_far_from_the_trained_one_is_warned_of_once(
    pipeline: Any, size: dict[str, int], warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    first = pipeline("sun", num_inference_steps=1, **size).images[0]
    pipeline("sun", num_inference_steps=1, **size)
    said = [one for one in caplog.messages if "trained on 16 x 16" in one]
    assert len(said) == warned
    assert all(said_of.startswith(f"Drawing {first.width} x {first.height} pixels") for said_of in said)


def test_a_picture_to_start_from_may_be_far_from_the_trained_size_too(
    pipeline: Any, caplog: pytest.LogCaptureFixture
) -> None:
    redraw = ImageToImagePipeline.from_pipe(pipeline)
    call = {"image": Image.new("RGB", (64, 32)), "num_inference_steps": 1, "strength": 1}
    assert redraw("sun", **call).images[0].size == (22, 12)
    assert "Drawing" not in caplog.text
    redraw("sun", **call, height=32, width=64)
    assert "Drawing 64 x 32 pixels (width x height) with a model that was trained on 16 x 16" in caplog.text
