"""Composed scenes: the same for the same index, nothing held out in them, and what captions say is there."""

import hashlib
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from latentdiff.training.recipes.emoji import drawings, held_out, icons
from latentdiff.training.recipes.emoji.captions import Concept, read_concepts, without_unseen
from latentdiff.training.recipes.emoji.colour import TARGETS, turn
from latentdiff.training.recipes.emoji.drawings import Drawing, Job
from latentdiff.training.recipes.emoji.grammar import article, coloured, counted, plural
from latentdiff.training.recipes.emoji.scenes import Composer, Plan

resvg = pytest.mark.skipif(importlib.util.find_spec("resvg_py") is None, reason="resvg-py is not installed")

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
    assert texts != [Composer(pictures(), size=96, seed=4).plan(index).captions for index in range(40)]
    digest = hashlib.sha256("\n".join(text for captions in texts for text in captions).encode()).hexdigest()
    assert digest == hashlib.sha256("\n".join(text for scene in first for text in scene.captions).encode()).hexdigest()


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
def test_a_folder_of_scenes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_unseen_names_are_no_part_of_any_other_name() -> None:
    concepts = read_concepts()
    unseen = [name for concept in concepts.values() for name in concept.unseen]
    assert len(set(unseen)) >= 80
    for concept in concepts.values():
        assert without_unseen(concept, unseen) == concept
    assert without_unseen(Concept("1F698", 1.0, "-", ("oncoming automobile",)), unseen) is None
