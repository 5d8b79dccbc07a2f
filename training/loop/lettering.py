"""Text on pictures: in a font that has its characters where one is at hand, else in the nearest plain ones."""

import importlib.util
from functools import lru_cache
from pathlib import Path

from anyascii import anyascii
from PIL import ImageFont

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont

AT_HAND = ("DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "msyh.ttc", "arial.ttf")
"""What systems have of fonts with many characters; Pillow's own, which comes first, has those of English."""
NOT_A_CHARACTER = "\uffff"


@lru_cache
def fonts(size: int) -> tuple[Font, ...]:
    """Pillow's own font, then those on this machine that have more characters."""
    found: list[Font] = [ImageFont.load_default(size=size)]
    matplotlib = importlib.util.find_spec("matplotlib")
    folders = () if matplotlib is None else matplotlib.submodule_search_locations or ()
    brought = [Path(folder, "mpl-data/fonts/ttf", AT_HAND[0]) for folder in folders]
    for file in [*AT_HAND, *map(str, brought)]:
        try:
            found.append(ImageFont.truetype(file, size))
        except OSError:  # not there
            continue
    return tuple(found)


@lru_cache(maxsize=10_000)
def has(font: Font, letter: str) -> bool:
    """Whether a font draws a character otherwise than those that it has not: as an empty box."""
    return letter.isspace() or bytes(font.getmask(letter)) != bytes(font.getmask(NOT_A_CHARACTER))


def lettering(text: str, size: int) -> tuple[str, Font]:
    """A text as it can be drawn, and the font: the first that has all its characters, or else most of them; those that
    it has not are replaced, "中" by "Zhong".
    """
    lacking = {font: {letter for letter in set(text) if not has(font, letter)} for font in fonts(size)}
    font = min(lacking, key=lambda one: len(lacking[one]))
    return "".join(anyascii(letter) or "?" if letter in lacking[font] else letter for letter in text), font
