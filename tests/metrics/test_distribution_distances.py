"""Fréchet and kernel distance, precision and recall, against closed forms and other people's code."""

import pytest
import torch
from torch import Tensor

from latentdiff.metrics import frechet_distance, kernel_distance, precision_recall


def spread(rows: int, dimensions: int, phase: float) -> Tensor:
    """Numbers that look random and are the same everywhere."""
    numbers = torch.arange(rows * dimensions, dtype=torch.float64)
    return torch.sin(numbers.square() * 0.7 + phase).view(rows, dimensions)


DRAWN = spread(60, 6, 0.3) * 0.8 + 0.3
REAL = spread(50, 6, 1.1)


def test_of_other_code() -> None:
    """pytorch-fid 0.3.0's calculate_frechet_distance, torch-fidelity 0.4.0's kernel_mmd (60 and 50 samples cut to 50)
    and calculate_precision_recall_full with neighborhood 3, run on these very features."""
    assert frechet_distance(DRAWN, REAL) == pytest.approx(0.6081912874124011, rel=1e-9)
    assert kernel_distance(DRAWN[:50], REAL).mean == pytest.approx(0.19605965002298253, rel=1e-9)
    both = precision_recall(DRAWN, REAL)
    assert (both.precision, both.recall) == pytest.approx((0.9, 0.74), abs=1e-6)


def test_frechet_distance_of_gaussians() -> None:
    """Two sets with diagonal covariances, made exact: |m1 - m2|^2 + sum (s1 - s2)^2."""
    samples = torch.linalg.qr(spread(40, 5, 0.0) - spread(40, 5, 0.0).mean(0)).Q * 39**0.5  # mean 0, covariance 1
    samples -= samples.mean(0)
    first, second = torch.tensor([1.0, 2, 3, 4, 5]).double(), torch.tensor([2.0, 2, 1, 4, 0.5]).double()
    expected = 5 * 0.3**2 + (first - second).square().sum()
    assert frechet_distance(samples * first + 0.3, samples * second) == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("count", [4, 30])
def test_frechet_distance_with_fewer_samples_than_dimensions(count: int) -> None:
    """The trace of the root of the product of the covariances, from its eigenvalues."""
    drawn, real = spread(count, 12, 0.2), spread(30, 12, 0.9)
    product = torch.linalg.eigvals(drawn.T.cov() @ real.T.cov()).real.clamp(min=0)
    expected = (
        (drawn.mean(0) - real.mean(0)).square().sum()
        + drawn.T.cov().trace()
        + real.T.cov().trace()
        - 2 * product.sqrt().sum()
    )
    assert frechet_distance(drawn, real) == pytest.approx(float(expected), rel=1e-5)


def test_the_same_set() -> None:
    assert frechet_distance(REAL, REAL) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(REAL, REAL.flip(0)) == pytest.approx(0, abs=1e-9)
    both = precision_recall(REAL, REAL)
    assert (both.precision, both.recall) == (1.0, 1.0)


def test_kernel_distance_has_no_bias() -> None:
    """Over many pairs of small samples of one distribution its mean is 0 within four standard errors."""
    generator = torch.Generator().manual_seed(0)
    values = torch.tensor(
        [kernel_distance(*torch.randn(2, 8, 4, generator=generator, dtype=torch.float64)).mean for _ in range(400)]
    )
    assert values.mean().abs() < 4 * values.std() / 20
    assert values.min() < 0 < values.max()


def test_kernel_distance_in_subsets() -> None:
    whole = kernel_distance(DRAWN, REAL)
    parts = kernel_distance(DRAWN, REAL, subsets=300, subset_size=20)
    assert (whole.subsets, whole.std) == (1, 0.0)
    assert (parts.subsets, parts.subset_size) == (300, 20)
    assert parts.std > 0
    assert parts.mean == pytest.approx(whole.mean, abs=4 * parts.std / 300**0.5)
    assert parts == kernel_distance(DRAWN, REAL, subsets=300, subset_size=20)
    assert parts != kernel_distance(DRAWN, REAL, subsets=300, subset_size=20, seed=1)


def test_precision_and_recall_tell_fault_from_lack() -> None:
    """Real: two clusters. Drawn: only the first of them, or both and something that is neither."""
    cluster = spread(20, 3, 0.0) * 0.1
    real = torch.cat([cluster, cluster + 10])
    one = precision_recall(spread(40, 3, 0.0)[:20] * 0.1, real)
    assert one.precision == 1.0
    assert one.recall == 0.5
    more = precision_recall(torch.cat([real, cluster - 10, cluster - 20]), real)
    assert more.precision == 0.5
    assert more.recall == 1.0


def test_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = precision_recall(DRAWN, REAL)
    monkeypatch.setattr("latentdiff.metrics.distribution_distances.BLOCK", 7)
    assert precision_recall(DRAWN, REAL) == whole


@pytest.mark.parametrize(
    ("drawn", "real", "message"),
    [
        (REAL[:1], REAL, "1 drawn pictures are too few; 2"),
        (REAL, REAL[:, :3], "6 and of 3 dimensions"),
        (REAL[0], REAL, r"drawn pictures must be \(N, D\)"),
        (REAL, REAL / 0, "real pictures have values that are not finite"),
    ],
)
def test_what_cannot_be_compared(drawn: Tensor, real: Tensor, message: str) -> None:
    for metric in (frechet_distance, kernel_distance):
        with pytest.raises(ValueError, match=message):
            metric(drawn, real)
    with pytest.raises(ValueError, match="too few; 4"):
        precision_recall(REAL[:3], REAL)
    with pytest.raises(ValueError, match="two samples"):
        kernel_distance(REAL, REAL, subset_size=1)
