"""PSNR and SSIM."""

import pytest
import torch
from torch import Tensor

from latentdiff.metrics import psnr, ssim


def pictures(phase: float) -> Tensor:
    """(2, 3, 24, 20), numbers that look random and are the same everywhere."""
    numbers = torch.arange(2 * 3 * 24 * 20, dtype=torch.float64)
    return torch.sin(numbers.square() * 0.7 + phase).view(2, 3, 24, 20)


def test_psnr() -> None:
    target = torch.zeros(2, 3, 4, 4)
    prediction = torch.stack([torch.full((3, 4, 4), 0.2), torch.full((3, 4, 4), 0.02)])
    assert psnr(prediction, target) == pytest.approx((20 + 40) / 2, abs=1e-4)  # 10 log10(4 / 0.04), and / 0.0004
    assert psnr(target, target) == pytest.approx(106.02, abs=0.01)


def test_what_lies_outside_the_range_is_no_error() -> None:
    white = torch.ones(1, 3, 16, 16)
    assert psnr(white * 3, white) == psnr(white, white)
    assert ssim(white * 3, white) == pytest.approx(1.0)


def test_ssim_of_other_code() -> None:
    """scikit-image 0.26.0's structural_similarity of values from 0 to 1 (Gaussian weights, population covariance); and
    the map of torchmetrics 1.9.0's without its border of 5 pixels, for which that mirrors the picture."""
    target = pictures(0.3)
    assert ssim((target + 0.3 * pictures(1.7)).clamp(-1, 1), target) == pytest.approx(0.9568479852640573, rel=1e-9)


def test_ssim_of_the_same() -> None:
    assert ssim(pictures(0.1), pictures(0.1)) == pytest.approx(1.0, abs=1e-12)
    flat = torch.zeros(1, 1, 12, 12)
    # Two even pictures, 3/4 and 1/4 of white, differ in luminance only: (2 a b + c1) / (a^2 + b^2 + c1), c1 = 0.01^2.
    assert ssim(flat + 0.5, flat - 0.5) == pytest.approx((0.375 + 1e-4) / (0.625 + 1e-4), rel=1e-6)


def test_what_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="at least 11x11, not 20x8"):
        ssim(torch.zeros(1, 3, 8, 20), torch.zeros(1, 3, 8, 20))
    for metric in (psnr, ssim):
        with pytest.raises(ValueError, match=r"of one shape are compared, not \(1, 3, 16, 16\) with \(3, 16, 16\)"):
            metric(torch.zeros(1, 3, 16, 16), torch.zeros(3, 16, 16))
        with pytest.raises(ValueError, match="of one shape"):
            metric(torch.zeros(0, 3, 16, 16), torch.zeros(0, 3, 16, 16))
