"""Classes: pictures whose captions name them."""

from collections.abc import Sequence
from typing import Any

from latentdiff.training.data.pictures import CaptionedPicture


def class_names(pictures: Sequence[CaptionedPicture]) -> list[str]:
    """The classes of pictures whose captions they are, sorted; whole numbers by their value.

    Raises:
        ValueError: a picture is of several classes, or of none, or all are of one.
    """
    for picture in pictures:
        if len(picture.captions) != 1 or not picture.captions[0]:
            raise ValueError(
                f"{picture.name}: a picture is of one class, and this is of {len(picture.captions)}; name the column "
                f"with the class by caption_column="
            )
    found = {picture.captions[0] for picture in pictures}
    names = sorted(found, key=int if all(name.isdecimal() for name in found) else None)
    if len(names) < 2:
        raise ValueError(f"all pictures are of the class {names[0]!r}; with condition=none no class is needed")
    return names


def labels_of(pipeline: Any, pictures: Sequence[CaptionedPicture]) -> list[int]:
    """Numbers of the pictures' classes, which are their captions.

    Raises:
        ValueError: the model does not know one of them.
    """
    labels = []
    for picture in pictures:
        try:
            labels += pipeline.label_numbers(picture.captions[0])
        except ValueError as error:
            raise ValueError(f"{picture.name}: {error}; name the column with the class by --caption-column") from error
    return labels
