"""The pictures are diffusers' own: same components, latents and scheduler."""

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from compare import largest_difference
from diffusers.callbacks import SDCFGCutoffCallback

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' schedulers

ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
SCHEDULERS = {
    "ddim": lambda: diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
    "ddim-old-config": diffusers.DDIMScheduler,  # steps_offset 0 and clip_sample, which diffusers' pipeline changes
    "ddim-v-zero-snr": lambda: diffusers.DDIMScheduler(clip_sample=False, **ZERO_SNR),
    "ddpm": lambda: diffusers.DDPMScheduler(clip_sample=False),
    "dpm++": lambda: diffusers.DPMSolverMultistepScheduler(),
    "dpm++-v-zero-snr": lambda: diffusers.DPMSolverMultistepScheduler(**ZERO_SNR),
    "euler": lambda: diffusers.EulerDiscreteScheduler(),
    "euler-v-zero-snr": lambda: diffusers.EulerDiscreteScheduler(**ZERO_SNR),
    "euler-ancestral": lambda: diffusers.EulerAncestralDiscreteScheduler(),
    "heun": lambda: diffusers.HeunDiscreteScheduler(),
    "unipc": lambda: diffusers.UniPCMultistepScheduler(),
    "pndm": lambda: diffusers.PNDMScheduler(skip_prk_steps=True),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS.keys())
def test_same_pictures_with_every_scheduler(pair: Callable[..., Any], scheduler: Any) -> None:
    ours, theirs = pair(scheduler())
    call = {"prompt": ["a red car", "sun"], "negative_prompt": ["blue", ""], "eta": 0.5}
    assert largest_difference(ours, theirs, **call) < 1e-4


@pytest.mark.parametrize(
    "call",
    [
        {"guidance_scale": 1.0},
        {"guidance_scale": 0.0, "negative_prompt": "blue"},
        {"guidance_scale": 3.0, "guidance_rescale": 0.7},
        {"negative_prompt": "blue", "num_images_per_prompt": 3},
        {"prompt": "a red car and a very long line of other things besides"},
        {"height": 32, "width": 24},
        {"timesteps": [900, 600, 300, 1], "num_inference_steps": None},
        {},
    ],
    ids=str,
)
def test_same_pictures_with_every_option(pair: Callable[..., Any], call: dict[str, Any]) -> None:
    ours, theirs = pair(diffusers.DDPMScheduler(clip_sample=False) if "timesteps" in call else None)
    if "timesteps" not in call:
        call = {"num_inference_steps": 6, **call}
    assert largest_difference(ours, theirs, **{"prompt": "a red car", **call}) < 1e-4


def test_same_pictures_from_given_latents_and_embeddings(pair: Callable[..., Any], latents: torch.Tensor) -> None:
    ours, theirs = pair(diffusers.EulerDiscreteScheduler())
    embeds = torch.randn(2, 2, 12, 16, generator=torch.Generator().manual_seed(1))
    call = {"latents": latents, "prompt_embeds": embeds[0], "negative_prompt_embeds": embeds[1]}
    assert largest_difference(ours, theirs, **call) < 1e-4


def test_same_pictures_with_clip_skip(pair: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pair()
    if not hasattr(ours.text_encoder, "text_model"):  # diffusers 0.42 looks for it, transformers 5 has it no more
        monkeypatch.setattr(type(ours.text_encoder), "text_model", property(lambda self: self), raising=False)
    assert largest_difference(ours, theirs, prompt="a red car", negative_prompt="blue", clip_skip=1) < 1e-4
    plain, skipped = (ours("a red car", seed=0, output_type="pt", clip_skip=skip).images for skip in (None, 1))
    assert (plain - skipped).abs().max() > 1e-4


@pytest.mark.parametrize("use_mask", [True, False])
def test_same_pictures_with_bert(pair: Callable[..., Any], bert: dict[str, Any], use_mask: bool) -> None:
    bert["text_encoder"].config.use_attention_mask = use_mask
    ours, theirs = pair(text=bert)
    assert largest_difference(ours, theirs, prompt="a red car in the sun", negative_prompt="house") < 1e-4
    bert["text_encoder"].config.use_attention_mask = True


def test_same_pictures_with_diffusers_own_networks_in_ours(pair: Callable[..., Any]) -> None:
    ours, theirs = pair()
    borrowed = type(ours).from_pipe(theirs)
    borrowed.set_progress_bar_config(disable=True)
    assert borrowed.unet is theirs.unet
    assert largest_difference(borrowed, theirs, prompt="a red car") < 1e-6


def test_callbacks_see_and_change_the_same_tensors(pair: Callable[..., Any]) -> None:
    seen: dict[type, list[Any]] = {}

    def callback(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        seen.setdefault(type(pipeline), []).append((step, int(timestep), shapes, pipeline.guidance_scale))
        changed = {"latents": tensors["latents"] * 0.9}
        if step == 2:
            changed["prompt_embeds"] = tensors["prompt_embeds"].flip(0)
        return changed

    ours, theirs = pair()
    names = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    call = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": names}
    assert largest_difference(ours, theirs, prompt="a red car", **call) < 1e-4
    assert len(seen[type(ours)]) == 6
    assert seen[type(ours)] == seen[type(theirs)]


def test_diffusers_own_callbacks_work(pair: Callable[..., Any]) -> None:
    ours, theirs = pair()
    plain = {"prompt": "a red car", "seed": 7, "num_inference_steps": 6, "output_type": "pt"}
    callback = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=2)
    assert largest_difference(ours, theirs, prompt="a red car", callback_on_step_end=callback) < 1e-4
    cut = ours(**plain, callback_on_step_end=callback).images
    assert (cut - ours(**plain).images).abs().max() > 1e-4
