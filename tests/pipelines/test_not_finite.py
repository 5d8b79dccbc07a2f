"""Networks that give NaN: which one it was, which images are spoilt, and what becomes of them."""

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_clip import save_clip

from latentdiff import ImageToImagePipeline, InpaintPipeline
from latentdiff.metrics.clip import load_clip

FEW = {"num_inference_steps": 2, "seed": 0}


@pytest.fixture
def own(pipeline: Any) -> Any:
    for name in ("unet", "vae", "text_encoder"):
        setattr(pipeline, name, copy.deepcopy(getattr(pipeline, name)))
    return pipeline


def spoil(network: Any, value: float = float("nan")) -> None:
    """The last bias is what reaches the result whatever comes before."""
    list(network.parameters())[-1].data.fill_(value)


@pytest.mark.parametrize("name", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_network_is_named(own: Any, caplog: pytest.LogCaptureFixture, name: str, value: float) -> None:
    assert own("sun", **FEW).nan_detected is None
    assert not caplog.records
    spoil(getattr(own, name), value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output = own("sun", num_images_per_prompt=2, **FEW)
    assert output.nan_detected == [True, True]
    assert all(image.getextrema() == ((0, 0),) * 3 for image in output.images)
    assert f"The {name} gave values that are not finite" in caplog.text
    assert "in float32, for images number 0, 1 of 2, counted from 0; its weights or what it was given" in caplog.text


def test_a_wider_precision_is_advised(own: Any, caplog: pytest.LogCaptureFixture) -> None:
    own.unet.to(torch.float16)
    own.unet.conv_out.weight.data.fill_(6e4)
    assert own("sun", **FEW).nan_detected == [True]
    assert "The unet gave values that are not finite (NaN or infinite) in float16" in caplog.text
    assert "load the model in a wider precision: dtype=torch.bfloat16 or torch.float32" in caplog.text


def spoil_one(pipeline: Any) -> None:
    """Of a batch the second image, as an overflow would."""

    def hook(network: Any, given: Any, made: Any) -> Any:
        made[-1] = torch.nan
        return made

    pipeline.unet.conv_out.register_forward_hook(hook)


def test_only_what_is_spoilt_is_flagged(own: Any, caplog: pytest.LogCaptureFixture) -> None:
    whole = own(["sun", "a red car"], **FEW).images
    spoil_one(own)
    output = own(["sun", "a red car"], **FEW)
    assert output.nan_detected == [False, True]
    assert output.images[0] == whole[0]
    assert "for images number 1 of 2" in caplog.text
    arrays = own(["sun", "a red car"], output_type="np", **FEW)
    assert np.isnan(arrays.images).all(axis=(1, 2, 3)).tolist() == arrays.nan_detected == [False, True]
    latents = own(["sun", "a red car"], output_type="latent", **FEW)
    assert latents.nan_detected == [False, True]
    *_, last = own.stream(["sun", "a red car"], **FEW)
    assert last.output.nan_detected == [False, True]
    images, _ = own(["sun", "a red car"], return_dict=False, **FEW)
    assert images[1].getextrema() == ((0, 0),) * 3


def test_spoilt_candidates_come_last(own: Any, tmp_path: Any) -> None:
    torch.manual_seed(0)
    call = {"reranker": load_clip(str(save_clip(tmp_path))), "candidates": 3, **FEW}
    spoil_one(own)
    output = own("sun", **call, num_images_per_prompt=3)
    assert output.nan_detected == [False, False, True]
    assert output.seeds[2] == 2
    assert own("sun", **call).nan_detected == [False]


@pytest.mark.parametrize("kind", [ImageToImagePipeline, InpaintPipeline])
def test_an_encoder_of_pictures_is_named(own: Any, kind: Any, caplog: pytest.LogCaptureFixture) -> None:
    spoil(own.vae.encoder)
    redraw = kind.from_pipe(own)
    redraw.set_progress_bar_config(disable=True)
    mask = {"mask_image": Image.new("L", (16, 16), 255)} if kind is InpaintPipeline else {}
    output = redraw("sun", image=Image.new("RGB", (16, 16)), strength=0.9, num_inference_steps=3, seed=0, **mask)
    assert output.nan_detected == [True]
    assert "The vae gave values that are not finite" in caplog.text
