"""The steps by themselves."""

from typing import Any

import diffusers
import pytest
import torch

from latentdiff.codec import Codec
from latentdiff.conditioning import Conditioning, GuidedConditioning
from latentdiff.diffusion.guidance import ClassifierFreeGuidance
from latentdiff.pipelines.core.denoiser import GuidedDenoiser
from latentdiff.pipelines.core.sampling import Sampler, denoise
from latentdiff.pipelines.core.schedulers import SHORT_NAMES, change_scheduler, find_scheduler


def test_the_loop_can_be_watched_and_changed(networks: Any, latents: torch.Tensor) -> None:
    sampler = Sampler(diffusers.DDIMScheduler())
    timesteps = sampler.plan(4, torch.device("cpu"))
    conditioning = GuidedConditioning(Conditioning(states=torch.zeros(2, 12, 16)))
    denoiser = GuidedDenoiser(networks[0]["unet"], conditioning, ClassifierFreeGuidance(1.0))
    with torch.no_grad():
        for progress in denoise(denoiser, sampler, latents, timesteps):
            if progress.step == 2:
                progress.latents = torch.zeros_like(latents)
                break
        assert int(progress.timestep) == int(timesteps[2])
        last = list(denoise(denoiser, sampler, progress.latents, timesteps[3:]))
    assert len(last) == 1
    assert last[0].latents.shape == latents.shape


def test_new_guidance_and_text_count_from_the_next_step(networks: Any, latents: torch.Tensor) -> None:
    embeds = torch.randn(4, 12, 16)
    negative, positive = (Conditioning(states=half) for half in embeds.chunk(2))
    both = GuidedConditioning(positive, negative)
    denoiser = GuidedDenoiser(networks[0]["unet"], both, ClassifierFreeGuidance(5.0))
    time = torch.tensor(500)
    with torch.no_grad():
        guided = denoiser(latents, time)
        denoiser.conditioning = both.with_joint_states(embeds[2:])
        denoiser.guidance = ClassifierFreeGuidance(1.0)
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
        assert Codec(vae).decode(torch.randn(2, 3, 8, 8)).shape == (2, 3, 8, 8)


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
            scaled = Codec(vae).encode(pixels, generator, 1)
            torch.testing.assert_close(scaled, (drawn - taken) * 2.0)
        torch.testing.assert_close(Codec(vae).decode(scaled), vae.decode(drawn).sample, rtol=1e-5, atol=1e-5)
