"""Pictures that look alike."""

import hostile
import numpy as np
from PIL import Image, ImageFilter

from latentdiff.training.data.duplicates import NEAR, fingerprint, near_groups


def test_the_same_picture_in_other_clothes() -> None:
    scenes = [hostile.noise(i, 9, 8).resize((200, 160), Image.Resampling.BICUBIC) for i in range(5)]
    small = scenes[1].resize((100, 80), Image.Resampling.LANCZOS)
    blurred = scenes[3].filter(ImageFilter.GaussianBlur(1))
    pictures = [*scenes, small, blurred]
    assert near_groups([fingerprint(picture) for picture in pictures]) == [[1, 5], [3, 6]]


def test_colours_tell_alike_shapes_apart() -> None:
    shape = np.asarray(hostile.noise(7, 9, 8).convert("L").resize((90, 80)))
    black = np.zeros_like(shape)
    red, blue = (Image.fromarray(np.stack(bands, axis=-1)) for bands in ((shape, black, black), (black, black, shape)))
    assert near_groups([fingerprint(red), fingerprint(blue)]) == []
    assert near_groups([fingerprint(red), fingerprint(red)]) == [[0, 1]]


def test_plain_pictures_are_no_duplicates() -> None:
    assert near_groups([fingerprint(Image.new("RGB", (64, 64), "white"))] * 3) == []
    assert near_groups([]) == []


def test_many_agree_with_comparing_each_with_each() -> None:
    rng = np.random.default_rng(0)
    values = [int(value) for value in rng.integers(0, 2**63, 300)]
    for source in range(0, 300, 3):  # near ones, at and beyond the limit
        flips = rng.choice(64, NEAR + source % 2, replace=False)
        values.append(values[source] ^ sum(1 << int(bit) for bit in flips))
    found = near_groups([f"{value:016x}" + "00" * 12 for value in values])
    pairs = {
        (a, b)
        for a in range(len(values))
        for b in range(a + 1, len(values))
        if (values[a] ^ values[b]).bit_count() <= NEAR
    }
    assert {tuple(group) for group in found} == pairs
