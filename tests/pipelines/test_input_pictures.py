"""What a call takes for a picture and for a mask: files as cameras and scanners make them, arrays of all types."""

import warnings
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from latentdiff import ImageToImagePipeline, InpaintPipeline
from latentdiff.interchange.picture_files import to_rgb
from latentdiff.pipelines.batch.draw import read_inputs
from latentdiff.pipelines.core.input_pictures import to_mask, to_pixels, upright_pair, upright_rgb
from latentdiff.training.data.decode import decode

ORIENTATION = 0x0112
RAMP = np.linspace(0, 65535, 16 * 16).reshape(16, 16)


def photograph(orientation: int | None, width: int = 12, height: int = 8) -> Image.Image:
    """Another colour in each pixel, so that it shows how it was turned."""
    rows, columns = np.mgrid[:height, :width]
    image = Image.fromarray(np.stack([rows * 20, columns * 20, rows * 0], -1).astype(np.uint8))
    if orientation is not None:
        image.getexif()[ORIENTATION] = orientation
    return image


def mask_of(width: int = 12, height: int = 8, orientation: int | None = None) -> Image.Image:
    """White in the upper left corner."""
    mask = Image.new("L", (width, height))
    mask.paste(255, (0, 0, width // 2, height // 4))
    if orientation is not None:
        mask.getexif()[ORIENTATION] = orientation
    return mask


def colours_under(image: Any, mask: Any) -> set[tuple[int, ...]]:
    pixels = np.asarray(image)
    white = np.asarray(mask.convert("L") if isinstance(mask, Image.Image) else mask).reshape(pixels.shape[:2]) > 0.5
    return {tuple(pixel) for pixel in pixels[white]}


WANTED = colours_under(photograph(None), mask_of())  # what the user drew on


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(12, 8), (8, 8)])
def test_a_mask_drawn_on_the_pixels_of_a_photograph_is_turned_with_it(
    orientation: int, size: tuple[int, int], caplog: pytest.LogCaptureFixture
) -> None:
    image, mask = photograph(orientation, *size), mask_of(*size)
    wanted = colours_under(photograph(None, *size), mask)
    assert colours_under(*upright_pair(image, mask)) == wanted
    said = "turned with it: " + ("by its shape" if orientation > 4 and size == (12, 8) else "their shapes do not tell")
    assert (said in caplog.text) == (orientation > 1)
    array = np.asarray(mask) / 255
    for given in (array, array.astype(np.float32)[None], torch.from_numpy(array)[None, None], array > 0.5):
        assert colours_under(*upright_pair(image, given)) == wanted


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_a_mask_drawn_on_the_upright_photograph_stays(orientation: int, caplog: pytest.LogCaptureFixture) -> None:
    image = photograph(orientation)
    small = mask_of(4, 6)  # of the upright picture's shape
    for mask in (mask_of(8, 12), small):
        assert upright_pair(image, mask)[1] is mask
    assert upright_pair(image, mask_of(6, 4))[1].size == (4, 6)
    assert "by its shape" in caplog.text


@pytest.mark.parametrize("orientation", range(2, 9))
def test_a_mask_with_an_orientation_of_its_own_is_turned_by_that(orientation: int) -> None:
    image = photograph(orientation, 8, 8)
    assert colours_under(*upright_pair(image, mask_of(8, 8, orientation))) == colours_under(
        photograph(None, 8, 8), mask_of(8, 8)
    )
    upright = upright_rgb(image)
    assert colours_under(*upright_pair(image, mask_of(8, 8, 1))) == colours_under(upright, mask_of(8, 8))


def test_one_mask_is_turned_for_each_of_several_photographs() -> None:
    images, masks = upright_pair([photograph(3, 8, 8), photograph(None, 8, 8)], mask_of(8, 8))
    for image, mask in zip(images, masks, strict=True):
        assert colours_under(image, mask) == colours_under(photograph(None, 8, 8), mask_of(8, 8))


