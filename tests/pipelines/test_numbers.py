"""Numbers that are not Python's, wherever a call takes numbers."""

import json
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from latentdiff import ImageToImagePipeline, InpaintPipeline, TextToImagePipeline, UnconditionalPipeline
from latentdiff.models import UNet2DModel
from latentdiff.pipelines import draw_many
from latentdiff.pipelines.core.call_options import positive_whole, real_number, whole_number

WHOLE: list[Callable[[Any], Any]] = [np.int64, np.uint8, torch.tensor, lambda value: np.array(value)]
REAL: list[Callable[[Any], Any]] = [np.float32, np.float64, torch.tensor, Fraction, lambda value: Decimal(str(value))]
PICTURE = Image.new("RGB", (16, 16), "red")
WHOLE_ONES = {
    "num_inference_steps": 4,
    "num_images_per_prompt": 2,
    "height": 16,
    "width": 24,
    "clip_skip": 1,
    "seed": 5,
}
REAL_ONES = {
    "guidance_scale": 2.5,
    "guidance_rescale": 0.25,
    "eta": 0.5,
    "variation_strength": 0.25,
    "strength": 0.75,
}


def draw(pipeline: Any, **call: Any) -> Any:
    return pipeline(**{"prompt": "a red car", **call, "output_type": "np"})


@pytest.mark.parametrize("kind", range(len(WHOLE)))
def test_whole_numbers_of_any_library(pipeline: Any, kind: int) -> None:
    wanted = draw(pipeline, **WHOLE_ONES, variation_seed=3, variation_strength=0.5)
    make = WHOLE[kind]
    given = {name: make(value) for name, value in WHOLE_ONES.items()}
    found = draw(pipeline, **given, variation_seed=make(3), variation_strength=0.5)
    np.testing.assert_array_equal(found.images, wanted.images)
    assert found.seeds == [5, 6]
    assert all(type(seed) is int for seed in found.seeds)


@pytest.mark.parametrize("kind", range(len(REAL)))
def test_real_numbers_of_any_library(pipeline: Any, kind: int) -> None:
    redraw = ImageToImagePipeline.from_pipe(pipeline)
    redraw.set_progress_bar_config(disable=True)
    call = {"image": PICTURE, "seed": 1, "variation_seed": 2, "num_inference_steps": 5}
    wanted = draw(redraw, **REAL_ONES, **call, guidance_interval=(0.25, 8.0)).images
    make = REAL[kind]
    given = {name: make(value) for name, value in REAL_ONES.items()}
    found = draw(redraw, **given, **call, guidance_interval=(make(0.25), make(8.0))).images
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("several", [np.array, torch.tensor, lambda values: [np.float32(one) for one in values], tuple])
def test_several_numbers_of_any_library(pipeline: Any, several: Callable[[Any], Any]) -> None:
    call = {"num_images_per_prompt": 2, "num_inference_steps": 2}
    wanted = draw(pipeline, guidance_scale=[1.5, 6.0], seed=[4, 9], **call).images
    seeds = several([4, 9]) if several in (np.array, torch.tensor) else [np.int32(4), np.uint16(9)]
    np.testing.assert_array_equal(draw(pipeline, guidance_scale=several([1.5, 6.0]), seed=seeds, **call).images, wanted)


def test_own_timesteps_and_sigmas_of_any_library(pipeline: Any) -> None:
    pipeline.scheduler = diffusers.DDPMScheduler()
    wanted = draw(pipeline, timesteps=[900, 500, 100], seed=0).images
    for several in (np.array, torch.tensor):
        np.testing.assert_array_equal(draw(pipeline, timesteps=several([900, 500, 100]), seed=0).images, wanted)
    pipeline.scheduler = diffusers.EulerDiscreteScheduler()
    wanted = draw(pipeline, sigmas=[10.0, 1.0, 0.0], seed=0).images
    np.testing.assert_array_equal(draw(pipeline, sigmas=np.array([10.0, 1.0, 0.0]), seed=0).images, wanted)


def test_other_kinds_of_calls(pipeline: Any) -> None:
    painter = InpaintPipeline.from_pipe(pipeline)
    plain = UnconditionalPipeline(
        UNet2DModel(
            sample_size=8,
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
            block_out_channels=(16,),
            norm_num_groups=8,
        ).eval(),
        diffusers.DDIMScheduler(),
    )
    for one in (painter, plain):
        one.set_progress_bar_config(disable=True)
    images = []
    for whole, real in ((int, float), (np.int64, np.float32)):
        call = {"num_inference_steps": whole(3), "seed": whole(0)}
        mask = Image.new("L", (16, 16))
        mask.paste(255, (4, 4, 8, 8))
        painted = painter(
            "sun", PICTURE, mask, strength=real(0.75), padding_mask_crop=whole(2), **call, height=whole(16)
        )
        drawn = plain(batch_size=whole(2), eta=real(0.5), **call, output_type="np").images
        images.append((np.asarray(painted.images[0]), drawn))
    for mine, theirs in zip(*images, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    states, _ = pipeline.encode_prompt("sun", num_images_per_prompt=np.int64(2), clip_skip=np.int64(1))
    assert len(states) == 2


def test_defaults_of_any_library_are_saved(pipeline: Any, tmp_path: Path) -> None:
    pipeline.register_defaults(num_inference_steps=np.int64(3), guidance_scale=np.float32(2.5))
    pipeline.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "model_index.json").read_text())["_generation_defaults"]
    assert saved == {"num_inference_steps": 3, "guidance_scale": 2.5}
    assert TextToImagePipeline.from_pretrained(tmp_path).defaults == saved
    with pytest.raises(TypeError, match="guidance_scale must be a number, not 'high'"):
        pipeline.register_defaults(guidance_scale="high")


