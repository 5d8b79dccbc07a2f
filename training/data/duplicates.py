"""Near duplicates: pictures whose fingerprints differ in a few bits."""

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

NEAR = 3  # bits of 64; more would make different pictures of one kind, such as icons on white, duplicates
BANDS = NEAR + 1  # of 16 bits: where two hashes differ in NEAR bits, one band is equal
NEAR_COLOUR = 12  # of 255, in each quarter and channel


def fingerprint(image: Image.Image) -> str:
    """What a picture looks like from afar, as 40 hexadecimal digits.

    The first 16 are its difference hash: which of neighbouring pixels of the picture at 9 x 8, grey, is the brighter.
    The rest are the mean colours of its quarters, RGB.
    """
    small = image.resize((18, 16), Image.Resampling.BOX, reducing_gap=2.0)
    grey = np.asarray(small.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    bits = (grey[:, 1:] > grey[:, :-1]).flatten()  # (64,)
    quarters = np.asarray(small.resize((2, 2), Image.Resampling.BOX), dtype=np.uint8)  # (2, 2, 3)
    return np.packbits(bits).tobytes().hex() + quarters.tobytes().hex()


def near_groups(fingerprints: Sequence[str]) -> list[list[int]]:
    """Groups of indices (at least two each) linked by hashes at most `NEAR` bits apart and about equal colours.

    Pictures of almost no detail look alike without being so, and are left out.
    """
    by_value: dict[str, list[int]] = defaultdict(list)
    for index, value in enumerate(fingerprints):
        if 4 <= int(value[:16], 16).bit_count() <= 60:
            by_value[value].append(index)
    values = list(by_value)
    roots = list(range(len(values)))
    for a, b in _near_pairs(values):
        roots[_root(roots, b)] = _root(roots, a)
    groups: dict[int, list[int]] = defaultdict(list)
    for i, value in enumerate(values):
        groups[_root(roots, i)] += by_value[value]
    return sorted(sorted(group) for group in groups.values() if len(group) > 1)


def _root(roots: list[int], i: int) -> int:
    while roots[i] != i:
        roots[i] = roots[roots[i]]
        i = roots[i]
    return i


def _near_pairs(values: Sequence[str]) -> Iterator[tuple[int, int]]:
    hashes = np.array([int(value[:16], 16) for value in values], dtype=np.uint64)  # (N,)
    colours = np.array([list(bytes.fromhex(value[16:])) for value in values], dtype=np.int16)  # (N, 12)
    bits = np.unpackbits(hashes.view(np.uint8).reshape(-1, 8), axis=1)  # (N, 64)
    mixed = bits[:, np.random.default_rng(0).permutation(64)]  # or a band would be an edge, blank in most pictures
    for band in np.split(mixed, BANDS, axis=1):
        keys = np.packbits(band, axis=1).copy().view(np.uint16)[:, 0]
        order = np.argsort(keys, kind="stable")
        for members in np.split(order, np.flatnonzero(np.diff(keys[order])) + 1):
            for place, a in enumerate(members[:-1]):
                others = members[place + 1 :]
                others = others[_ones(hashes[others] ^ hashes[a]) <= NEAR]
                others = others[(np.abs(colours[others] - colours[a]) <= NEAR_COLOUR).all(axis=1)]
                yield from ((int(a), int(b)) for b in others)


def _ones(values: np.ndarray) -> np.ndarray:
    """How many bits of each value are set."""
    return np.unpackbits(values.view(np.uint8).reshape(-1, 8), axis=1).sum(axis=1)
