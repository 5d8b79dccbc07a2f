"""Composed scenes: the same for the same index, nothing held out in them, and what captions say is there."""

import importlib.util
import json
import lzma
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from latentdiff.training.recipes.emoji import drawings, held_out, icons
from latentdiff.training.recipes.emoji.captions import Concept, read_concepts, without_unseen
from latentdiff.training.recipes.emoji.colour import COLOURS, TARGETS, shares, turn
from latentdiff.training.recipes.emoji.drawings import Drawing, Job
from latentdiff.training.recipes.emoji.grammar import article, coloured, counted, plural
from latentdiff.training.recipes.emoji.scenes import Composer, Plan, placed

resvg = pytest.mark.skipif(importlib.util.find_spec("resvg_py") is None, reason="resvg-py is not installed")

SMALL = ("small", "little", "tiny")
COLOURED = re.compile(rf"({'|'.join(COLOURS)}) (\w+(?: \w+)?)")
SHAPES = {"1F697": "rectangle", "1F408": "ellipse", "1F3E0": "rectangle", "1F34E": "ellipse", "1F333": "ellipse"}


def pictures() -> list[Drawing]:
    """Five things of `concepts.txt`, each in two sets as a red or brown block, with its turned copies."""
    found = []
    concepts = read_concepts()
    for set_name, fill in (("one", (221, 46, 68)), ("two", (200, 30, 30))):
        for hexcode, shape in SHAPES.items():
            picture = Image.new("RGBA", (128, 128), (0, 0, 0, 0))
            getattr(ImageDraw.Draw(picture), shape)((6, 6, 121, 121), fill=(*fill, 255))
            rgba = np.asarray(picture)
            base = (concepts[hexcode], "objects", 3.0, "train")
            found.append(Drawing(set_name, "flat", *base, "red", False, rgba))
            for colour in TARGETS:
                turned = turn(rgba, colour)
                if colour != "red" and turned is not None and not held_out.colour_held_out(colour, hexcode):
                    found.append(Drawing(set_name, "flat", *base, colour, True, turned))
    return found


@pytest.fixture(scope="module")
def composer() -> Composer:
    return Composer(pictures(), size=96, seed=3)


def plans(composer: Composer, kind: str, number: int = 4000) -> list[Plan]:
    found = [plan for index in range(number) if (plan := composer.plan(index)).kind == kind]
    assert len(found) > 20
    return found


def test_a_scene_depends_on_seed_and_index_alone(composer: Composer) -> None:
    again = Composer(pictures(), size=96, seed=3)
    first = [again(index) for index in reversed(range(40))][::-1]
    for index, other in enumerate(first):
        scene = composer(index)
        assert scene.captions == other.captions
        assert scene.kind == other.kind
        assert np.array_equal(scene.picture, other.picture)
        assert scene.picture.shape == (96, 96, 3)
        assert scene.picture.dtype == np.uint8
        assert 1 <= len(scene.captions) <= 4
    texts = [composer.plan(index).captions for index in range(40)]
    other_seed = Composer(pictures(), size=96, seed=4)
    assert texts != [other_seed.plan(index).captions for index in range(40)]


def test_a_bundle_comes_back_as_it_was(tmp_path: Path) -> None:
    concept = Concept("1F697", 3.0, "t", ("car", "~cars"), ("automobile",))
    job = Job("toy", "flat", icons.Icon("<rect/>", (0.0, 0.0, 24.0, 24.0)), concept, 3.0, "train", "objects")
    path = tmp_path / "bundle.xz"
    assert drawings.write_bundle([job, job], path) == path.stat().st_size
    assert drawings.read_bundle(path) == [job, job]
    assert [file.name for file in tmp_path.iterdir()] == ["bundle.xz"]


def test_counts_show_that_many(composer: Composer) -> None:
    numbers = {"one": 1, "two": 2, "three": 3, "four": 4}
    for plan in plans(composer, "count"):
        assert len(plan.items) == numbers.get(plan.captions[0].split()[0])


