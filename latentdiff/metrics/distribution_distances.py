"""Similarity of two sets of pictures by their features: Fréchet and kernel distance, precision and recall.

Features are (N, D) of any floating type; everything is computed in float64.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

SUBSETS, SUBSET_SIZE = 100, 1000  # of the kernel distance; Binkowski et al. 2018 and clean-fid
NEAREST = 3  # of precision and recall; Kynkäänniemi et al. 2019, section 3
BLOCK = 2048  # rows of a distance matrix in memory at a time


def frechet_distance(drawn: Tensor, real: Tensor) -> float:
    """Squared Fréchet distance of two Gaussians fitted to the features (Heusel et al. 2017, Eq. 6); 0 for equal sets.

    With the features of the FID Inception network it is FID. It is biased: fewer pictures give a larger distance, so
    that only values for equal numbers of pictures are comparable.

    Args:
        drawn: (N, D).
        real: (M, D).

    Raises:
        ValueError: fewer than two samples in a set, different dimensions, or a value that is not finite.
    """
    drawn, real = check_features(drawn, real)
    means = drawn.mean(0) - real.mean(0)  # (D,)
    a, b = root_of_covariance(drawn), root_of_covariance(real)
    # With covariances A'A and B'B, the eigenvalues of their product are the squared singular values of A B'.
    cross = torch.linalg.svdvals(a @ b.T).sum()
    return float((means.square().sum() + a.square().sum() + b.square().sum() - 2 * cross).clamp(min=0))


def root_of_covariance(features: Tensor) -> Tensor:
    """A matrix A with at most D rows for which A'A is the covariance (unbiased) of `features` (N, D)."""
    centred = (features - features.mean(0)) / (len(features) - 1) ** 0.5
    return torch.linalg.qr(centred, mode="r").R if len(centred) > centred.shape[1] else centred


@dataclass(frozen=True)
class KernelDistance:
    """Mean and standard deviation over subsets; the deviation of a single subset is 0."""

    mean: float
    std: float
    subsets: int
    subset_size: int


def kernel_distance(
    drawn: Tensor, real: Tensor, subsets: int = SUBSETS, subset_size: int = SUBSET_SIZE, seed: int = 0
) -> KernelDistance:
    """Squared maximum mean discrepancy with the kernel (x'y / D + 1)^3, unbiased; KID (Binkowski et al. 2018).

    It is unbiased whatever the number of pictures, and can be a little below 0.

    Args:
        drawn: (N, D).
        real: (M, D).
        subsets: number of random subsets that are compared; all samples at once if neither set is larger than a subset.
        subset_size: samples of each set in a subset; the smaller set's size if that is less.
        seed: of the choice of subsets.

    Raises:
        ValueError: fewer than two samples in a set, different dimensions, or a value that is not finite.
    """
    drawn, real = check_features(drawn, real)
    if subsets < 1 or subset_size < 2:
        raise ValueError(f"a kernel distance needs a subset of two samples at least, not {subsets} of {subset_size}")
    if max(len(drawn), len(real)) <= subset_size:
        return KernelDistance(unbiased_mmd(drawn, real), 0.0, 1, min(len(drawn), len(real)))
    size = min(subset_size, len(drawn), len(real))
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor(
        [
            unbiased_mmd(*(s[torch.randperm(len(s), generator=generator)[:size].to(s.device)] for s in (drawn, real)))
            for _ in range(subsets)
        ],
        dtype=torch.float64,
    )
    return KernelDistance(float(values.mean()), float(values.std(correction=0)), subsets, size)


def unbiased_mmd(x: Tensor, y: Tensor) -> float:
    """Gretton et al. 2012, Eq. 3 (the sum over all pairs but those of a sample with itself)."""
    within = sum((kernel(s, s).sum() - kernel_with_itself(s).sum()) / (len(s) * (len(s) - 1)) for s in (x, y))
    return float(within - 2 * kernel(x, y).mean())


def kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3  # (N, M)


def kernel_with_itself(x: Tensor) -> Tensor:
    return (x.square().mean(1) + 1) ** 3  # (N,)


@dataclass(frozen=True)
class PrecisionRecall:
    """Precision: the share of drawn pictures in the real ones' manifold. Recall: of real ones in that of drawn ones."""

    precision: float
    recall: float


def precision_recall(drawn: Tensor, real: Tensor, nearest: int = NEAREST) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al. 2019, Eq. 1 and 2).

    A sample is in a set's manifold if it is no further from one of the set's samples than that sample's
    `nearest`-th neighbour in the set is.

    Args:
        drawn: (N, D), N more than `nearest`.
        real: (M, D), M more than `nearest`.

    Raises:
        ValueError: too few samples, different dimensions, or a value that is not finite.
    """
    drawn, real = check_features(drawn, real, least=nearest + 1)
    return PrecisionRecall(share_inside(drawn, real, nearest), share_inside(real, drawn, nearest))


def share_inside(samples: Tensor, manifold: Tensor, nearest: int) -> float:
    """The share of `samples` (N, D) in the manifold of other samples (M, D)."""
    # + 1 because a sample is its own nearest neighbour, though rounding may not make that distance 0.
    radii = torch.cat([own.topk(nearest + 1, dim=1, largest=False).values[:, -1] for own in blocks(manifold, manifold)])
    inside = [(distances <= radii).any(1) for distances in blocks(samples, manifold)]
    return float(torch.cat(inside).double().mean())


def blocks(x: Tensor, y: Tensor) -> Iterator[Tensor]:
    """The distances of `x` (N, D) to `y` (M, D), some rows at a time."""
    for rows in x.split(BLOCK):
        yield torch.cdist(rows, y)


def check_features(drawn: Tensor, real: Tensor, least: int = 2) -> tuple[Tensor, Tensor]:
    """Both as float64. Raises ValueError for sets that cannot be compared."""
    for name, features in (("drawn", drawn), ("real", real)):
        if features.ndim != 2:
            raise ValueError(f"features of {name} pictures must be (N, D), not {tuple(features.shape)}")
        if len(features) < least:
            raise ValueError(f"{len(features)} {name} pictures are too few; {least} are needed at least")
        if not torch.isfinite(features).all():
            raise ValueError(f"features of {name} pictures have values that are not finite")
    if drawn.shape[1] != real.shape[1]:
        raise ValueError(f"features of {drawn.shape[1]} and of {real.shape[1]} dimensions cannot be compared")
    return drawn.double(), real.double()
