"""A tiny autoencoder in a pipeline: as its ``vae``, as in diffusers, and for previews."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from compare import largest_difference
from PIL import Image

from latentdiff import ImageToImagePipeline, InpaintPipeline, TextToImagePipeline
from latentdiff.models import AutoencoderTiny

TINY: dict[str, Any] = {
    "encoder_block_out_channels": (8, 8),
    "decoder_block_out_channels": (8, 8),
    "num_encoder_blocks": (1, 1),
    "num_decoder_blocks": (1, 1),
}
PICTURE = Image.linear_gradient("L").resize((16, 16)).convert("RGB")


@pytest.fixture
def tiny() -> Any:
    """Ours, and diffusers' with the same weights; loud enough that pictures are no plain colour."""
    ours, theirs = AutoencoderTiny(**TINY).eval(), diffusers.AutoencoderTiny(**TINY).eval()
    for weight in theirs.parameters():
        weight.data *= 2
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def test_pictures_are_diffusers(pair: Callable[..., Any], tiny: Any, tmp_path: Path) -> None:
    ours, theirs = pair()
    with_ours = TextToImagePipeline.from_pipe(ours, vae=tiny[0])
    parts = {**theirs.components, "vae": tiny[1], "requires_safety_checker": False}
    calls = {
        (TextToImagePipeline, diffusers.StableDiffusionPipeline): {},
        (ImageToImagePipeline, diffusers.StableDiffusionImg2ImgPipeline): {"image": PICTURE},
        (InpaintPipeline, diffusers.StableDiffusionInpaintPipeline): {"image": PICTURE, "mask_image": PICTURE},
    }
    for (own, peer), call in calls.items():
        one, other = own.from_pipe(with_ours), peer(**parts)
        for pipeline in (one, other):
            pipeline.set_progress_bar_config(disable=True)
        assert largest_difference(one, other, prompt="a red car", **call) < 1e-4
    with_ours.save_pretrained(tmp_path)
    again, peer = (
        TextToImagePipeline.from_pretrained(tmp_path),
        diffusers.StableDiffusionPipeline.from_pretrained(tmp_path),
    )
    assert (type(again.vae), type(peer.vae)) == (AutoencoderTiny, diffusers.AutoencoderTiny)
    assert largest_difference(again, peer, prompt="a red car") < 1e-4


def test_previews_are_what_it_decodes(pipeline: Any, tiny: Any) -> None:
    plain = pipeline("a red car", seed=0, num_inference_steps=3, output_type="np").images
    pipeline.preview_autoencoder = tiny[0]
    shown = []
    for progress in pipeline.stream("a red car", seed=0, num_inference_steps=3, output_type="np"):
        shown.append(progress.preview()[0])
        with torch.no_grad():
            wanted = tiny[0].decode(progress.clean).sample[0].permute(1, 2, 0) / 2 + 0.5
        np.testing.assert_allclose(np.asarray(shown[-1]) / 255, wanted.clamp(0, 1).numpy(), atol=0.6 / 255)
    assert [one.size for one in shown] == [(16, 16)] * 4
    assert np.array_equal(progress.output.images, plain)


def test_previews_of_other_latents_are_refused(pipeline: Any) -> None:
    pipeline.preview_autoencoder = AutoencoderTiny(**{**TINY, "latent_channels": 16})
    with pytest.raises(ValueError, match=r"preview_autoencoder has latents of 16 channels, 2 pixels .* another model"):
        pipeline("a red car", seed=0, num_inference_steps=1)
