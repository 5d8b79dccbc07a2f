"""Image-to-image, inpainting, super-resolution and variations draw what diffusers' pipelines draw."""

from collections.abc import Callable
from functools import partial
from typing import Any

import diffusers
import pytest
import torch
from compare import largest_difference
from PIL import Image, ImageDraw
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from latentdiff import (
    ImageToImagePipeline,
    ImageVariationPipeline,
    InpaintPipeline,
    SuperResolutionPipeline,
    TextToImagePipeline,
)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' schedulers

Twins = Callable[..., tuple[Any, Any]]

SCHEDULERS = {
    "ddim": lambda: diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
    "ddpm": lambda: diffusers.DDPMScheduler(clip_sample=False),
    "dpm++": lambda: diffusers.DPMSolverMultistepScheduler(),
    "euler": lambda: diffusers.EulerDiscreteScheduler(),
    "euler-ancestral": lambda: diffusers.EulerAncestralDiscreteScheduler(),
    "heun": lambda: diffusers.HeunDiscreteScheduler(),
    "unipc": lambda: diffusers.UniPCMultistepScheduler(),
    "pndm": lambda: diffusers.PNDMScheduler(skip_prk_steps=True),
}
every_scheduler = pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS.keys())
PAINTER = {"in_channels": 9}