def test_plurals() -> None:
    several = {
        "car": "cars",
        "slice of pizza": "slices of pizza",
        "mouse": "mice",
        "mouse face": "mouse faces",
        "strawberry": "strawberries",
        "knife": "knives",
        "box": "boxes",
        "teddy bear": "teddy bears",
        "police officer": "police officers",
        "face with heart eyes": "faces with heart eyes",
        "goldfish": "goldfish",
        "snowman": "snowmen",
        "t-rex": "t-rexes",
        "person lifting weights": "people lifting weights",
        "woman dancing": "women dancing",
        "face blowing a kiss": "faces blowing a kiss",
        "office building": "office buildings",
        "key": "keys",
    }
    assert {name: plural(name) for name in several} == several
    assert counted("red apple", 3) == "three red apples"
    assert counted("apple", 1) == "one apple"
    with pytest.raises(ValueError, match="not counted"):
        plural("~grapes")
    assert article("unicorn") == "a unicorn"
    assert coloured("~grapes", "red") == "~red grapes"


@resvg
def test_a_folder_of_scenes(tmp_path: Path) -> None:
    from latentdiff.training.recipes.emoji import prepare

    boxes = ['<rect width="20" height="20" fill="#d22"/>', '<circle cx="12" cy="12" r="9" fill="#d22"/>']
    jobs = [
        Job(
            f"set{number}",
            "flat",
            icons.Icon(body, (0.0, 0.0, 24.0, 24.0)),
            read_concepts()[code],
            3.0,
            split,
            "objects",
        )
        for number, body in enumerate(boxes)
        for code in SHAPES
        for split in drawings.SPLITS
    ]
    assert prepare.write_scenes(jobs, tmp_path / "data", count=100, size=64, workers=1) == 100
    rows = [json.loads(line) for line in (tmp_path / "data/metadata.jsonl").read_text().splitlines()]
    assert [row["split"] for row in rows].count("validation") == 2
    assert len({row["file_name"] for row in rows}) == 100
    assert Image.open(tmp_path / "data" / rows[7]["file_name"]).size == (64, 64)
    with pytest.raises(FileExistsError, match="exists already"):
        prepare.write_scenes(jobs, tmp_path / "data", 1, 64, 1)


