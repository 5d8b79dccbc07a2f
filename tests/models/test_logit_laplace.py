"""DALL-E's distribution of pixel values: against PyTorch's distributions, and as a model's output."""

from pathlib import Path

import pytest
import torch
from small import CODER
from torch.distributions import AffineTransform, Laplace, SigmoidTransform, TransformedDistribution

from latentdiff.models import GumbelVQModel, VQModel
from latentdiff.models.codes import NARROWEST, LogitLaplace


def test_likelihood_is_that_of_a_transformed_laplace() -> None:
    location, log_width = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64)
    pixels = torch.rand(2, 3, 4, 4, dtype=torch.float64) * 2 - 1
    found = LogitLaplace(torch.cat([location, log_width], dim=1))
    base = Laplace(location, log_width.exp() + NARROWEST)
    squeezed = TransformedDistribution(base, [SigmoidTransform()])
    expected = -squeezed.log_prob(0.1 + 0.8 * (pixels + 1) / 2)
    torch.testing.assert_close(found.nll(pixels), expected.float(), atol=1e-5, rtol=1e-5)
    middle = AffineTransform(-1.25, 2.5)(torch.sigmoid(location))  # (x - 0.1) / 0.8 of [0, 1], as [-1, 1]
    torch.testing.assert_close(found.pixels, middle.float())


def test_likelihood_is_bounded_where_all_is_known() -> None:
    """A plain surface: the width falls and the likelihood stops growing; black and white are finite."""
    pixels = torch.tensor([-1.0, 0.0, 1.0]).view(1, 3, 1, 1)
    location = torch.logit(0.5 + 0.4 * pixels)
    values = [LogitLaplace(torch.cat([location, torch.full_like(location, s)], dim=1)).nll(pixels) for s in (-9, -99)]
    assert all(value.isfinite().all() for value in values)
    torch.testing.assert_close(*values, atol=0.05, rtol=0)
    wild = LogitLaplace(torch.full((1, 6, 1, 1), 1e4)).nll(pixels)
    assert wild.isfinite().all()


def model() -> GumbelVQModel:
    return GumbelVQModel(**CODER, num_vq_embeddings=9, latent_channels=4, logit_laplace=True)


@torch.no_grad()
def test_a_model_draws_the_middle(tmp_path: Path) -> None:
    vae = model().eval()
    pixels = torch.rand(2, 3, 24, 16) * 2 - 1
    output = vae(pixels)
    assert output.raw.shape == (2, 6, 24, 16)
    assert output.sample.shape == pixels.shape
    torch.testing.assert_close(output.sample, LogitLaplace(output.raw).pixels)
    for drawn in (
        vae.decode(vae.encode(pixels).latents).sample,
        vae.decode_from_indices(vae.encode_to_indices(pixels)),
        vae(pixels, return_dict=False)[0],
    ):
        torch.testing.assert_close(drawn, output.sample)
    vae.enable_slicing()
    torch.testing.assert_close(vae(pixels).sample, output.sample, atol=1e-5, rtol=1e-5)
    vae.save_pretrained(tmp_path / "folder")
    vae.save_single_file(tmp_path / "file.safetensors")
    for again in (
        GumbelVQModel.from_pretrained(tmp_path / "folder"),
        GumbelVQModel.from_single_file(tmp_path / "file.safetensors"),
    ):
        torch.testing.assert_close(again(pixels).sample, output.sample, atol=1e-5, rtol=1e-5)
    assert vae.bfloat16()(pixels.bfloat16()).sample.dtype == torch.bfloat16


def test_it_is_learned_by_its_likelihood() -> None:
    """One picture: the likelihood alone brings the middle to it and the widths down."""
    torch.manual_seed(0)
    vae = model()
    pixels = torch.zeros(1, 3, 16, 16)
    pixels[:, :, 4:12, 4:12] = torch.tensor([1.0, -1.0, 0.5]).view(3, 1, 1)
    optimizer = torch.optim.Adam(vae.parameters(), lr=5e-3)
    widths = []
    for _ in range(150):
        output = vae(pixels)
        distribution = LogitLaplace(output.raw)
        loss = distribution.nll(pixels).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        widths.append(distribution.width.mean().item())
    assert float((vae(pixels).sample - pixels).abs().mean()) < 0.1
    assert widths[-1] < 0.3 * widths[0]


def test_other_kinds_refuse_it() -> None:
    with pytest.raises(ValueError, match="logit_laplace"):
        VQModel(**CODER, logit_laplace=True)
