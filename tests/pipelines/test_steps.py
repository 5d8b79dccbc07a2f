"""The steps by themselves."""

from typing import Any

import diffusers
import pytest
import torch

from latentdiff.diffusion.guidance import ClassifierFreeGuidance
from latentdiff.pipelines import steps
from latentdiff.pipelines.schedulers import SHORT_NAMES, change_scheduler, find_scheduler


def test_the_loop_can_be_watched_and_changed(networks: Any, latents: torch.Tensor) -> None:
    scheduler = diffusers.DDIMScheduler()
    timesteps = steps.set_timesteps(scheduler, 4, torch.device("cpu"))
    denoiser = steps.GuidedDenoiser(networks[0]["unet"], torch.zeros(2, 12, 16), ClassifierFreeGuidance(1.0))
    with torch.no_grad():
        for state in steps.denoise(denoiser, scheduler, latents, timesteps):
            if state.index == 2:
                state.latents = torch.zeros_like(latents)
                break
        assert int(state.timestep) == int(timesteps[2])
        last = list(steps.denoise(denoiser, scheduler, state.latents, timesteps[3:]))
    assert len(last) == 1
    assert last[0].latents.shape == latents.shape


def test_new_guidance_and_text_count_from_the_next_step(networks: Any, latents: torch.Tensor) -> None:
    embeds = torch.randn(4, 12, 16)
    denoiser = steps.GuidedDenoiser(networks[0]["unet"], embeds, ClassifierFreeGuidance(5.0))
    time = torch.tensor(500)
    with torch.no_grad():
        guided = denoiser(latents, time)
        denoiser.prompt_embeds, denoiser.guidance = embeds[2:], ClassifierFreeGuidance(1.0)
        plain = denoiser(latents, time)
        expected = networks[1]["unet"](latents, time, embeds[2:]).sample
    torch.testing.assert_close(plain, expected, atol=1e-5, rtol=1e-5)
    assert (guided - plain).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["ddim", "DDIM", "DDIMScheduler", "dpm++", "DPMSolverMultistep", "euler_ancestral"])
def test_schedulers_are_found_by_any_usual_name(name: str) -> None:
    assert hasattr(diffusers, find_scheduler(name))


@pytest.mark.filterwarnings("ignore")
def test_all_short_names_are_diffusers_classes() -> None:
    for class_name in SHORT_NAMES.values():
        changed = change_scheduler(diffusers.DDIMScheduler(beta_end=0.03), class_name)
        assert type(changed).__name__ == class_name
        assert changed.config.beta_end == 0.03


def test_unknown_schedulers_are_refused_with_a_list() -> None:
    with pytest.raises(ValueError, match=r"unknown scheduler 'magic'; the schedulers are ddim, ddpm, .*unipc"):
        find_scheduler("magic")


def test_a_scheduler_that_would_draw_wrongly_is_refused() -> None:
    zero_snr = diffusers.DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    with pytest.raises(ValueError, match=r"PNDMScheduler cannot draw with this model.*ddim"):
        change_scheduler(zero_snr, "pndm")
    assert change_scheduler(zero_snr, "euler").config.rescale_betas_zero_snr


def test_a_vq_autoencoder_decodes() -> None:
    from latentdiff import VQModel

    vae = VQModel(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=3, num_vq_embeddings=8, scaling_factor=2.0
    )
    with torch.no_grad():
        assert steps.decode(vae, torch.randn(2, 3, 8, 8)).shape == (2, 3, 8, 8)


@pytest.mark.parametrize("shift", [None, 0.75])
def test_latents_are_shifted_and_scaled_both_ways(shift: float | None) -> None:
    """As the pipelines of Stable Diffusion 3 do it: (latents - shift) * scale, and back."""
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=4, scaling_factor=2.0, shift_factor=shift
    ).eval()
    pixels, taken = torch.rand(1, 3, 16, 16) * 2 - 1, shift or 0.0
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
        drawn = posterior.sample(torch.Generator().manual_seed(3))
        for generator in (torch.Generator().manual_seed(3), [torch.Generator().manual_seed(3)]):
            scaled = steps.encode(vae, pixels, generator, 1)
            torch.testing.assert_close(scaled, (drawn - taken) * 2.0)
        torch.testing.assert_close(steps.decode(vae, scaled), vae.decode(drawn).sample, rtol=1e-5, atol=1e-5)