@pytest.mark.parametrize("orientation", [3, 6])
def test_calls_and_commands_repaint_the_same_half(pipeline: Any, tmp_path: Path, orientation: int) -> None:
    """Against the same photograph without EXIF, turned by hand."""
    image, mask = photograph(orientation, 24, 16), mask_of(24, 16)
    turned = photograph(None, 24, 16)
    way = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_270}[orientation]
    turned, turned_mask = turned.transpose(way), mask.transpose(way)
    painter = InpaintPipeline.from_pipe(pipeline)
    painter.set_progress_bar_config(disable=True)
    size = {"width": turned.width, "height": turned.height}
    call = {**size, "seed": 0, "num_inference_steps": 2, "strength": 0.8}
    for more in ({}, {"padding_mask_crop": 2}):
        wanted = painter("sun", turned, turned_mask, **call, **more).images[0]
        assert painter("sun", image, mask, **call, **more).images[0] == wanted
    image.save(tmp_path / "image.png", exif=image.getexif())
    mask.save(tmp_path / "mask.png")
    inputs, _ = read_inputs(tmp_path / "image.png", tmp_path / "mask.png")
    np.testing.assert_array_equal(np.asarray(inputs.image), np.asarray(turned))
    np.testing.assert_array_equal(np.asarray(inputs.mask), np.asarray(turned_mask))


# Deep grey


def deep(mode: str) -> Image.Image:
    if mode == "F":
        return Image.fromarray((RAMP / 65535).astype(np.float32))
    return Image.fromarray(RAMP.astype(np.uint16 if mode == "I;16" else np.int32))


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_deep_grey_is_read_whole(pipeline: Any, mode: str) -> None:
    assert deep(mode).mode == mode
    pixels = to_pixels(pipeline.image_processor, deep(mode))
    assert pixels.shape == (1, 3, 16, 16)
    wanted = torch.from_numpy(RAMP / 65535 * 2 - 1).float().expand(1, 3, -1, -1)
    torch.testing.assert_close(pixels, wanted, atol=1 / 255, rtol=0)
    painter = InpaintPipeline.from_pipe(pipeline)
    mask = to_mask(painter.mask_processor, deep(mode))
    assert mask.flatten().tolist() == (RAMP.flatten() > 32767).astype(float).tolist()


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_deep_masks_are_cut_out_and_put_back(pipeline: Any, mode: str) -> None:
    painter = InpaintPipeline.from_pipe(pipeline)
    painter.set_progress_bar_config(disable=True)
    call = {
        "prompt": "sun",
        "image": photograph(None, 16, 16),
        "num_inference_steps": 2,
        "padding_mask_crop": 1,
        "seed": 0,
    }
    grey = Image.fromarray((RAMP / 257).round().astype(np.uint8))
    assert painter(mask_image=deep(mode), **call).images == painter(mask_image=grey, **call).images


@pytest.mark.parametrize("mode", ["I;16", "I"])
def test_training_and_commands_read_deep_grey_alike(mode: str, tmp_path: Path) -> None:
    deep(mode).save(tmp_path / "deep.tiff")
    wanted = decode((tmp_path / "deep.tiff").read_bytes()).image
    inputs, _ = read_inputs(tmp_path / "deep.tiff", tmp_path / "deep.tiff")
    assert inputs.image == wanted
    assert inputs.mask == wanted.convert("L")
    assert abs(np.asarray(inputs.mask).mean() - 127.5) < 1


def test_pixels_that_are_no_numbers_are_refused(pipeline: Any) -> None:
    with pytest.raises(ValueError, match="pixels that are not numbers"):
        to_pixels(pipeline.image_processor, Image.fromarray(np.full((16, 16), np.nan, np.float32)))


# Arrays

LEVELS = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
SAME = {
    "uint8": LEVELS,
    "uint8 batch": LEVELS[None],
    "list": [LEVELS],
    "uint8 tensor": torch.from_numpy(LEVELS).permute(2, 0, 1),
    "float": LEVELS / 255,
    "signed tensor": torch.from_numpy(LEVELS / 127.5 - 1).permute(2, 0, 1)[None],
    "big-endian": LEVELS.astype(">u2") * 257,
    "big-endian floats": (LEVELS / 255).astype(">f4"),
    "read-only": np.asarray(Image.fromarray(LEVELS)),
    "reversed twice": LEVELS[::-1][::-1],
    "uint16": LEVELS.astype(np.uint16) * 257,
    "opaque": np.dstack([LEVELS, np.full((16, 16), 255, np.uint8)]),
    "opaque tensor": torch.from_numpy(np.dstack([LEVELS, np.full((16, 16), 255, np.uint8)])).permute(2, 0, 1),
}


