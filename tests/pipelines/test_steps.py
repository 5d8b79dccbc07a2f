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
from latentdiff.pipelines.core.scheduler_names import SHORT_NAMES, change_scheduler, find_scheduler


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


T = 20


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("offset", [0, 1, 7])
@pytest.mark.parametrize("steps", [T, T - 1, T // 2])
def test_no_plan_leads_beyond_the_process(spacing: str, offset: int, steps: int) -> None:
    """Every scheduler plans steps of the process and takes them, or says that it cannot tell so many apart."""
    ours = diffusers.DDIMScheduler(
        num_train_timesteps=T, steps_offset=offset, timestep_spacing=spacing, clip_sample=False
    )
    for name in sorted(SHORT_NAMES.keys() - {"lcm", "tcd"}):
        sampler = Sampler.of(change_scheduler(ours, name))
        if steps == T and spacing != "trailing" and name in ("deis", "dpm++", "unipc"):
            with pytest.raises(ValueError, match=f"cannot tell {T} of {T} steps apart"):
                sampler.plan(steps, torch.device("cpu"))
            continue
        timesteps = sampler.plan(steps, torch.device("cpu"))
        assert 0 <= timesteps.min() <= timesteps.max() < T
        latents = sampler.from_noise(torch.ones(1, 1, 2, 2))
        options = sampler.step_options(torch.Generator().manual_seed(0), 0.0)
        for timestep in timesteps:
            sampler.scaled(latents, timestep)
            latents = sampler.step(latents * 0.1, timestep, latents, **options)
        assert latents.isfinite().all()


def test_all_steps_with_an_offset_are_all_steps() -> None:
    offset = Sampler.of(diffusers.DDIMScheduler(steps_offset=1)).plan(1000, torch.device("cpu"))
    assert offset.tolist() == list(range(999, -1, -1))
    few = Sampler.of(diffusers.DDIMScheduler(steps_offset=1)).plan(4, torch.device("cpu"))
    assert few.tolist() == [751, 501, 251, 1]


def test_own_timesteps_are_of_the_process(pipeline: Any) -> None:
    pipeline.scheduler = diffusers.LCMScheduler()
    for bad in (1000, -1):
        with pytest.raises(ValueError, match=r"timesteps must lie in \[0, 999\]"):
            pipeline("sun", timesteps=[bad, 10])