@pytest.mark.parametrize("arguments", [[], ["out", "--scenes", "0"], ["--bundle", "out.xz", "--scenes", "5"]])
def test_prepare_asks_for_what_it_needs(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    from latentdiff.training.recipes.emoji import prepare

    with pytest.raises(SystemExit):
        prepare.main(arguments)
    assert "a folder to write" in capsys.readouterr().err


def test_unseen_names_are_no_part_of_any_other_name() -> None:
    concepts = read_concepts()
    unseen = [name for concept in concepts.values() for name in concept.unseen]
    assert len(set(unseen)) >= 80
    for concept in concepts.values():
        assert without_unseen(concept, unseen) == concept
    assert without_unseen(Concept("1F698", 1.0, "-", ("oncoming automobile",)), unseen) is None


def centres(plan: Plan) -> list[tuple[float, float]]:
    return [(item.place.x, item.place.y) for item in plan.items]


def test_nothing_held_out_is_said_or_shown(composer: Composer) -> None:
    concepts = read_concepts()
    unseen = re.compile("|".join(rf"\b{re.escape(name)}\b" for one in concepts.values() for name in one.unseen))
    names = {name for code in SHAPES for name in concepts[code].names}
    never = {
        f"{colour} {name}"
        for code in SHAPES
        for name in concepts[code].names
        for colour in COLOURS
        if held_out.colour_held_out(colour, code)
    }
    said = set()
    for index in range(20_000):
        plan = composer.plan(index)
        codes = [item.drawing.concept.hexcode for item in plan.items]
        assert not any(held_out.pair_held_out(one, other) for one in codes for other in codes)
        assert not any(
            item.drawing.turned and held_out.colour_held_out(item.drawing.colour or "", item.drawing.concept.hexcode)
            for item in plan.items
        )
        for text in plan.captions:
            assert not unseen.search(text), text
            said |= {f"{colour} {name}" for colour, name in re.findall(COLOURED, text) if name in names}
    assert never
    assert not said & never
    assert len(said) > 30


def test_left_right_above_below_are_true(composer: Composer) -> None:
    seen = set()
    for plan in plans(composer, "pair", 6000):
        (x, y), (other_x, other_y) = centres(plan)
        names = [set(item.drawing.concept.names) for item in plan.items]
        for text in plan.captions:
            text = re.split(" on | with ", text)[0]
            for word, true in (
                ("to the left of", x < other_x),
                ("to the right of", x > other_x),
                ("above", y < other_y),
                ("below", y > other_y),
                ("under", y > other_y),
            ):
                if f" {word} " in text:
                    first, second = text.split(f" {word} ")
                    order = names if any(first.endswith(name) for name in names[0]) else names[::-1]
                    assert any(first.endswith(name) for name in order[0]), text
                    assert any(second.split(",")[0].endswith(name) for name in order[1]), text
                    assert true == (order is names), text
                    seen.add(word)
    assert len(seen) == 5


def test_the_first_of_two_things_stands_on_the_left_where_no_side_is_said(composer: Composer) -> None:
    seen = set()
    for plan in plans(composer, "pair", 3000):
        (x, _), (other_x, _) = centres(plan)
        names = [set(item.drawing.concept.names) for item in plan.items]
        for text in plan.captions:
            text = re.split(" on (?!the)", text)[0]
            word = next((word for word in (" next to ", " beside ", " and ") if word in text), "")
            if not word or (" and " in word and " on the " in text) or " at the " in text:
                continue
            first = text.split(word)[0]
            assert any(first.endswith(name.removeprefix("~")) for name in names[0 if x < other_x else 1]), text
            seen.add(word)
    assert len(seen) == 3


def test_things_are_apart_and_inside_and_of_the_size_said(composer: Composer) -> None:
    for kind, number in (("pair", 400), ("count", 400), ("three", 800), ("sizes", 800)):
        for plan in plans(composer, kind, number):
            if len({item.drawing.concept.hexcode for item in plan.items}) > 1 or kind == "count":
                assert len(plan.items) == components(composer, plan), plan.captions
    for plan in plans(composer, "size", 4000):
        (item,) = plan.items
        small = any(word in plan.captions[0].split() for word in SMALL)
        assert (item.place.side < 0.4) == small
        assert small or item.place.side > 0.9
    for plan in plans(composer, "sizes", 8000):
        one, other = plan.items
        small = one if one.place.side < other.place.side else other
        first = plan.captions[0]
        assert max(one.place.side, other.place.side) > 2 * small.place.side
        assert any(f"{word} {name}" in first for word in SMALL for name in noun_forms(small.drawing)), first


def noun_forms(drawing: Drawing) -> list[str]:
    return [text for name in drawing.concept.names for text in (name, f"{drawing.colour} {name}")]


def components(composer: Composer, plan: Plan) -> int:
    """Connected patches of things in a plan's picture."""
    mask = np.zeros((composer.size, composer.size), dtype=bool)
    for item in plan.items:
        drawing, (left, top) = placed(item, composer.size)
        alpha = np.asarray(drawing)[..., 3] > 128
        assert left >= -1, plan.captions
        assert top >= -1, plan.captions
        assert left + drawing.width <= composer.size + 1, plan.captions
        assert top + drawing.height <= composer.size + 1, plan.captions
        left, top = max(left, 0), max(top, 0)
        patch = mask[top : top + drawing.height, left : left + drawing.width]
        patch |= alpha[-patch.shape[0] :, -patch.shape[1] :]
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:  # spread the largest label over each patch
        padded = np.pad(labels, 1)
        spread = np.max(
            [padded[1:-1, 1:-1], padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]], 0
        )
        spread[~mask] = 0
        if np.array_equal(spread, labels):
            return len(np.unique(labels[mask]))
        labels = spread


