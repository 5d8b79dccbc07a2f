"""Captions on pictures are readable, whatever characters they have."""

import numpy as np
import pytest
from PIL import Image, ImageFont

from latentdiff.training.loop import lettering as module
from latentdiff.training.loop.figures import cell
from latentdiff.training.loop.lettering import has, lettering

WORDS = "a café – “red” car, Straße, 红色, 😀"


def test_without_a_font_that_has_them_characters_become_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    only = ImageFont.load_default(size=11)
    monkeypatch.setattr(module, "fonts", lambda size: (only,))
    text, font = lettering(WORDS, 11)
    assert text == "a cafe - “red” car, Strasse, HongSe, :grinning:"
    assert font is only


def test_what_is_drawn_has_no_empty_boxes() -> None:
    text, font = lettering(WORDS, 11)
    assert all(has(font, letter) for letter in text)
    assert text.startswith("a caf")


def test_english_is_drawn_as_before_and_accents_are_not_all_alike() -> None:
    assert lettering("a red car", 11)[1] is module.fonts(11)[0]
    picture = [Image.new("RGB", (128, 8), "white")]
    cells = [np.asarray(cell(picture, caption, 128)) for caption in ("Ж", "中", "é", "😀")]
    assert len({one.tobytes() for one in cells}) == 4
