"""Drawing step by step: progress, previews, the filmstrip, and stopping early."""

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from latentdiff import ImageToImagePipeline
from latentdiff.codec import Codec
from latentdiff.diffusion import process_of
from latentdiff.pipelines import filmstrip
from latentdiff.pipelines.core.previews import LatentPreview
from latentdiff.pipelines.core.scheduler_names import SHORT_NAMES, change_scheduler

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' schedulers


def test_a_stream_ends_in_what_a_call_gives(pipeline: Any) -> None:
    call = {"seed": 3, "num_inference_steps": 4, "output_type": "np"}
    seen = list(pipeline.stream(["a red car", "sun"], **call))
    assert [one.step for one in seen] == [0, 1, 2, 3, 3]
    assert [one.output is None for one in seen] == [True] * 4 + [False]
    assert {one.total for one in seen} == {4}
    assert seen[-1].output.seeds == [3, 4]
    np.testing.assert_array_equal(seen[-1].output.images, pipeline(["a red car", "sun"], **call).images)
    assert seen[0].latents.shape == seen[0].clean.shape == (2, 4, 8, 8)
    torch.testing.assert_close(seen[3].clean, seen[3].latents)  # DDIM's last step is its picture
    assert (seen[0].clean - seen[3].clean).abs().max() > 1e-3


def test_a_stream_of_tuples(pipeline: Any) -> None:
    last = list(pipeline.stream("sun", seed=3, num_inference_steps=2, return_dict=False))[-1]
    assert isinstance(last.output.images[0], Image.Image)


def test_whoever_stops_early_stops_the_drawing(pipeline: Any) -> None:
    calls = []
    handle = pipeline.unet.conv_in.register_forward_hook(lambda *_: calls.append(1))
    for progress in pipeline.stream("a red car", num_inference_steps=9):
        if progress.step == 1:
            break
    handle.remove()
    assert len(calls) == 2
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()


def test_gradients_stay_on_between_steps(pipeline: Any) -> None:
    for progress in pipeline.stream("a red car", num_inference_steps=2):
        assert torch.is_grad_enabled()
        assert not progress.latents.requires_grad


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (name, kind)
        for name in SHORT_NAMES
        for kind in ("epsilon", "v_prediction", "sample")
        if name != "lcm"  # changes the picture by boundary conditions
        and (name, kind) not in [(one, "sample") for one in ("euler-ancestral", "kdpm2", "kdpm2-ancestral")]
        and (name != "pndm" or kind == "epsilon")  # it mixes predictions of several steps
    ],
)
def test_the_clean_latents_of_a_perfect_network_are_the_picture(name: str, kind: str) -> None:
    """A network that knows the picture says what it must; then every step's clean latents are the picture."""
    from latentdiff.diffusion.guidance import ClassifierFreeGuidance
    from latentdiff.pipelines.core.sampling import Sampler, denoise

    picture = torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    scheduler = change_scheduler(diffusers.DDIMScheduler(prediction_type=kind, clip_sample=False), name)

    sampler = Sampler(scheduler)
    process = sampler.process

    def network(scaled: torch.Tensor, timestep: Any, guided: bool) -> torch.Tensor:
        kept = process.alpha_bar(timestep).float()
        noise = (scaled - kept.sqrt() * picture) / (1 - kept).sqrt()
        return {"epsilon": noise, "v_prediction": kept.sqrt() * noise - (1 - kept).sqrt() * picture}.get(kind, picture)

    network.guidance = ClassifierFreeGuidance(1.0)  # type: ignore[attr-defined]
    timesteps = sampler.plan(7, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(picture.shape, generator=generator) * scheduler.init_noise_sigma
    options = sampler.step_options(generator, 0.0)
    for state in denoise(network, sampler, start, timesteps, **options):  # type: ignore[arg-type]
        torch.testing.assert_close(state.clean, picture, atol=2e-3, rtol=0)
    torch.testing.assert_close(state.latents, picture, atol=0.1, rtol=0)


def test_noise_levels_between_timesteps_are_eulers() -> None:
    scheduler = diffusers.EulerDiscreteScheduler(timestep_spacing="linspace")
    scheduler.set_timesteps(7)
    levels = [process_of(scheduler).noise_level(timestep) for timestep in scheduler.timesteps]
    np.testing.assert_allclose(levels, scheduler.sigmas[:-1], rtol=1e-4)
    with pytest.raises(ValueError, match="EDMEulerScheduler has no noise levels"):
        process_of(diffusers.EDMEulerScheduler())


def test_previews_have_the_pictures_colours(pipeline: Any) -> None:
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    previews = LatentPreview(pipeline.vae)(latents)
    assert [image.size for image in previews] == [(8, 8)] * 3
    with torch.no_grad():
        pixels = torch.nn.functional.avg_pool2d(Codec(pipeline.vae).decode(latents), 2) / 2 + 0.5
    shown = torch.stack([torch.tensor(np.asarray(image)) for image in previews]).permute(0, 3, 1, 2) / 255
    unexplained = (shown - pixels.clamp(0, 1)).var() / pixels.var()
    assert unexplained < 0.5


def test_previews_decode_now_and_then_only(pipeline: Any) -> None:
    decoded = []
    handle = pipeline.vae.decoder.register_forward_hook(lambda *_: decoded.append(1))
    for progress in pipeline.stream("a red car", num_inference_steps=12):
        if progress.output is None:
            progress.preview()
    handle.remove()
    assert len(decoded) == 4 + 1  # at the 1st, 2nd, 4th and 8th preview, and the picture itself


def test_a_filmstrip_has_a_row_for_each_image(pipeline: Any) -> None:
    strip, output = filmstrip(pipeline.stream(["a red car", "sun"], seed=0, num_inference_steps=6), frames=3)
    assert strip.size == (4 * 18 - 2, 2 * 18 - 2)
    assert len(output.images) == 2
    right = strip.crop((3 * 18, 0, 3 * 18 + 16, 16))
    assert right.tobytes() == output.images[0].tobytes()
    strip_of_all, _ = filmstrip(pipeline.stream("sun", num_inference_steps=2), frames=2)
    small, _ = filmstrip(pipeline.stream("sun", num_inference_steps=2), frames=8, side=8)
    assert small.height == 8
    with pytest.raises(ValueError, match="at least one frame"):
        filmstrip(pipeline.stream("sun"), frames=0)
    many, _ = filmstrip(pipeline.stream("sun", num_inference_steps=2), frames=10**12)  # at most one for each step
    assert many.size == strip_of_all.size
    with pytest.raises(ValueError, match="output_type='pil'"):
        filmstrip(pipeline.stream("sun", num_inference_steps=2, output_type="np"))


def test_other_pipelines_stream_too(pipeline: Any) -> None:
    redraw = ImageToImagePipeline.from_pipe(pipeline)
    seen = list(redraw.stream("sun", image=Image.new("RGB", (16, 16)), strength=0.5, num_inference_steps=4, seed=0))
    assert [one.step for one in seen] == [0, 1, 1]