def picture(size: tuple[int, int] = (16, 16), colour: str = "red") -> Image.Image:
    image = Image.linear_gradient("L").resize(size).convert("RGB")
    ImageDraw.Draw(image).ellipse((2, 3, size[0] // 2, size[1] - 5), fill=colour)
    return image


def ours_alone(call: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A call as diffusers takes it, and what only ours takes."""
    mode = {name: value for name, value in call.items() if name == "resize_mode"}
    return {name: value for name, value in call.items() if name not in mode}, mode


def mask(size: tuple[int, int] = (16, 16)) -> Image.Image:
    image = Image.new("L", size, 0)
    image.paste(255, (size[0] // 4, size[1] // 4, size[0] * 3 // 4, size[1] - 1))
    return image


@every_scheduler
def test_image_to_image_with_every_scheduler(twins: Twins, scheduler: Any) -> None:
    ours, theirs = twins(ImageToImagePipeline, diffusers.StableDiffusionImg2ImgPipeline, scheduler())
    call = {"prompt": ["a red car", "sun"], "negative_prompt": ["blue", ""], "eta": 0.5}
    pictures = [picture(), picture(colour="blue")]
    assert largest_difference(ours, theirs, image=pictures, strength=0.6, **call) < 1e-4


@pytest.mark.parametrize(
    "call",
    [
        {"guidance_scale": 1.0},
        {"strength": 1.0, "num_images_per_prompt": 3},
        {"strength": 0.35},
        {"image": picture((27, 18)), "resize_mode": "default"},
        {"image": torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(0))},
        {"image": torch.rand(1, 16, 16, 3, generator=torch.Generator().manual_seed(0)).numpy()},
        {"image": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))},
        {"timesteps": [900, 600, 300, 1], "num_inference_steps": None, "strength": 0.5},
        {"generator": [torch.Generator().manual_seed(i) for i in range(2)], "num_images_per_prompt": 2},
    ],
    ids=lambda call: "-".join(call),
)
def test_image_to_image_with_every_option(twins: Twins, call: dict[str, Any]) -> None:
    scheduler = diffusers.DDPMScheduler(clip_sample=False) if "timesteps" in call else None
    ours, theirs = twins(ImageToImagePipeline, diffusers.StableDiffusionImg2ImgPipeline, scheduler)
    call, mode = ours_alone(call)
    if "generator" in call:  # each draw uses them up
        pictures = []
        for pipeline in (ours, theirs):
            fresh = {**call, "generator": [torch.Generator().manual_seed(i) for i in range(2)]}
            pictures.append(pipeline("a car", image=picture(), output_type="pt", num_inference_steps=6, **fresh).images)
        assert (pictures[0] - pictures[1]).abs().max() < 1e-4
        return
    call = {"prompt": "a red car", "image": picture(), **call}
    assert largest_difference(partial(ours, **mode), theirs, **call) < 1e-4


@every_scheduler
@pytest.mark.parametrize("unet", [{}, PAINTER], ids=["plain", "painter"])
def test_inpainting_with_every_scheduler(twins: Twins, scheduler: Any, unet: dict[str, Any]) -> None:
    ours, theirs = twins(InpaintPipeline, diffusers.StableDiffusionInpaintPipeline, scheduler(), unet)
    call = {"prompt": ["a red car", "sun"], "negative_prompt": ["blue", ""], "eta": 0.5}
    pictures, masks = [picture(), picture(colour="blue")], [mask(), mask()]
    assert largest_difference(ours, theirs, image=pictures, mask_image=masks, **call) < 1e-4


@pytest.mark.parametrize("unet", [{}, PAINTER], ids=["plain", "painter"])
@pytest.mark.parametrize(
    "call",
    [
        {"guidance_scale": 1.0},
        {"strength": 0.5},
        {"num_images_per_prompt": 2, "strength": 0.7},
        {"height": 32, "width": 24, "resize_mode": "default"},
        {"height": 32, "width": 32},
        {"latents": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))},
        {"mask_image": torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(0))},
    ],
    ids=lambda call: "-".join(call),
)
def test_inpainting_with_every_option(twins: Twins, call: dict[str, Any], unet: dict[str, Any]) -> None:
    ours, theirs = twins(InpaintPipeline, diffusers.StableDiffusionInpaintPipeline, unet=unet)
    plain = {"prompt": "a red car", "image": picture(), "mask_image": mask()}
    call, mode = ours_alone(call)
    assert largest_difference(partial(ours, **mode), theirs, **{**plain, **call}) < 1e-4


def test_a_part_is_painted_and_put_back(twins: Twins) -> None:
    ours, theirs = twins(InpaintPipeline, diffusers.StableDiffusionInpaintPipeline)
    large, hole = picture((60, 44)), Image.new("L", (60, 44), 0)
    hole.paste(255, (30, 20, 40, 28))
    images = []
    for pipeline in (ours, theirs):
        call = {"padding_mask_crop": 4, "num_inference_steps": 3, "generator": torch.Generator().manual_seed(2)}
        images.append(pipeline("sun", image=large, mask_image=hole, **call).images[0])
    assert images[0].size == (60, 44)
    difference = torch.tensor(list(images[0].tobytes())).float() - torch.tensor(list(images[1].tobytes())).float()
    assert difference.abs().max() <= 1
    assert images[0].getpixel((3, 3)) == large.getpixel((3, 3))


UPSCALER = {
    "in_channels": 7,
    "num_class_embeds": 1000,
    "only_cross_attention": (True, False),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}


@every_scheduler
def test_super_resolution_with_every_scheduler(twins: Twins, scheduler: Any) -> None:
    ours, theirs = twins(
        SuperResolutionPipeline,
        diffusers.StableDiffusionUpscalePipeline,
        scheduler(),
        UPSCALER,
        vae={"scaling_factor": 0.08333},
        low_res_scheduler=diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
    )
    call = {"prompt": ["a red car", "sun"], "image": [picture(), picture(colour="blue")], "eta": 0.5}
    assert largest_difference(ours, theirs, negative_prompt=["blue", ""], noise_level=50, **call) < 1e-4


def test_super_resolution_of_a_tensor(twins: Twins) -> None:
    low = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    ours, theirs = twins(
        *(SuperResolutionPipeline, diffusers.StableDiffusionUpscalePipeline, None, UPSCALER),
        vae={"scaling_factor": 0.08333},
        low_res_scheduler=low,
    )
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))  # from 0 to 1
    assert largest_difference(ours, theirs, prompt="a red car", image=image) < 1e-4


def test_variations_are_diffusers(twins: Twins) -> None:
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=16,
    )
    parts = {
        "image_encoder": CLIPVisionModelWithProjection(config).eval(),
        "feature_extractor": CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
    }
    ours, theirs = twins(ImageVariationPipeline, diffusers.StableDiffusionImageVariationPipeline, **parts)
    call = {"image": [picture((40, 30)), picture((16, 16), "blue")], "num_images_per_prompt": 2, "guidance_scale": 3.0}
    assert largest_difference(ours, theirs, **call) < 1e-4

    def callback(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"prompt_embeds": tensors["prompt_embeds"].flip(0)} if step == 2 else tensors

    names = [name for name in ours._callback_tensor_inputs if name in ("latents", "prompt_embeds")]
    shown = list(ours.stream(**call, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names, seed=0))
    plain = list(ours.stream(**call, seed=0))
    assert torch.equal(shown[2].latents, plain[2].latents)
    assert (shown[3].latents - plain[3].latents).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["text", "image", "paint"])
def test_models_that_guide_themselves(twins: Twins, kind: str) -> None:
    classes = {
        "text": (TextToImagePipeline, diffusers.StableDiffusionPipeline, {}),
        "image": (ImageToImagePipeline, diffusers.StableDiffusionImg2ImgPipeline, {"image": picture()}),
        "paint": (
            InpaintPipeline,
            diffusers.StableDiffusionInpaintPipeline,
            {"image": picture(), "mask_image": mask()},
        ),
    }
    ours, theirs, more = classes[kind]
    pair = twins(ours, theirs, diffusers.LCMScheduler(), {"time_cond_proj_dim": 12})
    rows = []
    handle = pair[0].unet.conv_in.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    assert largest_difference(*pair, prompt="a red car", guidance_scale=8.5, num_inference_steps=4, **more) < 1e-4
    handle.remove()
    assert set(rows) == {1}  # no second prediction
