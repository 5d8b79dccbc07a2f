"""What may be a caption or a class, and what text files say, in whatever encoding."""

import codecs
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from latentdiff.terminal import printable

if TYPE_CHECKING:
    from latentdiff.training.data.captioned_picture import CaptionedPicture

LONGEST = 20_000  # characters; a text encoder reads some 300
MANY_WORDS = 77  # a CLIP text encoder reads 77 tokens, and a word is at least one

SIDES = re.compile(
    r"\b((left|right)(s|wards?|most|[ -]?hand(ed)?)?|(counter|anti)?-?clockwise|letters?|lettering|alphabet|numerals?|"
    r"digits?|texts?|words?|(hand)?writing|written|reads|say(s|ing)|spell(s|ing))\b",
    re.IGNORECASE,
)
"""What captions have that would be wrong of a mirrored picture."""


def decode_text(content: bytes, errors: str = "strict") -> str:
    """Text from UTF-8, with or without a byte order mark, or from UTF-16 with one.

    Args:
        errors: "surrogateescape" to keep the bytes that are not UTF-8, for `check_captions` to refuse one by one.

    Raises:
        ValueError: it is neither.
    """
    encoding = "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        return content.decode(encoding, errors if encoding == "utf-8-sig" else "strict")
    except UnicodeDecodeError:
        raise ValueError("the text is not UTF-8; save it as UTF-8") from None


def check_captions(value: Any, column: str, default: str | None = None) -> tuple[str, ...]:
    """The captions of one picture: `value`, a string or a list of strings; `default` where there is none.

    Raises:
        ValueError: there is no caption, or it is no text a text encoder can take.
    """
    given = [value] if isinstance(value, str) or value is None else value
    if not isinstance(given, list | tuple) or not all(isinstance(one, str) or one is None for one in given):
        raise ValueError(f"{column!r} must be a caption or a list of captions, not {shorten(repr(value))}")
    captions: list[str] = [one for one in given if one and one.strip()]
    if not captions:
        if default is None:
            raise ValueError(f"no caption in {column!r}; write one, or give one for all with caption='...'")
        return (default,)
    return tuple(dict.fromkeys(_checked(one) for one in captions))


def _checked(caption: str) -> str:
    if len(caption) > LONGEST:
        raise ValueError(f"a caption of {len(caption):,} characters; at most {LONGEST:,} are taken")
    if "\0" in caption:
        raise ValueError("a caption with NUL characters in it; remove them")
    if any("\ud800" <= character <= "\udfff" for character in caption):
        raise ValueError("a caption that is not UTF-8; save it as UTF-8")
    return caption


def check_weight(value: Any) -> float:
    """The weight of one picture, 1 where none is given.

    Raises:
        ValueError: it is not a number of at least 0.
    """
    if value is None or value == "":
        return 1.0
    try:
        weight = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        weight = math.nan
    if not math.isfinite(weight) or weight < 0:
        raise ValueError(f"weight must be a number of at least 0, not {shorten(repr(value))}")
    return weight


def class_names(pictures: Sequence["CaptionedPicture"]) -> list[str]:
    """The classes of pictures whose captions they are, sorted; whole numbers by their value.

    Raises:
        ValueError: a picture is of several classes, or of none, or all are of one.
    """
    from latentdiff.training.data.picture_table import PictureTable, first_captions  # which imports this

    sound = isinstance(pictures, PictureTable) and pictures.is_each_of_one()
    for picture in () if sound else pictures:
        if len(picture.captions) != 1 or not picture.captions[0]:
            raise ValueError(
                f"{picture.name}: a picture is of one class, and this is of {len(picture.captions)}; name the column "
                f"with the class by caption_column="
            )
    found = first_captions(pictures)
    names = sorted(found, key=int if all(name.isdecimal() for name in found) else None)
    if len(names) < 2:
        raise ValueError(f"all pictures are of the class {names[0]!r}; with condition=none no class is needed")
    return names


def labels_of(pipeline: Any, pictures: Sequence["CaptionedPicture"]) -> list[int]:
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


def has_sides(picture: "CaptionedPicture") -> bool:
    """Whether a caption speaks of left, right or text."""
    return any(SIDES.search(caption) for caption in picture.captions)


def shorten(text: str, most: int = 80) -> str:
    """Text for a message: what cannot be printed escaped, on one line, not too long."""
    text = text if len(text) <= most else f"{text[: most * 2 // 3]}...{text[-most // 4 :]}"
    return printable(text)
