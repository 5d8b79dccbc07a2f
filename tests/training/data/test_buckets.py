"""Aspect-ratio buckets."""

import hostile
import pytest

from latentdiff.training.data import CaptionedPicture, assign_buckets, bucket_sizes


def of(*sizes: tuple[int, int]) -> list[CaptionedPicture]:
    return [CaptionedPicture(str(size), bytes, ("a",), size=size) for size in sizes]


@pytest.mark.parametrize(("resolution", "step"), [(64, 4), (64, 8), (96, 16), (512, 64), (512, 8), (1024, 64), (8, 8)])
def test_sizes_are_multiples_of_about_one_area(resolution: int, step: int) -> None:
    sizes = bucket_sizes(resolution, step)
    assert (resolution, resolution) in sizes
    assert {(height, width) for width, height in sizes} == set(sizes)
    for width, height in sizes:
        assert width % step == height % step == 0
        assert max(width, height) <= 2 * min(width, height)
        assert abs(width * height - resolution**2) <= step * min(width, height) / 2
    if resolution >= 512:
        assert len(sizes) >= 5


def test_pictures_go_where_they_fit() -> None:
    pictures = of((100, 100), (640, 480), (480, 640), (3000, 500), (500, 3000), (101, 100))
    assert assign_buckets(pictures, 64, 8, enabled=False) == [(64, 64)] * 6
    found = assign_buckets(pictures, 64, 8, enabled=True)
    assert found == [(64, 64), (72, 56), (56, 72), (88, 48), (48, 88), (64, 64)]
    assert assign_buckets(pictures, 64, 8, enabled=True, max_ratio=1.0) == [(64, 64)] * 6
    sizes = bucket_sizes(512, 64)
    assert assign_buckets(of(*sizes), 512, 64, enabled=True) == sizes


def test_the_size_is_read_where_it_is_not_known() -> None:
    exif = hostile.Image.Exif()
    exif[0x0112] = 6
    content = hostile.encode(hostile.noise(0, 40, 20), "JPEG", exif=exif)
    picture = CaptionedPicture("turned", lambda: content, ("a",))
    assert assign_buckets([picture], 64, 8, enabled=True) == [(48, 88)]
    with pytest.raises(ValueError, match="broken: cannot be read"):
        assign_buckets([CaptionedPicture("broken", bytes, ("a",))], 64, 8, enabled=True)


def test_resolution_must_fit_the_step() -> None:
    with pytest.raises(ValueError, match="resolution 60 must be a multiple of 8"):
        bucket_sizes(60, 8)