def test_many_pictures(pipeline: Any, tmp_path: Path) -> None:
    numbers = {"seed": np.int64(3), "batch_size": np.uint8(1), "height": np.int32(16), "guidance_scale": np.float32(2)}
    drawn = []
    for name, given in (("numpy", numbers), ("python", {key: value.item() for key, value in numbers.items()})):
        report = draw_many(pipeline, ["sun", "cat"], tmp_path / name, num_inference_steps=2, **given)
        assert report.drawn == ["000001.png", "000002.png"]
        drawn.append([np.asarray(Image.open(tmp_path / name / file)) for file in report.drawn])
    np.testing.assert_array_equal(*drawn)
    with pytest.raises(TypeError, match="batch_size must be a whole number"):
        draw_many(pipeline, ["sun"], tmp_path, batch_size=1.5)  # type: ignore[arg-type]


BAD_WHOLE = [2.5, np.float64(2.5), torch.tensor(2.5), "2", True, np.True_, torch.tensor(True), None, [2], torch.ones(2)]
BAD_WHOLE += [np.nan, np.float32("inf"), 2 + 0j, np.ones(1), [2.0]]
BAD_REAL = ["2", True, np.True_, torch.tensor(True), None, [2.0], torch.ones(2), 1j]


@pytest.mark.parametrize("value", BAD_WHOLE, ids=repr)
def test_what_is_no_whole_number(value: Any) -> None:
    with pytest.raises(TypeError, match="steps must be a whole number, not"):
        whole_number(value, "steps")
    with pytest.raises(ValueError, match="images must be a whole number from 1, not"):
        positive_whole(value, "images")


@pytest.mark.parametrize(
    "value", [2.0, np.float64(2), np.float16(2), torch.tensor(2.0), Fraction(2), Decimal(2)], ids=repr
)
def test_a_whole_number_may_have_a_point(value: Any) -> None:
    for number in (whole_number(value, "steps"), positive_whole(value, "images")):
        assert number == 2
        assert type(number) is int


@pytest.mark.parametrize("value", BAD_REAL, ids=repr)
def test_what_is_no_number(value: Any) -> None:
    with pytest.raises(TypeError, match="scale must be a number, not"):
        real_number(value, "scale")


def test_infinity_is_for_noise_levels_alone(pipeline: Any) -> None:
    assert real_number(np.inf, "level", infinite=True) == float("inf")
    with pytest.raises(ValueError, match="scale must be a finite number, not"):
        real_number(torch.tensor(torch.inf), "scale")
    draw(pipeline, guidance_interval=(0.5, float("inf")), num_inference_steps=2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"guidance_scale": float("nan")}, "guidance_scale must be a finite number, not nan"),
        ({"guidance_scale": [1.0, float("inf")]}, "guidance_scale must be a finite number, not"),
        ({"guidance_rescale": np.nan}, "guidance_rescale must be a finite number, not nan"),
        ({"guidance_interval": (0.5, np.nan)}, "guidance_interval must be a number"),
        ({"guidance_interval": 0.5}, "guidance_interval must be two noise levels, not 0.5"),
        ({"eta": np.inf}, "eta must be a finite number"),
        ({"variation_seed": 1, "variation_strength": np.nan}, "variation_strength must be a finite number, not nan"),
        ({"cross_attention_kwargs": {"scale": np.inf}}, "cross_attention_kwargs: scale must be a finite number"),
        ({"latents": torch.full((1, 4, 8, 8), torch.nan)}, "latents has values that are not finite"),
        ({"prompt": None, "prompt_embeds": torch.full((1, 12, 16), torch.nan)}, "prompt_embeds has values that are"),
        ({"negative_prompt_embeds": torch.full((1, 12, 16), torch.inf)}, "negative_prompt_embeds has values that are"),
    ],
)
def test_what_is_not_finite_is_refused(pipeline: Any, call: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(pipeline, num_inference_steps=2, **call)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"latents": np.zeros((1, 4, 8, 8))}, "latents must be a tensor, not ndarray"),
        ({"negative_prompt_embeds": [[0.0]]}, "negative_prompt_embeds must be a tensor, not list"),
        ({"generator": 3}, "generator must be a torch.Generator or a list of them, not 3; a number is a seed="),
        ({"generator": [torch.Generator(), 1]}, "generator must be a torch.Generator or a list"),
    ],
)
def test_what_is_no_tensor_or_generator_is_refused(pipeline: Any, call: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        draw(pipeline, num_inference_steps=2, **call)
