"""What our calls take beyond diffusers': scales for each image, intervals of guidance, variations, LoRA scales."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from latentdiff import ImageToImagePipeline, InpaintPipeline, TextToImagePipeline, UNet2DConditionModel
from latentdiff.diffusion.guidance import ClassifierFreeGuidance
from latentdiff.pipelines.core.call import spherical_mix

FEW = {"num_inference_steps": 3, "output_type": "np"}


def test_every_image_may_have_its_own_scale(pipeline: Any) -> None:
    both = pipeline(["a red car", "sun"], guidance_scale=[1.0, 6.0], seed=[3, 4], **FEW).images
    weak = pipeline("a red car", guidance_scale=1.0, seed=3, **FEW).images[0]
    strong = pipeline("sun", guidance_scale=6.0, seed=4, **FEW).images[0]
    np.testing.assert_allclose(both, np.stack([weak, strong]), atol=1e-5)
    four = pipeline(["a red car", "sun"], guidance_scale=[1.0, 6.0], seed=3, num_images_per_prompt=2, **FEW).images
    np.testing.assert_allclose(four[0], weak, atol=1e-5)
    np.testing.assert_allclose(four[3], pipeline("sun", guidance_scale=6.0, seed=6, **FEW).images[0], atol=1e-5)


def test_guidance_in_an_interval_saves_predictions(pipeline: Any) -> None:
    rows = []
    handle = pipeline.unet.conv_in.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    call = {"seed": 0, "guidance_scale": 5.0, **FEW}
    limited = pipeline("a red car", guidance_interval=(0.5, 5.0), **call).images
    assert rows == [1, 2, 1]  # at timesteps 667, 334 and 1 sigma is about 7, 1 and 0
    always = pipeline("a red car", guidance_interval=(0.0, 1e9), **call).images
    never = pipeline("a red car", guidance_interval=(50.0, 60.0), **call).images
    handle.remove()
    np.testing.assert_allclose(always, pipeline("a red car", **call).images, atol=1e-6)
    np.testing.assert_allclose(never, pipeline("a red car", **{**call, "guidance_scale": 1.0}).images, atol=1e-5)
    assert np.abs(limited - always).max() > 1e-4 < np.abs(limited - never).max()


def test_guidance_of_several_scales_is_that_of_each() -> None:
    torch.manual_seed(0)
    without, with_prompt = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    both = ClassifierFreeGuidance((0.5, 3.0), rescale=0.4)(without, with_prompt)
    for i, scale in enumerate((1.0, 3.0)):  # up to 1 the prompt is merely given
        alone = ClassifierFreeGuidance(scale, rescale=0.4)(without[i : i + 1], with_prompt[i : i + 1])
        torch.testing.assert_close(both[i : i + 1], alone)


def test_a_variation_lies_between_two_seeds(pipeline: Any) -> None:
    def draw(**call: Any) -> np.ndarray:
        return pipeline("a red car", **FEW, **call).images[0]

    first, second = draw(seed=1), draw(seed=2)
    near = draw(seed=1, variation_seed=2, variation_strength=0.2)
    assert 0 < np.abs(near - first).mean() < np.abs(near - second).mean()
    np.testing.assert_allclose(draw(seed=1, variation_seed=2, variation_strength=1.0), second, atol=1e-5)
    several = pipeline("a red car", seed=[1, 1], variation_seed=2, variation_strength=0.2,
                       num_images_per_prompt=2, **FEW).images  # fmt: skip
    np.testing.assert_allclose(several[0], near, atol=1e-5)
    assert np.abs(several[1] - near).max() > 1e-4


def test_a_spherical_mix_keeps_the_variance() -> None:
    a, b = torch.randn(2, 3, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    for share in (0.0, 0.3, 0.5, 1.0):
        mixed = spherical_mix(a, b, share)
        torch.testing.assert_close(mixed.std(dim=(1, 2, 3)), torch.ones(3), atol=0.03, rtol=0)
    torch.testing.assert_close(spherical_mix(a, b, 0.0), a)
    torch.testing.assert_close(spherical_mix(a, b, 1.0), b)
    torch.testing.assert_close(spherical_mix(a, a, 0.5), a)


def test_the_output_says_which_seed_drew_what(pipeline: Any) -> None:
    assert pipeline(["a red car", "sun"], seed=7, num_images_per_prompt=2, **FEW).seeds == [7, 8, 9, 10]
    assert pipeline("sun", seed=[5], **FEW).seeds == [5]
    assert pipeline("sun", **FEW).seeds is None


PLAIN = Image.new("RGB", (16, 16), "red")
MASK = Image.new("L", (16, 16), 255)


def test_a_seed_redraws_a_picture_whatever_the_batch(pipeline: Any) -> None:
    redraw, paint = ImageToImagePipeline.from_pipe(pipeline), InpaintPipeline.from_pipe(pipeline)
    for one, call in ((redraw, {"strength": 0.7}), (paint, {"mask_image": MASK, "strength": 0.9})):
        one.set_progress_bar_config(disable=True)
        call = {"image": PLAIN, "num_inference_steps": 5, "output_type": "np", **call}
        together = one(["a red car", "sun"], seed=3, **call).images
        np.testing.assert_allclose(together[1], one("sun", seed=4, **call).images[0], atol=1e-5)


def test_pipelines_change_into_each_other_without_copies(pipeline: Any) -> None:
    pipeline.register_defaults(num_inference_steps=3, guidance_scale=2.0)
    start = pipeline
    for kind in (ImageToImagePipeline, InpaintPipeline, TextToImagePipeline):
        start = kind.from_pipe(start)
        assert type(start) is kind
        assert start.unet is pipeline.unet
        assert start.text_encoder is pipeline.text_encoder
        assert start.defaults == {"num_inference_steps": 3, "guidance_scale": 2.0}
    start.set_progress_bar_config(disable=True)
    np.testing.assert_array_equal(
        start("sun", seed=1, output_type="np").images, pipeline("sun", seed=1, output_type="np").images
    )


def test_a_change_of_pipeline_keeps_the_precision(pipeline: Any, caplog: pytest.LogCaptureFixture) -> None:
    half = TextToImagePipeline(**{**pipeline.components, "unet": copy.deepcopy(pipeline.unet).to(torch.bfloat16)})
    caplog.clear()
    again = ImageToImagePipeline.from_pipe(half)
    assert (again.unet.dtype, again.vae.dtype) == (torch.bfloat16, torch.float32)
    assert not caplog.records
    assert ImageToImagePipeline.from_pipe(half, dtype=torch.float32).unet.dtype == torch.float32


REFUSED = [
    ({"image": None}, ValueError, "image is missing"),
    ({"image": "car.png"}, TypeError, "image must be a PIL image, .* not str"),
    ({"image": []}, TypeError, "image must be"),
    ({"image": [PLAIN, PLAIN]}, ValueError, "2 pictures were given as image for 1 prompts"),
    ({"image": torch.full((1, 3, 16, 16), torch.nan)}, ValueError, "values that are not finite"),
    ({"image": torch.zeros(1, 2, 16, 16)}, ValueError, "image has 2 channels; a picture has 3"),
    ({"strength": 1.5}, ValueError, r"strength must lie in \[0, 1\]"),
    ({"strength": 0.1}, ValueError, "strength=0.1 of 3 steps leaves none to run"),
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSED, ids=[str(i) for i in range(len(REFUSED))])
@pytest.mark.parametrize("kind", [ImageToImagePipeline, InpaintPipeline])
def test_bad_pictures_are_refused(
    pipeline: Any, kind: Any, call: dict[str, Any], error: type[Exception], message: str
) -> None:
    painter = kind.from_pipe(pipeline)
    mask = {"mask_image": MASK} if kind is InpaintPipeline else {}
    with pytest.raises(error, match=message):
        painter("sun", **{"image": PLAIN, "num_inference_steps": 3, **mask, **call})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"mask_image": None}, ValueError, "mask_image is missing"),
        ({"mask_image": 3}, TypeError, "mask_image must be a PIL image"),
        ({"mask_image": [MASK, MASK]}, ValueError, "2 pictures were given as mask_image"),
        ({"padding_mask_crop": 4, "mask_image": Image.new("L", (16, 16))}, ValueError, "nothing white"),
        ({"padding_mask_crop": 4, "mask_image": Image.new("L", (9, 16))}, ValueError, "must be the same"),
        ({"padding_mask_crop": -5}, ValueError, "padding_mask_crop must be a whole number from 0, not -5"),
        ({"padding_mask_crop": 4, "output_type": "np"}, ValueError, "padding_mask_crop needs a PIL image"),
        ({"image": torch.zeros(1, 4, 4, 4), "height": 16, "width": 16}, ValueError, "latents must have the shape"),
    ],
)
def test_bad_masks_are_refused(pipeline: Any, call: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        InpaintPipeline.from_pipe(pipeline)(
            "sun", **{"image": PLAIN, "mask_image": MASK, "num_inference_steps": 3, **call}
        )


def test_models_for_another_pipeline_are_refused(pipeline: Any) -> None:
    config = {key: value for key, value in pipeline.unet.config.items() if not key.startswith("_")}
    for channels in (9, 7):
        parts = {**pipeline.components, "unet": UNet2DConditionModel(**{**config, "in_channels": channels})}
        with pytest.raises(
            ValueError, match=rf"takes {channels} channels and the autoencoder's latents have 4.*Inpaint"
        ):
            ImageToImagePipeline(**parts)("sun", image=PLAIN)
    with pytest.raises(ValueError, match="takes 7 channels and the autoencoder's latents have 4 and 5 further"):
        InpaintPipeline(**parts)("sun", image=PLAIN, mask_image=MASK)


def test_pictures_are_turned_and_put_on_white(pipeline: Any) -> None:
    from latentdiff.pipelines.core.input_pictures import upright_rgb

    clear = Image.new("RGBA", (4, 2), (255, 0, 0, 0))
    assert upright_rgb(clear).getpixel((0, 0)) == (255, 255, 255)
    turned = Image.new("RGB", (4, 2))
    turned.getexif()[0x0112] = 6
    assert upright_rgb(turned).size == (2, 4)
    assert [one.mode for one in upright_rgb([Image.new("L", (2, 2)), Image.new("P", (2, 2))])] == ["RGB", "RGB"]


def test_fused_projections_draw_the_same(pipeline: Any) -> None:
    call = {"seed": 0, "guidance_scale": 5.0, **FEW}
    plain = pipeline("a red car", **call).images
    pipeline.fuse_qkv_projections()
    attentions = [module for module in pipeline.unet.modules() if hasattr(module, "joined_weight")]
    assert all(attention.joined_weight is not None for attention in attentions)
    np.testing.assert_allclose(pipeline("a red car", **call).images, plain, atol=1e-4)
    pipeline.unfuse_qkv_projections()
    assert all(attention.joined_weight is None for attention in attentions)
    np.testing.assert_array_equal(pipeline("a red car", **call).images, plain)