def test_backgrounds_are_what_captions_say(composer: Composer) -> None:
    seen = set()
    for plan in plans(composer, "background", 3000):
        name = plan.background.name
        corner = composer.paint(plan)[0, 0]
        patch = np.dstack([np.full((8, 8, 3), corner, np.uint8), np.full((8, 8), 255, np.uint8)])
        assert name == "beige" or shares(patch)[held_out.base_colour(name)] == 1, (name, corner)
        assert all(name in text for text in plan.captions)
        assert name != plan.items[0].drawing.colour
        seen.add(name)
    assert len(seen) > 12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"thing": 7}, "line 2: 'thing' must be text"),
        ({"flag": "x"}, "line 2: 'flag' must be one of"),
        ({"split": "test"}, "line 2: 'split' must be one of"),
        ({"weight": "much"}, "line 2: 'weight' must be 1 number"),
        ({"box": [1, 2, 3]}, "line 2: 'box' must be 4 numbers"),
        ({"names": ["?automobile"]}, "line 2: 'names' has none"),
        ({"names": "car"}, "line 2: 'names' must be a list"),
    ],
)
def test_a_row_of_a_bundle_that_is_wrong_is_named(tmp_path: Path, change: dict[str, object], message: str) -> None:
    lines = bundle_lines(tmp_path)
    lines[1] = json.dumps({**json.loads(lines[1]), **change})
    with pytest.raises(ValueError, match=rf"bundle\.xz, {message}"):
        drawings.read_bundle(packed(tmp_path, lines))


def test_what_is_no_bundle_is_named(tmp_path: Path) -> None:
    lines = bundle_lines(tmp_path)
    path = tmp_path / "bundle.xz"
    path.write_bytes(b"PK not xz")
    with pytest.raises(ValueError, match=r"bundle\.xz: not a whole xz file"):
        drawings.read_bundle(path)
    whole = packed(tmp_path, lines).read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(ValueError, match=r"bundle\.xz: not a whole xz file"):
        drawings.read_bundle(path)
    with pytest.raises(ValueError, match="2 drawings announced, 1 found"):
        drawings.read_bundle(packed(tmp_path, lines[:2]))
    with pytest.raises(ValueError, match="line 1: expected format"):
        drawings.read_bundle(packed(tmp_path, ['{"format": "other"}', *lines[1:]]))
    with pytest.raises(ValueError, match="line 2: not JSON"):
        drawings.read_bundle(packed(tmp_path, [lines[0], "{", lines[2]]))


def bundle_lines(folder: Path) -> list[str]:
    job = Job("toy", "flat", icons.Icon("<rect/>", (0.0, 0.0, 24.0, 24.0)), read_concepts()["1F697"], 3.0, "train", "x")
    drawings.write_bundle([job, job], folder / "bundle.xz")
    return lzma.decompress((folder / "bundle.xz").read_bytes()).decode().splitlines()


def packed(folder: Path, lines: list[str]) -> Path:
    path = folder / "bundle.xz"
    path.write_bytes(lzma.compress("\n".join(lines).encode()))
    return path


def test_held_out_goes_by_families() -> None:
    concepts = read_concepts()
    assert held_out.family("1F408") == held_out.family("1F431") == held_out.family("1F408-200D-2B1B") != "1F408"
    assert held_out.family("no such thing") == "no such thing"
    colours = [held_out.colour_held_out(colour, code) for code in concepts for colour in COLOURS]
    assert 0.09 < sum(colours) / len(colours) < 0.15
    pairs = [held_out.pair_held_out(one, other) for one in list(concepts)[:80] for other in list(concepts)[80:160]]
    assert 0.07 < sum(pairs) / len(pairs) < 0.13
    assert held_out.pair_held_out("1F408", "1F3E0") == held_out.pair_held_out("1F3E0", "1F408")
    assert not held_out.colour_held_out("red", "1F697")
    assert held_out.colour_held_out("light blue", "1F415") == held_out.colour_held_out("blue", "1F415")


def test_a_composer_says_what_it_needs(composer: Composer) -> None:
    with pytest.raises(ValueError, match="split is 'test'"):
        Composer(pictures(), split="test")
    with pytest.raises(ValueError, match="none of 0 drawings"):
        Composer(pictures(), split="validation")
    with pytest.raises(ValueError, match="index is -1"):
        composer.plan(-1)
    with pytest.raises(ValueError, match="no kind of scene 'pears'; there are object, background, pair"):
        Composer(pictures(), kinds={"pears": 1.0})


def test_some_kinds_may_be_drawn_more_often(composer: Composer) -> None:
    pairs = Composer(pictures(), size=96, seed=3, kinds={"pair": 5.0})
    shares = [sum(one.plan(index).kind == "pair" for index in range(400)) / 400 for one in (composer, pairs)]
    assert shares[0] == pytest.approx(0.2, abs=0.06)
    assert shares[1] == pytest.approx(5.0 / 5.8, abs=0.06)
