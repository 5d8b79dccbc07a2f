"""The data order is a pure function of seed and step, and fair."""

from collections import Counter

import pytest
import torch

from latentdiff.training.batch.random_choices import PictureOrder, ViewChoice, seed_of
from latentdiff.training.data import CaptionedPicture
from latentdiff.training.data.caption_checks import has_sides
from latentdiff.training.settings import RunSettings


def stream(order: PictureOrder, steps: int) -> list[int]:
    return [index for step in range(steps) for index in order.update(step)]


def test_seeds_are_fixed_and_differ() -> None:
    assert seed_of(1, 2, 3) == 6520558355739401531
    assert len({seed_of(a, b) for a in range(50) for b in range(50)}) == 2500


def test_every_picture_once_before_any_comes_again() -> None:
    order = PictureOrder([1.0] * 10, update_size=4, seed=3)
    seen = stream(order, 25)
    for start in range(0, 100, 10):
        assert sorted(seen[start : start + 10]) == list(range(10))
    assert seen[:10] != seen[10:20]


def test_any_step_can_be_asked_for_first() -> None:
    buckets = ["wide"] * 7 + ["tall"] * 3
    straight = PictureOrder([1.0] * 10, 2, 0, buckets)
    all_steps = [straight.update(step) for step in range(40)]
    for step in (39, 5, 17):
        assert PictureOrder([1.0] * 10, 2, 0, buckets).update(step) == all_steps[step]


def test_an_update_is_of_one_bucket_and_buckets_get_their_share() -> None:
    buckets = ["wide"] * 6 + ["tall"] * 3 + ["odd"]
    order = PictureOrder([1.0] * 10, update_size=3, seed=1, buckets=buckets)
    counts: Counter[int] = Counter()
    for step in range(100):
        update = order.update(step)
        assert len({buckets[index] for index in update}) == 1
        counts.update(update)
    assert all(28 <= counts[index] <= 32 for index in range(10))


def test_weights_are_shares() -> None:
    counts = Counter(stream(PictureOrder([3.0, 1.0, 0.0], update_size=10, seed=0), 300))
    assert counts[2] == 0
    assert 2.6 < counts[0] / counts[1] < 3.4


def test_nothing_to_train_on() -> None:
    with pytest.raises(ValueError, match="no pictures of positive weight"):
        PictureOrder([], 4, 0)
    with pytest.raises(ValueError, match="no pictures of positive weight"):
        PictureOrder([0.0, 0.0], 4, 0)


@pytest.mark.parametrize(
    ("caption", "sides"),
    [
        ("a car on the left", True),
        ("Right-handed guitar", True),
        ("a sign that says STOP", True),
        ("the letter b", True),
        ("handwriting on paper", True),
        ("a clockwise arrow", True),
        ("a bright light", False),
        ("leftovers on a plate", False),
        ("a sword", False),
        ("swordfish, essay", False),
        ("", False),
    ],
)
def test_captions_that_a_mirrored_picture_would_not_have(caption: str, sides: bool) -> None:
    assert has_sides(CaptionedPicture("1.png", bytes, ("a thing", caption))) is sides


@pytest.mark.parametrize(("flip", "which"), [("auto", [True, False]), (True, [True, True]), (False, [False, False])])
def test_pictures_with_sides_are_not_mirrored_unless_it_is_said(flip: bool | str, which: list[bool]) -> None:
    settings = RunSettings.model_validate({"data": "d", "output": "o", "resolution": 8, "random_flip": flip})
    captions = ("a red thing", "a thing on the left")
    pictures = [CaptionedPicture(f"{i}.png", bytes, (text,), size=(8, 8)) for i, text in enumerate(captions)]
    views = ViewChoice(settings, pictures, step=8)
    assert [views.pick(i, torch.tensor([0.0, 0.0, 0.49])).flip for i in range(2)] == which
    assert [any(view.flip for view in views.all(i)) for i in range(2)] == which
    assert not any(views.pick(i, torch.tensor([0.0, 0.0, 0.5])).flip for i in range(2))
