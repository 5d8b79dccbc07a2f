"""Where the randomness of a picture comes from: seeds, generators, and the noise that sampling starts with."""

from collections.abc import Sequence

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor

from latentdiff.codec import Generators


def image_seeds(seed: int | Sequence[int], count: int, name: str = "seed") -> list[int]:
    """The seeds of `count` images: ``seed + i``, or the i-th of a list.

    Raises:
        TypeError, ValueError: seeds that are no whole numbers from 0, or not as many as images.
    """
    seeds = [seed + i for i in range(count)] if isinstance(seed, int) else list(seed)
    if len(seeds) != count:
        raise ValueError(f"{len(seeds)} {name}s were given for {count} images; give one for each, or a single one")
    for one in seeds:
        if isinstance(one, bool) or not isinstance(one, int):
            raise TypeError(f"a {name} must be a whole number, not {one!r}")
        if not 0 <= one < 2**63:
            raise ValueError(f"a {name} must lie in [0, 2**63 - 1], not {one}")
    return seeds


def image_generators(seeds: Sequence[int] | None, generator: Generators, count: int) -> Generators:
    """The random generators of `count` images.

    With `seeds`, every image has a generator of its own, on the CPU, so its picture depends neither on the batch around
    it nor on the device. Without, `generator` is used.

    Raises:
        ValueError: seeds and a generator, or not as many generators as images.
    """
    if seeds is None:
        if isinstance(generator, list) and len(generator) != count:
            raise ValueError(f"{len(generator)} generators were given for {count} images; give one for each")
        return generator
    if generator is not None:
        raise ValueError("give either seed or generator, not both")
    return [Generator().manual_seed(one) for one in seeds]


class NoiseSource:
    """Standard normal noise for B images, all of it from their generators; maybe mixed with that of other seeds.

    Args:
        generator: of the images.
        device: of the noise; it is drawn where the generators are.
        dtype: it is drawn in.
        variation: generators of the other noise, one for each image.
        variation_strength: from 0 (none of it) to 1 (nothing else).
    """

    def __init__(
        self,
        generator: Generators,
        device: torch.device,
        dtype: torch.dtype,
        variation: list[Generator] | None = None,
        variation_strength: float = 0.0,
    ) -> None:
        self.generator, self.device, self.dtype = generator, device, dtype
        self.variation, self.variation_strength = variation, variation_strength

    def draw(self, shape: tuple[int, ...]) -> Tensor:
        """Noise of `shape`, (B, ...)."""
        return randn_tensor(shape, generator=self.generator, device=self.device, dtype=self.dtype)

    def first(self, shape: tuple[int, ...]) -> Tensor:
        """The noise that decides what the pictures look like, with the variation in it."""
        noise = self.draw(shape)
        if self.variation is None:
            return noise
        other = randn_tensor(shape, generator=self.variation, device=self.device, dtype=self.dtype)
        return spherical_mix(noise, other, self.variation_strength)


def spherical_mix(a: Tensor, b: Tensor, share: float) -> Tensor:
    """From `a` (share 0) to `b` (share 1) on the great circle through both, image by image (Shoemake 1985, slerp).

    A straight mix of two noises would have less variance than either.
    """
    flat_a, flat_b = a.flatten(1).double(), b.flatten(1).double()
    cosine = torch.nn.functional.cosine_similarity(flat_a, flat_b).clamp(-1, 1)
    angle = torch.arccos(cosine)[:, None]  # (B, 1)
    straight = angle.abs() < 1e-4
    sine = torch.where(straight, torch.ones_like(angle), torch.sin(angle))
    weight_a = torch.where(straight, torch.full_like(angle, 1 - share), torch.sin((1 - share) * angle) / sine)
    weight_b = torch.where(straight, torch.full_like(angle, share), torch.sin(share * angle) / sine)
    return (weight_a * flat_a + weight_b * flat_b).view_as(a).to(a.dtype)
