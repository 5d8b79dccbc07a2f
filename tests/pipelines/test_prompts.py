"""Weights, long prompts and ready states in calls."""

from typing import Any

import numpy as np
import pytest
import torch

FEW = {"num_inference_steps": 2, "output_type": "np", "seed": 0}


def test_weights_change_the_picture_only_where_asked_for(pipeline: Any) -> None:
    plain = pipeline("a red car", **FEW).images
    np.testing.assert_array_equal(pipeline("a red car", prompt_weights=True, **FEW).images, plain)
    weighed = pipeline("a (red:3) car", prompt_weights=True, **FEW).images
    assert np.abs(weighed - plain).max() > 1e-4
    literal = pipeline("a (red:3) car", **FEW).images
    assert np.abs(literal - weighed).max() > 1e-4


def test_long_prompts_are_drawn_whole(pipeline: Any, caplog: pytest.LogCaptureFixture) -> None:
    prompts = ["a red car and its wheels", "sun"]
    chunked = pipeline(prompts, long_prompts="chunk", negative_prompt="blue", **FEW).images
    assert not caplog.records
    assert np.abs(chunked[0] - pipeline(prompts, negative_prompt="blue", **FEW).images[0]).max() > 1e-4
    assert "was cut: 'its wheels' (long_prompts='chunk' keeps it)" in caplog.text


def test_a_short_prompt_is_the_same_in_chunks(pipeline: Any) -> None:
    np.testing.assert_array_equal(
        pipeline("a red car", long_prompts="chunk", **FEW).images, pipeline("a red car", **FEW).images
    )


def test_a_long_negative_prompt_makes_the_prompt_as_long(pipeline: Any) -> None:
    positive, negative = pipeline.encode_prompt("sun", negative_prompt="a red car and its wheels", long_prompts="chunk")
    assert positive.shape == negative.shape == (1, 24, 16)


@pytest.mark.parametrize("options", [{}, {"negative_prompt": "blue"}])
def test_states_in_chunks_go_with_negative_prompts(pipeline: Any, options: dict[str, Any]) -> None:
    prompt = "a red car and its wheels"
    positive, _ = pipeline.encode_prompt(prompt, long_prompts="chunk")
    ready = pipeline(prompt_embeds=positive, **options, **FEW).images
    np.testing.assert_array_equal(ready, pipeline(prompt, long_prompts="chunk", **options, **FEW).images)


def test_encode_prompt_makes_what_a_call_takes(pipeline: Any) -> None:
    positive, negative = pipeline.encode_prompt(["a (red:2) car", "sun"], prompt_weights=True, num_images_per_prompt=1)
    ready = pipeline(prompt_embeds=positive, negative_prompt_embeds=negative, **FEW).images
    wanted = pipeline(["a (red:2) car", "sun"], prompt_weights=True, **FEW).images
    np.testing.assert_array_equal(ready, wanted)
    assert pipeline.encode_prompt("sun", do_classifier_free_guidance=False)[1] is None
    assert not positive.requires_grad


def test_encode_prompt_is_diffusers(pair: Any) -> None:
    ours, theirs = pair()
    call = (["a red car", "sun"], torch.device("cpu"), 2, True, ["blue"] * 2)
    for mine, other in zip(ours.encode_prompt(*call), theirs.encode_prompt(*call), strict=True):
        torch.testing.assert_close(mine, other)


def test_an_unknown_way_with_long_prompts_is_refused(pipeline: Any) -> None:
    with pytest.raises(ValueError, match="long_prompts='fold' is not known; choose from cut, chunk"):
        pipeline("sun", long_prompts="fold", **FEW)
