import math

import pytest
import torch

from latentdiff.models.bottlenecks import DiagonalGaussianDistribution, GaussianBottleneck, VectorQuantizer


def test_kl_of_the_standard_normal_is_nothing_and_of_a_shifted_one_half_a_nat_an_element() -> None:
    moments = torch.zeros(2, 6, 4, 5)
    bottleneck = GaussianBottleneck()
    assert bottleneck(moments).losses["kl"] == 0
    moments[:, :3] = 1.0
    assert bottleneck(moments).losses["kl"] == pytest.approx(0.5 * 3 * 4 * 5)
    assert bottleneck(moments.half()).losses["kl"] == pytest.approx(0.5 * 3 * 4 * 5)


def test_gaussian_statistics_and_draws() -> None:
    moments = torch.cat([torch.full((8, 2, 16, 16), 3.0), torch.full((8, 2, 16, 16), 2 * math.log(0.5))], dim=1)
    drawn = GaussianBottleneck()(moments, generator=torch.Generator().manual_seed(0))
    assert drawn.statistics["latent_mean"] == pytest.approx(3.0, abs=0.05)
    assert drawn.statistics["latent_std"] == pytest.approx(0.5, abs=0.02)
    assert drawn.statistics["posterior_std"] == pytest.approx(0.5)
    again = GaussianBottleneck()(moments, generator=torch.Generator().manual_seed(0))
    assert torch.equal(drawn.latents, again.latents)
    assert torch.equal(GaussianBottleneck()(moments, sample=False).latents, moments[:, :2])


def test_log_variance_is_held_in_its_range() -> None:
    posterior = DiagonalGaussianDistribution(torch.full((1, 2, 1, 1), 1e4))
    assert posterior.logvar.item() == 20
    assert posterior.std.isfinite().all()


def test_quantizer_takes_the_nearest_code_and_passes_the_gradient_through() -> None:
    quantizer = VectorQuantizer(4, 2)
    with torch.no_grad():
        quantizer.embedding.weight.copy_(torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [9.0, 9.0]]))
    h = torch.tensor([[0.9, 0.2], [0.1, 0.8]]).T.reshape(1, 2, 1, 2).requires_grad_()
    output = quantizer(h)
    assert torch.equal(quantizer.nearest(h), torch.tensor([[[1, 2]]]))
    torch.testing.assert_close(output.latents[0, :, 0].T, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    distance = (0.1**2 + 0.2**2 + 0.1**2 + 0.2**2) / 4
    assert output.losses["commitment"].item() == pytest.approx(distance)
    assert output.losses["codebook"].item() == pytest.approx(0.25 * distance)
    assert output.statistics["perplexity"] == pytest.approx(2.0)
    assert output.statistics["codes_used"] == pytest.approx(0.5)

    weight = quantizer.embedding.weight
    through = torch.autograd.grad(output.latents.sum(), [h, weight], retain_graph=True, allow_unused=True)
    assert torch.equal(through[0], torch.ones_like(h))
    assert through[1] is None
    codebook = torch.autograd.grad(output.losses["codebook"], [h, weight], retain_graph=True, allow_unused=True)
    assert codebook[0] is None
    assert codebook[1][:3].abs().sum() > 0
    assert codebook[1][3].abs().sum() == 0  # a code that nothing is near is not drawn
    commitment = torch.autograd.grad(output.losses["commitment"], [h, weight], allow_unused=True)
    assert commitment[0].abs().min() > 0
    assert commitment[1] is None
