"""Noise and schedulers without torch: those of torch and diffusers."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from latentdiff.pipelines.runtime.light.noise import NoiseSource
from latentdiff.pipelines.runtime.light.schedulers import KNOWN, alphas_cumprod


@pytest.mark.parametrize(
    "shape", [(1, 4, 2, 2), (1, 4, 16, 16), (1, 4, 12, 20), (1, 3, 5, 7), (17,), (31,), (1, 4, 64, 64)]
)
def test_noise_is_torchs(shape: tuple[int, ...]) -> None:
    for seed in (0, 7, 123456789, 2**32 - 1, 2**32 + 5, 2**63 - 1):
        generator, ours = torch.Generator().manual_seed(seed), NoiseSource(seed)
        for _ in range(3):  # and goes on as torch's does
            expected = torch.randn(shape, generator=generator).numpy()
            np.testing.assert_allclose(ours.draw(shape), expected, atol=2e-6, rtol=0)


def test_fewer_numbers_than_a_block_are_refused() -> None:
    with pytest.raises(ValueError, match="noise of 15 numbers is drawn by torch only"):
        NoiseSource(0).draw((3, 5))


def configs() -> Iterator[tuple[str, dict[str, Any]]]:
    """Names of schedulers with configs that are known here."""
    for name in KNOWN:
        for prediction in ("epsilon", "v_prediction", "sample"):
            if (name, prediction) == ("EulerDiscreteScheduler", "sample"):
                continue
            for spacing in ("leading", "trailing", "linspace"):
                zero = prediction == "v_prediction" and name != "EulerDiscreteScheduler"
                one = {"prediction_type": prediction, "timestep_spacing": spacing, "rescale_betas_zero_snr": zero}
                yield name, {**one, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
        yield name, {"steps_offset": 1, "prediction_type": "v_prediction"}
        yield name, {"trained_betas": np.linspace(1e-4, 0.02, 100).tolist(), "num_train_timesteps": 100}
    for name in ("DDIMScheduler", "LCMScheduler"):
        yield name, {"clip_sample": True, "clip_sample_range": 0.7, "set_alpha_to_one": False}


@pytest.mark.parametrize(("name", "config"), list(configs()))
def test_schedulers_are_those_of_diffusers(name: str, config: dict[str, Any]) -> None:
    theirs = getattr(diffusers, name)(**config)
    ours_of = KNOWN[name]
    alphas = theirs.alphas_cumprod.numpy()
    np.testing.assert_allclose(alphas_cumprod({**ours_of.usual, **config}), alphas, atol=1e-6, rtol=0)
    for steps in (1, 4, 7):
        ours = ours_of(config, steps)
        theirs.set_timesteps(steps)
        np.testing.assert_allclose(ours.timesteps, theirs.timesteps.numpy(), rtol=1e-6)
        latents = NoiseSource(1).draw((2, 4, 8, 8)) * ours.scale
        assert ours.scale == pytest.approx(float(theirs.init_noise_sigma), rel=1e-6)
        peer = torch.from_numpy(latents)
        generator, own = torch.Generator().manual_seed(3), partial(NoiseSource(3).draw, (2, 4, 8, 8))
        for i, timestep in enumerate(theirs.timesteps):
            seen = theirs.scale_model_input(peer, timestep)
            np.testing.assert_allclose(ours.scaled(latents, i), seen.numpy(), atol=1e-6, rtol=1e-6)
            prediction = np.tanh(ours.scaled(latents, i)) * 0.9
            options = {"generator": generator} if name == "LCMScheduler" else {}
            peer = theirs.step(torch.from_numpy(prediction), timestep, peer, return_dict=False, **options)[0]
            latents = ours.step(prediction, i, latents, own)
            assert latents.dtype == np.float32
            largest = max(1.0, float(abs(latents).max()))
            np.testing.assert_allclose(latents / largest, peer.numpy() / largest, atol=1e-6, rtol=0)
            latents = peer.numpy()


def test_what_is_not_known_is_not_tried() -> None:
    for name, config, steps in (
        ("DDIMScheduler", {"thresholding": True}, 4),
        ("DDIMScheduler", {"beta_schedule": "squaredcos_cap_v2"}, 4),
        ("DDIMScheduler", {"something": "new"}, 4),
        ("DDIMScheduler", {"steps_offset": 1}, 1000),
        ("DDIMScheduler", {}, 1001),
        ("LCMScheduler", {}, 51),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, 4),
        ("EulerDiscreteScheduler", {"prediction_type": "sample"}, 4),
        ("EulerDiscreteScheduler", {"rescale_betas_zero_snr": True}, 4),
    ):
        with pytest.raises(NotImplementedError):
            KNOWN[name](config, steps)
