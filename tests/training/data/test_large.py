"""Very many pictures in a table on the disk are the pictures that a few in a list are."""

import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hostile
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tars import write

from latentdiff.training.batch import conditions, filling, latents, random_choices
from latentdiff.training.batch.random_choices import PictureOrder, ViewChoice, draw_in_proportion
from latentdiff.training.data import CaptionedPicture, picture_table, prepare_pictures, prepare_splits, source
from latentdiff.training.data import large as large_module
from latentdiff.training.data.caption_checks import class_names
from latentdiff.training.data.large import Manifest
from latentdiff.training.data.load import unseen
from latentdiff.training.data.picture_table import Joined, PictureTable, TableWriter, first_captions, of_sides, weights
from latentdiff.training.data.survey import Entry, write_manifest
from latentdiff.training.settings import DenoiserSettings, RunSettings
from latentdiff.training.trainers.denoiser import train_denoiser

SHAPES = ((16, 16), (24, 12), (12, 20))


def png(i: int) -> bytes:
    return hostile.encode(Image.fromarray(np.full((*SHAPES[i % 3], 3), (i * 5 % 256, i * 3 % 256, 9), np.uint8)))


def write_shard(file: Path, numbers: Sequence[int], broken: Sequence[int] = ()) -> None:
    members = {}
    for i in numbers:
        about = {"text": ["the left one", f"thing {i % 4}"][i % 2], "weight": 1 + i % 3}
        members[f"{i:04}.png"] = b"no picture" if i in broken else png(i)
        members[f"{i:04}.json"] = json.dumps(about).encode()
    write(file, members)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(3):
        write_shard(folder / f"data-{number}.tar", range(number * 20, number * 20 + 20), broken=(7,))
    return folder


@pytest.fixture
def few_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (source, picture_table):
        monkeypatch.setattr(module, "ROWS", 8)
    monkeypatch.setattr(source, "LARGE", 10)


def settings(data: Path, output: str, **more: Any) -> RunSettings:
    return RunSettings(data=str(data), output=str(data.parent / output), resolution=16, buckets=True, **more)


def test_a_table_holds_what_a_list_does(shards: Path, request: pytest.FixtureRequest) -> None:
    listed, listed_out = prepare_splits(settings(shards, "list", held_out_share=0.2))
    request.getfixturevalue("few_are_many")
    kept, out = prepare_splits(settings(shards, "table", held_out_share=0.2))
    assert isinstance(kept, PictureTable)
    assert isinstance(out, PictureTable)
    assert list(out) == list(listed_out) != []
    assert [kept[i] for i in range(len(kept))] == list(kept) == list(listed)
    assert list(kept[3:30:4]) == list(listed)[3:30:4]
    assert kept[-1].read() == listed[-1].read() == png(59)
    assert list(pickle.loads(pickle.dumps(kept))) == list(listed)
    assert list(Joined(kept, out))[-1] == Joined(kept, out)[-1] == listed_out[-1]

    for some, others in ((kept, out), (listed, listed_out), (kept, listed_out), (listed, out)):
        assert list(unseen(others, some)) == list(listed_out)
        assert list(unseen(some, [*some[:5], *others])) == list(listed)[5:]
        assert list(unseen([], some)) == []

    assert weights(kept).tolist() == weights(listed)  # type: ignore[union-attr]
    assert list(of_sides(kept)) == of_sides(listed)
    assert first_captions(kept) == first_captions(listed)
    assert class_names(kept) == class_names(listed)
    views, other = (ViewChoice(settings(shards, "x"), pictures, 4) for pictures in (kept, listed))
    assert list(views.buckets) == list(other.buckets)
    draws = torch.rand(len(kept), 3)
    assert [views.pick(i, draws[i]) for i in range(len(kept))] == [other.pick(i, draws[i]) for i in range(len(kept))]
    assert type(views.pick(0, draws[0]).flip) is bool, "or the latents of the view would have another name"
    orders = [
        PictureOrder(weights(pictures), 4, 5, choice.buckets) for pictures, choice in ((kept, views), (listed, other))
    ]
    assert [orders[0].update(step) for step in range(40)] == [orders[1].update(step) for step in range(40)]


