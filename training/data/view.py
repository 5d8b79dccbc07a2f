"""Which part of a picture is taken, at which size."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class View:
    """A crop of a picture.

    Args:
        width, height: in pixels; the picture is resized to cover them.
        crop: where the crop lies in what is left over along x and y, 0 to 1.
        flip: mirrored left to right.
    """

    width: int
    height: int
    crop: tuple[float, float] = (0.5, 0.5)
    flip: bool = False