@pytest.mark.parametrize("name", SAME)
def test_arrays_of_all_types_are_the_picture_that_they_hold(pipeline: Any, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = to_pixels(pipeline.image_processor, SAME[name])
    wanted = to_pixels(pipeline.image_processor, Image.fromarray(LEVELS))
    torch.testing.assert_close(pixels.float(), wanted, atol=1e-5, rtol=0)


def test_grey_and_transparent_arrays() -> None:
    from diffusers.image_processor import VaeImageProcessor

    processor = VaeImageProcessor(vae_scale_factor=2, vae_latent_channels=4)
    for grey in (LEVELS[..., 0], LEVELS[..., :1], torch.from_numpy(LEVELS[..., 0])):
        torch.testing.assert_close(
            to_pixels(processor, grey), to_pixels(processor, Image.fromarray(LEVELS[..., 0])), atol=1e-5, rtol=0
        )
    clear = np.dstack([LEVELS, np.arange(256, dtype=np.uint8).reshape(16, 16)])
    wanted = to_pixels(processor, Image.fromarray(clear))
    for given in (clear, clear / 255):
        torch.testing.assert_close(to_pixels(processor, given).float(), wanted, atol=0.02, rtol=0)


def test_a_processor_that_does_not_normalize_leaves_values_as_they_are() -> None:
    from diffusers.image_processor import VaeImageProcessor

    processor = VaeImageProcessor(vae_scale_factor=2, vae_latent_channels=4, do_normalize=False)
    pixels = torch.rand(1, 3, 16, 16)
    assert torch.equal(to_pixels(processor, pixels), pixels)
    assert to_pixels(processor, Image.fromarray(LEVELS)).min() == 0


def test_only_tensors_of_floating_point_are_latents(pipeline: Any) -> None:
    latents = torch.randn(1, 4, 8, 8) * 9
    assert to_pixels(pipeline.image_processor, latents) is latents or torch.equal(
        to_pixels(pipeline.image_processor, latents), latents
    )
    assert to_pixels(pipeline.image_processor, np.ones((16, 16, 4))).shape == (1, 3, 16, 16)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (LEVELS.astype(np.float32), ValueError, r"image has values from 0 to 255; .* whole ones are given as uint8"),
        (LEVELS.astype(np.float32) / 200, ValueError, "image has values from 0 to 1.275"),
        (LEVELS.astype(np.int64), TypeError, "image has values of torch.int64; give uint8"),
        (LEVELS > 9, TypeError, "image has values of torch.bool"),
        (np.zeros((16, 16, 3), object), TypeError, "image has values of the type object"),
        (np.full((16, 16, 3), np.inf), ValueError, "image has values that are not finite"),
        (LEVELS[..., :2], ValueError, "image has 2 channels; a picture has 3, and latents of this model have 4"),
        (np.zeros((0, 16, 3)), TypeError, "not an empty one"),
        ([], TypeError, "image must be a PIL image, .*, not an empty list"),
        (np.zeros((1, 1, 16, 16, 3)), TypeError, r"not one of the shape \(1, 1, 16, 16, 3\)"),
        ([LEVELS, LEVELS[:8]], ValueError, r"image differ in size, 16 x 8 and 16 x 16"),
        ([LEVELS, Image.fromarray(LEVELS)], TypeError, "image must be a PIL image, .* a list of them"),
        ([Image.new("RGB", (16, 16)), Image.new("RGB", (8, 8))], ValueError, "image differ in size"),
        (np.zeros((16, 16, 4)) - 1, ValueError, "image has values from -1 to -1"),
    ],
)
def test_arrays_that_are_no_pictures_are_refused(
    pipeline: Any, image: Any, error: type[Exception], message: str
) -> None:
    redraw = ImageToImagePipeline.from_pipe(pipeline)
    with pytest.raises(error, match=message):
        redraw("sun", image=image, num_inference_steps=2)