@pytest.mark.usefixtures("few_are_many")
def test_the_next_start_reads_no_shard(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare_pictures(settings(shards, "run"))
    with monkeypatch.context() as without:
        without.setattr(large_module, "survey", None)
        again = prepare_pictures(settings(shards, "run"))
        assert list(again) == list(first)
    assert len({picture.digest for picture in first}) == 59, "one of the sixty is broken"
    manifest = shards.parent / "run/training/manifest-train.jsonl"
    assert len(manifest.read_text().splitlines()) == 61
    write_shard(shards / "data-2.tar", range(100, 105))
    changed = prepare_pictures(settings(shards, "run"))
    assert [picture.name.rpartition("/")[2] for picture in changed][-5:] == [f"{i:04}.png" for i in range(100, 105)]
    assert len(changed) == 44
    with pytest.raises(ValueError, match="1 of 45 pictures cannot be used, more than a share of 0 "):
        prepare_pictures(settings(shards, "other", max_bad_share=0))


@pytest.mark.usefixtures("few_are_many")
def test_an_interrupted_survey_goes_on(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examined: list[str] = []
    examine = large_module.survey

    def interrupted(pictures: Any, *rest: Any) -> Any:
        if len(examined) >= 24:
            raise KeyboardInterrupt
        examined.extend(picture.name for picture in pictures)
        return examine(pictures, *rest)

    monkeypatch.setattr(large_module, "survey", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare_pictures(settings(shards, "run"))
    monkeypatch.undo()
    about = {"data": str(shards), "split": "train"}
    known = Manifest(shards.parent / "run/training/manifest-train.jsonl", about)
    assert len(known) >= 24
    assert known["data-0.tar/0003.png"].size == SHAPES[0][::-1]
    assert "data-0.tar/9999.png" not in known


@pytest.mark.usefixtures("few_are_many")
def test_a_run_does_not_go_on_with_other_pictures(shards: Path) -> None:
    first = settings(shards, "run")
    prepare_pictures(first)
    (Path(first.output) / "training/checkpoints/step-00000001").mkdir(parents=True)
    for number in range(3):
        write_shard(shards / f"data-{number}.tar", range(200 + number * 20, 220 + number * 20))
    with pytest.raises(ValueError, match="holds a run on other pictures"):
        prepare_pictures(first)


@pytest.mark.usefixtures("few_are_many")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_saved_dataset(shards: Path, tmp_path: Path) -> None:
    import datasets

    rows = {"image": [{"bytes": png(i), "path": None} for i in range(30)], "text": [f"thing {i}" for i in range(30)]}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
    first = prepare_pictures(settings(tmp_path / "saved", "run"))
    again = prepare_pictures(settings(tmp_path / "saved", "run"))
    for found in (first, again):
        assert isinstance(found, PictureTable)
        assert found[17].captions == ("thing 17",)
        assert found[17].read() == png(17)


def test_a_manifest_that_was_cut_off(tmp_path: Path) -> None:
    file, about = tmp_path / "manifest.jsonl", {"data": "x"}
    write_manifest(file, [Entry("a", digest="1"), Entry("b")], about)
    with file.open("a") as lines:
        lines.write('{"name": "c", "us')
    known = Manifest(file, about)
    known.append([Entry("a", digest="2"), Entry("d")])
    known.close()
    known = Manifest(file, about)
    assert [known[name].digest for name in "abd"] == ["2", "", ""]
    assert "c" not in known


def test_weights_that_differ_among_more_pictures_than_torch_draws_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_choices, "MOST_CATEGORIES", 4)
    shares = torch.tensor([1.0, 0.0, 3.0, 4.0, 0.0] * 2000, dtype=torch.float64)
    drawn = draw_in_proportion(shares, torch.Generator().manual_seed(0))
    counts = torch.bincount(drawn % 5, minlength=5) / len(drawn)
    torch.testing.assert_close(counts, torch.tensor([0.125, 0, 0.375, 0.5, 0]), atol=0.02, rtol=0)
    assert drawn.max() < len(shares)


def test_a_table_of_pictures_that_readers_of_all_kinds_read(tmp_path: Path) -> None:
    pictures = [CaptionedPicture(f"{i}.png", b"".join, ("a",), 0.1 * i, 0.5, f"{i:064x}", (i + 1, 2)) for i in range(5)]
    writer = TableWriter(tmp_path / "t.arrow")
    writer.add(pictures)
    writer.close()
    assert list(PictureTable(tmp_path / "t.arrow", writer.readers)) == pictures


@pytest.mark.slow
@pytest.mark.parametrize("cached", [True, False])
def test_a_training_on_a_table_is_one_on_a_list(
    shards: Path, denoiser_settings: dict[str, Any], cached: bool, request: pytest.FixtureRequest
) -> None:
    def train(output: str) -> dict[str, torch.Tensor]:
        more = {"data": str(shards), "output": str(shards.parent / output), "max_steps": 3, "buckets": True}
        more |= {"cache_latents": cached, "cache_text": cached, "held_out_share": 0.2}
        folder = train_denoiser(DenoiserSettings.load(None, {**denoiser_settings, **more}))
        return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")

    listed = train("listed")
    request.getfixturevalue("few_are_many")
    for name, weight in train("table").items():
        assert torch.equal(weight, listed[name])


@pytest.mark.slow
@pytest.mark.usefixtures("few_are_many")
def test_the_next_start_goes_through_no_cache(
    shards: Path, denoiser_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Unless a file of it has gone, or the settings ask for other views or captions."""
    filled: list[str] = []

    def watched(store: Any, keys: Sequence[str], *rest: Any, things: str, **more: Any) -> None:
        filled.append("captions" if things == "captions" else "pictures")
        filling.fill(store, keys, *rest, things=things, **more)

    for module in (latents, conditions):
        monkeypatch.setattr(module, "fill", watched)
    cache = shards.parent / "cache"

    def start(steps: int, **changed: Any) -> list[str]:
        filled.clear()
        more = {"data": str(shards), "output": str(shards.parent / "run"), "max_steps": steps, "cache_dir": str(cache)}
        train_denoiser(DenoiserSettings.load(None, {**denoiser_settings, **more, "held_out_share": 0.2, **changed}))
        return filled

    assert start(1) == ["pictures", "captions"]
    assert start(2) == []
    next((cache / "latents").glob("*/*.safetensors")).unlink()
    assert start(3) == ["pictures"]
    assert start(4) == []
    assert start(3, output=str(shards.parent / "other"), crop="random") == ["pictures"], "other views"
    with caplog.at_level("INFO", logger="latentdiff"):
        assert start(5, output=str(shards.parent / "again")) == []
    assert "all captions are encoded, as a run before has found" in caplog.text
