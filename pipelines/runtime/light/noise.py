"""The random numbers of torch's CPU generator, without torch: a seed means the same noise."""

import math

import numpy as np

BLOCK = 16
"""Numbers that are made normal together; fewer are made in another way, which is not here."""


class NoiseSource:
    """Standard normal noise as ``torch.randn`` draws it, in float32, from a CPU generator with this seed.

    Mersenne Twister (Matsumoto & Nishimura 1998) and the transform of Box & Muller 1958, in torch's order. torch takes
    sines and logarithms by vector instructions, so the last bits may differ.
    """

    def __init__(self, seed: int) -> None:
        self.words = np.random.RandomState(seed % 2**32)  # torch takes as much of a seed

    def draw(self, shape: tuple[int, ...]) -> np.ndarray:
        """float32; the next draw goes on from there.

        Raises:
            ValueError: there are fewer than `BLOCK` numbers.
        """
        count = math.prod(shape)
        if count < BLOCK:
            raise ValueError(f"noise of {count} numbers is drawn by torch only; {BLOCK} are the least")
        uniform, whole = self._uniform(count), count - count % BLOCK
        normal = np.empty(count, dtype=np.float32)
        normal[:whole] = box_muller(uniform[:whole])
        if whole < count:
            normal[-BLOCK:] = box_muller(self._uniform(BLOCK))
        return normal.reshape(shape)

    def _uniform(self, count: int) -> np.ndarray:
        """Of 24 bits, in [0, 1)."""
        words = self.words.randint(0, 2**32, size=count, dtype=np.uint32)
        return (words & np.uint32(2**24 - 1)).astype(np.float32) * np.float32(2**-24)


def box_muller(uniform: np.ndarray) -> np.ndarray:
    """Of each block of 16 numbers in [0, 1), the first eight become radii and the others angles."""
    halves = uniform.reshape(-1, 2, BLOCK // 2)
    radius = np.sqrt(np.float32(-2) * np.log(np.float32(1) - halves[:, 0]))
    angle = np.float32(2 * math.pi) * halves[:, 1]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)
