"""At which size a given picture is drawn, and which part of it: its shape is kept."""

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from latentdiff import ImageToImagePipeline, InpaintPipeline, SuperResolutionPipeline
from latentdiff.pipelines.core.input_pictures import Placement, place, to_mask, to_pixels

PROCESSOR = VaeImageProcessor(vae_scale_factor=4, vae_latent_channels=4)
MASKS = VaeImageProcessor(vae_scale_factor=4, do_normalize=False, do_binarize=True, do_convert_grayscale=True)
NOISE = np.random.default_rng(0).integers(0, 256, (16, 32, 3), dtype=np.uint8)  # wide
WIDE = Image.fromarray(NOISE)
LEFT = Image.fromarray(np.repeat(np.arange(32)[None] < 12, 16, 0))
CALL = {"num_inference_steps": 2, "seed": 0, "strength": 0.8}


@pytest.mark.parametrize(
    ("width", "height", "asked", "trained", "wanted"),
    [
        (64, 64, {}, 64, (64, 64)),
        (96, 64, {}, 64, (96, 64)),  # near enough to the trained size
        (90, 65, {}, 64, (88, 64)),
        (640, 360, {}, 64, (84, 48)),
        (360, 640, {}, 64, (48, 84)),
        (20, 10, {}, 64, (92, 44)),
        (640, 360, {}, None, (640, 360)),
        (2, 30, {}, None, (4, 28)),
        (640, 360, {"width": 128}, 64, (128, 72)),
        (640, 360, {"height": 128}, 64, (228, 128)),
        (640, 360, {"height": 64, "width": 64}, 64, (64, 64)),
    ],
)
def test_the_rule(width: int, height: int, asked: dict[str, Any], trained: int | None, wanted: tuple[int, int]) -> None:
    given: list[Any] = [Image.new("RGB", (width, height)), np.zeros((height, width, 3))]
    turned = Image.new("RGB", (height, width))
    turned.getexif()[0x0112] = 6
    if asked or trained is None:  # else tensors keep their size
        given.append(torch.zeros(1, 3, height, width))
    for image in (*given, turned, given[:1] * 2):
        placed = place(PROCESSOR, image, **asked, trained=trained and (trained, trained))
        assert (placed.width, placed.height) == wanted
        assert to_pixels(PROCESSOR, image, placed).shape[1:] == (3, wanted[1], wanted[0])


@pytest.mark.parametrize("shape", [(1, 4, 40, 90), (1, 3, 160, 360), (3, 161, 363)])
def test_tensors_keep_their_size(shape: tuple[int, ...]) -> None:
    for image in (torch.zeros(shape), [torch.zeros(shape)] * 2):
        placed = place(PROCESSOR, image, trained=(64, 64))
        assert (placed.height, placed.width) == (160, 360)


def test_a_picture_is_cut_in_its_middle() -> None:
    placed = place(PROCESSOR, WIDE, 16, 16)
    assert placed.box(0, 16, 32) == (8, 0, 24, 16)
    middle = torch.from_numpy(NOISE[:, 8:24] / 127.5 - 1).permute(2, 0, 1)[None].float()
    for image in (WIDE, NOISE, torch.from_numpy(NOISE).permute(2, 0, 1)[None]):
        torch.testing.assert_close(to_pixels(PROCESSOR, image, placed).float(), middle)
    odd = WIDE.crop((0, 0, 31, 15))  # by whole pixels, so that nothing blurs
    kept = torch.from_numpy(NOISE[1:13, 1:29] / 127.5 - 1).permute(2, 0, 1)[None].float()
    for one in (odd, np.asarray(odd)):
        torch.testing.assert_close(to_pixels(PROCESSOR, one).float(), kept)


def test_a_mask_of_any_size_is_cut_with_its_picture() -> None:
    placed = place(PROCESSOR, WIDE, 16, 16)
    wanted = torch.arange(16).expand(1, 1, 16, 16) < 4  # 12 less the 8 that are cut
    square = LEFT.resize((32, 32))
    for mask in (LEFT, square, LEFT.resize((64, 32)), np.asarray(LEFT), torch.from_numpy(np.asarray(square))[None]):
        assert torch.equal(to_mask(MASKS, mask, placed) > 0, wanted)


def test_each_of_several_pictures_is_cut_by_its_own_shape() -> None:
    tall = Image.fromarray(NOISE.transpose(1, 0, 2))
    with pytest.raises(ValueError, match="differ in size, 32 x 16 and 16 x 32; give one at a time, or height and"):
        place(PROCESSOR, [WIDE, tall])
    pixels = to_pixels(PROCESSOR, [WIDE, tall], place(PROCESSOR, [WIDE, tall], 16, 16))
    torch.testing.assert_close(pixels[0], pixels[1].transpose(1, 2))


