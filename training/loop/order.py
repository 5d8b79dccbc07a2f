"""The order in which training sees pictures: a pure function of the seed and the step."""

import hashlib
import struct
from collections.abc import Hashable, Sequence

import torch


def seed_of(*numbers: int) -> int:
    """A seed for a random generator, well mixed from whole numbers; the same everywhere and always."""
    packed = struct.pack(f"<{len(numbers)}q", *numbers)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1


def generator_of(*numbers: int) -> torch.Generator:
    """A CPU generator with the seed of `numbers`."""
    return torch.Generator().manual_seed(seed_of(*numbers))


class PictureOrder:
    """Which pictures make the update of step n, for all processes and passes together.

    The pictures of one update are of one bucket, so that they fit into one tensor. Every picture comes once before any
    of its bucket comes again, in a new random order each time; buckets take turns in proportion to their size.
    If weights differ, pictures are drawn in proportion to them instead.

    Args:
        weights: (N,) share of each picture.
        update_size: pictures in one update: batch size x processes x accumulated passes.
        buckets: for each picture, the size it is trained at; by default all are of one.

    Raises:
        ValueError: no picture has a positive weight.
    """

    def __init__(
        self, weights: Sequence[float], update_size: int, seed: int, buckets: Sequence[Hashable] | None = None
    ) -> None:
        self.weights = torch.tensor(weights, dtype=torch.float64)
        if len(self.weights) == 0 or self.weights.sum() <= 0:
            raise ValueError("there are no pictures of positive weight to train on")
        self.update_size, self.seed = update_size, seed
        members: dict[Hashable, list[int]] = {}
        for index, bucket in enumerate(buckets if buckets is not None else [None] * len(weights)):
            members.setdefault(bucket, []).append(index)
        self._members = [torch.tensor(indices) for indices in members.values()]
        self._shares = torch.stack([self.weights[m].sum() for m in self._members]) / self.weights.sum()
        self._turns: list[tuple[int, int]] = []  # (bucket, how many updates it had before) of the steps so far
        self._counts = torch.zeros(len(self._members), dtype=torch.float64)
        self._rounds: dict[int, tuple[int, torch.Tensor]] = {}  # the order last used of each bucket

    def update(self, step: int) -> list[int]:
        """Indices of the pictures of update `step` (from 0); `update_size` of them."""
        bucket, before = self._turn(step)
        start = before * self.update_size
        return [self._picture(bucket, position) for position in range(start, start + self.update_size)]

    def _turn(self, step: int) -> tuple[int, int]:
        if len(self._members) == 1:
            return 0, step
        while len(self._turns) <= step:  # the bucket that is furthest behind its share
            owed = self._shares * (len(self._turns) + 1) - self._counts
            bucket = int(owed.argmax())
            self._turns.append((bucket, int(self._counts[bucket])))
            self._counts[bucket] += 1
        return self._turns[step]

    def _picture(self, bucket: int, position: int) -> int:
        members = self._members[bucket]
        number, offset = divmod(position, len(members))
        if bucket not in self._rounds or self._rounds[bucket][0] != number:
            generator = generator_of(self.seed, bucket, number)
            weights = self.weights[members]
            if bool((weights == weights[0]).all()):
                order = torch.randperm(len(members), generator=generator)
            else:
                order = torch.multinomial(weights, len(members), replacement=True, generator=generator)
            self._rounds[bucket] = (number, order)
        return int(members[self._rounds[bucket][1][offset]])
