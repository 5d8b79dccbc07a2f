"""The scale of latents: what is measured where it is known."""

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import VAE, autoencoder_settings

from latentdiff.codec import Codec
from latentdiff.models import AutoencoderKL, VQModel
from latentdiff.training.data import prepare_pictures
from latentdiff.training.trainers.latent_scale import measure_latents, spread


def gaussian(means: tuple[float, ...], std: float) -> AutoencoderKL:
    """An autoencoder whose posterior is the same for every picture; `means`: of its four channels."""
    model = AutoencoderKL(**VAE).eval().requires_grad_(False)
    assert model.quant_conv is not None
    model.quant_conv.weight.zero_()
    model.quant_conv.bias = torch.nn.Parameter(torch.tensor([*means, *(2 * math.log(std),) * 4]), requires_grad=False)
    return model


@pytest.fixture
def measured(pictures: Path, tmp_path: Path) -> Any:
    def measure(model: Any, **changes: Any) -> Any:
        settings = autoencoder_settings(pictures, tmp_path / "run", batch_size=3, **changes)
        return measure_latents(model, prepare_pictures(settings, condition="none"), settings)

    return measure


def test_draws_from_the_posterior_get_unit_deviation(measured: Any) -> None:
    """Channels around 0 and 4: deviation 2; with the posterior's own 1.5 the root of 4 + 2.25."""
    model = gaussian((0.0, 4.0, 0.0, 4.0), 1.5)
    found = measured(model)
    assert (found.mean, found.std) == pytest.approx((2.0, 2.5), rel=1e-6)
    assert model.config.scaling_factor == pytest.approx(0.4)
    assert model.config.shift_factor is None
    drawn = Codec(model).encode(torch.zeros(1, 3, 64, 64), torch.Generator().manual_seed(0), 8)
    assert float(drawn.std()) == pytest.approx(1.0, abs=0.02)


def test_a_shift_centres_them(measured: Any) -> None:
    model = gaussian((0.0, 4.0, 0.0, 4.0), 1.5)
    measured(model, latent_shift=True)
    assert (model.config.shift_factor, model.config.scaling_factor) == pytest.approx((2.0, 0.4))
    drawn = Codec(model).encode(torch.zeros(1, 3, 64, 64), torch.Generator().manual_seed(0), 8)
    assert (float(drawn.mean()), float(drawn.std())) == pytest.approx((0.0, 1.0), abs=0.02)


def test_a_shift_is_recommended_where_it_matters(measured: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    measured(gaussian((1.0,) * 4, 20.0))
    assert "latent_shift=true" not in caplog.text
    measured(gaussian((3.0,) * 4, 20.0))
    assert "0.15 deviations away from 0; latent_shift=true would" in caplog.text
    assert "ignore" in caplog.text


def test_latents_before_codes_are_measured(measured: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    model = VQModel(**VAE, num_vq_embeddings=4).eval().requires_grad_(False)
    model.quant_conv.weight.zero_()
    model.quant_conv.bias.copy_(torch.tensor([-1.0, 1.0, 3.0, 5.0]))
    found = measured(model)
    assert (found.mean, found.std) == pytest.approx((2.0, math.sqrt(5)))
    assert model.config.scaling_factor == pytest.approx(1 / math.sqrt(5))
    assert "latent_shift" not in caplog.text


def test_latents_that_say_nothing(measured: Any, caplog: pytest.LogCaptureFixture) -> None:
    for value in (0.0, float("nan")):
        caplog.clear()
        model = VQModel(**VAE, num_vq_embeddings=4).eval().requires_grad_(False)
        model.quant_conv.weight.zero_()
        model.quant_conv.bias.fill_(value)
        measured(model)
        assert model.config.scaling_factor == VAE["scaling_factor"]
        assert "no scale suits them" in caplog.text


def test_all_elements_count_alike(measured: Any) -> None:
    """Ten pictures in chunks of three, against torch's own deviation of all latents at once."""
    torch.manual_seed(1)
    model = VQModel(**VAE, num_vq_embeddings=4).eval()
    seen: list[torch.Tensor] = []
    model.quant_conv.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    found = measured(model)
    together = torch.cat(seen).double()
    assert len(together) == 10
    assert (found.mean, found.std) == pytest.approx((float(together.mean()), float(together.std(correction=0))))


def test_pictures_are_evenly_spread() -> None:
    numbers: list[Any] = list(range(10))
    assert spread(numbers, 4) == [0, 2, 5, 7]
    assert spread(numbers, 100) == numbers