@pytest.mark.parametrize("size", [(64, 36), (36, 64)])
def test_inpainting_keeps_the_shape_of_a_picture(pipeline: Any, size: tuple[int, int]) -> None:
    painter = InpaintPipeline.from_pipe(pipeline)
    painter.set_progress_bar_config(disable=True)
    image, mask = WIDE.resize(size), LEFT.resize(size)
    drawn = painter("sun", image, mask, **CALL).images[0]
    assert drawn.size == ((22, 12) if size[0] > size[1] else (12, 22))


def test_inpainting_at_another_shape_cuts_picture_and_mask(pipeline: Any) -> None:
    painter = InpaintPipeline.from_pipe(pipeline)
    painter.set_progress_bar_config(disable=True)
    cut = [one.crop((8, 0, 24, 16)) for one in (WIDE, LEFT)]
    square = [one.resize((16, 16), Image.Resampling.LANCZOS) for one in (WIDE, LEFT)]
    size = {"height": 16, "width": 16}
    assert painter("sun", WIDE, LEFT, **CALL, **size).images == painter("sun", *cut, **CALL).images
    stretched = painter("sun", WIDE, LEFT, **CALL, resize_mode="default").images
    assert stretched == painter("sun", WIDE, square[1], **CALL, **size, resize_mode="default").images
    assert stretched == painter("sun", square[0], LEFT, **CALL, **size, resize_mode="default").images
    assert painter("sun", WIDE, LEFT, **CALL, **size, resize_mode="fill").images[0].size == (16, 16)


def test_redrawing_takes_a_size_and_a_mode(pipeline: Any) -> None:
    redraw = ImageToImagePipeline.from_pipe(pipeline)
    redraw.set_progress_bar_config(disable=True)
    assert redraw("sun", WIDE.resize((320, 160)), **CALL).images[0].size == (22, 12)
    assert redraw("sun", WIDE, **CALL, width=32).images[0].size == (32, 16)
    wanted = redraw("sun", WIDE.crop((8, 0, 24, 16)), **CALL).images
    assert redraw("sun", WIDE, **CALL, height=16, width=16).images == wanted
    with pytest.raises(ValueError, match="unknown resize_mode 'squash'; choose from crop, default, fill"):
        redraw("sun", WIDE, resize_mode="squash")
    with pytest.raises(ValueError, match="resize_mode='fill' is for PIL images"):
        redraw("sun", NOISE, resize_mode="fill")
    with pytest.raises(ValueError, match="height=15 is not a multiple of 2"):
        redraw("sun", WIDE, height=15)


def test_super_resolution_cuts_to_multiples(twins: Any) -> None:
    ours, _ = twins(
        *(SuperResolutionPipeline, diffusers.StableDiffusionUpscalePipeline, None, {"in_channels": 7}),
        low_res_scheduler=diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
    )
    odd = WIDE.crop((0, 0, 31, 15))
    call = {"num_inference_steps": 2, "seed": 0}
    drawn = ours("sun", odd, **call).images
    assert drawn[0].size == (60, 28)
    assert drawn == ours("sun", odd.crop((0, 0, 30, 14)), **call).images
    assert drawn != ours("sun", odd, **call, resize_mode="default").images


@pytest.mark.parametrize("kind", [ImageToImagePipeline, InpaintPipeline])
def test_a_size_that_the_rule_chose_is_not_warned_of(
    kind: Any, pipeline: Any, caplog: pytest.LogCaptureFixture
) -> None:
    redraw, image = kind.from_pipe(pipeline), WIDE.resize((39, 7))
    redraw.set_progress_bar_config(disable=True)
    more = {"mask_image": LEFT.resize((39, 7))} if kind is InpaintPipeline else {}
    for size in ({}, {"width": 38, "height": 6}):  # as commands give what the rule chose
        drawn = redraw("sun", image, **more, **CALL, **size).images[0]
        assert drawn.size == (38, 6)
    assert caplog.text == ""
    redraw("sun", image, **more, **CALL, width=64)
    assert caplog.text.count("Drawing 64 x 12 pixels") == 1


@pytest.mark.parametrize(
    ("classes", "timesteps", "most", "reason"),
    [(20, 1000, 19, "its UNet has 20 class embeddings"), (400, 12, 11, "its low_res_scheduler has 12 timesteps")],
)
def test_a_noise_level_that_the_networks_do_not_know_is_refused(
    classes: int, timesteps: int, most: int, reason: str, twins: Any
) -> None:
    ours, _ = twins(
        *(SuperResolutionPipeline, diffusers.StableDiffusionUpscalePipeline, None),
        {"in_channels": 7, "num_class_embeds": classes},
        low_res_scheduler=diffusers.DDPMScheduler(num_train_timesteps=timesteps),
    )
    call: dict[str, Any] = {"num_inference_steps": 2, "seed": 0}
    with pytest.raises(ValueError, match=rf"noise_level must be a whole number in \[0, {most}\], not 20 \({reason}"):
        ours("sun", WIDE, **call)
    assert ours("sun", WIDE, **call, noise_level=most).images[0].size == (64, 32)


def test_a_placement_without_cut_shows_all() -> None:
    assert Placement(16, 16, [(16, 32)], "default").box(0, 8, 9) == (0, 0, 9, 8)