WHITE = np.arange(256).reshape(16, 16) > 99
MASKS = {
    "truth": WHITE,
    "truth tensor": torch.from_numpy(WHITE)[None],
    "0 and 1": WHITE.astype(np.int64),
    "0 and 1 in uint8": WHITE.astype(np.uint8),
    "0 to 255": WHITE.astype(np.uint8) * 255,
    "0 to 255 in int64": torch.from_numpy(WHITE * 255)[None, None],
    "0 to 255 in float": WHITE * 255.0,
    "big-endian": WHITE.astype(">i4") * 255,
    "0 to 65535": WHITE.astype(np.uint16) * 65535,
    "one channel": WHITE.astype(np.float32)[..., None],
    "batch": WHITE.astype(np.float32)[None, ..., None],
    "list": [WHITE],
    "image": Image.fromarray(WHITE),
    "grey": np.where(WHITE, 0.6, 0.4),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_of_all_types_are_the_same(pipeline: Any, name: str) -> None:
    painter = InpaintPipeline.from_pipe(pipeline)
    mask = to_mask(painter.mask_processor, MASKS[name])
    assert mask.shape == (1, 1, 16, 16)
    assert torch.equal(mask[0, 0], torch.from_numpy(WHITE).float())


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (np.full((16, 16), 0.5) * 3, ValueError, "mask_image has values from 1.5 to 1.5; give truth values"),
        (-WHITE.astype(np.float32), ValueError, "mask_image has values from -1 to -0"),
        (np.full((16, 16), np.nan), ValueError, "mask_image has values from nan to nan"),
        (np.full((16, 16), 1 << 20), ValueError, "mask_image has values from"),
        (LEVELS, ValueError, "mask_image has 3 channels; give one with a single channel"),
        (torch.zeros(1, 3, 16, 16), ValueError, "mask_image has 3 channels"),
        (np.zeros((16, 16), object), TypeError, "mask_image has values of the type object"),
        ([], TypeError, "mask_image must be a PIL image"),
    ],
)
def test_arrays_that_are_no_masks_are_refused(pipeline: Any, mask: Any, error: type[Exception], message: str) -> None:
    painter = InpaintPipeline.from_pipe(pipeline)
    with pytest.raises(error, match=message):
        painter("sun", image=Image.new("RGB", (16, 16)), mask_image=mask, num_inference_steps=2)


def test_modes_are_read_as_training_reads_them() -> None:
    for mode in ("L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I;16", "1"):
        image = Image.new(mode, (8, 8))
        assert upright_rgb(image) == to_rgb(image)


@pytest.mark.parametrize("channels", [4, 3])
def test_given_latents_of_the_masked_picture_are_taken_as_they_are(twins: Any, channels: int) -> None:
    unet = {"in_channels": 2 * channels + 1, "out_channels": channels}
    theirs = diffusers.StableDiffusionInpaintPipeline
    painter, _ = twins(InpaintPipeline, theirs, unet=unet, vae={"latent_channels": channels})
    seen: list[torch.Tensor] = []

    def look(view: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(tensors["masked_image_latents"])
        return tensors

    call = {"prompt": "sun", "image": photograph(None, 16, 16), "mask_image": mask_of(16, 16), "output_type": "pt"}
    call |= {"num_inference_steps": 2, "seed": 0, "callback_on_step_end": look}
    call["callback_on_step_end_tensor_inputs"] = ["masked_image_latents"]
    wanted = painter(**call).images
    assert torch.equal(painter(**call, masked_image_latents=seen[0]).images, wanted)
    assert torch.equal(seen[-1], seen[0])
    with pytest.raises(ValueError, match=rf"masked_image_latents must have the shape \(1, {channels}, 8, 8\)"):
        painter(**call, masked_image_latents=torch.zeros(1, channels, 4, 4))
