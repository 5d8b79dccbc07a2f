"""Masks beside pictures: where they come from, how they are seen, and which are refused."""

import io
import json
import logging
import tarfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import typer
from discs import add_masks
from hostile import encode, noise
from PIL import Image
from typer.testing import CliRunner

from latentdiff.training.commands.doctor import doctor
from latentdiff.training.data import Wanted, prepare_pictures, read_source
from latentdiff.training.data.buckets import bucket_sizes
from latentdiff.training.data.captioned_picture import CaptionedPicture, View, covered_box, read_pixels
from latentdiff.training.data.masks import decode_mask, has_masks, read_mask
from latentdiff.training.data.picture_table import Joined
from latentdiff.training.settings import DenoiserSettings, FinetuneSettings

SIDE = 16


def half(width: int = SIDE, height: int = SIDE, mode: str = "L") -> Image.Image:
    """White at the left, black at the right."""
    values = np.zeros((height, width), np.uint8)
    values[:, : width // 2] = 255
    return Image.fromarray(values).convert(mode)


def fill(folder: Path, *masks: str, captions: bool = True) -> Path:
    """Two pictures, and masks under these names."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(("1", "2")):
        (folder / f"{name}.png").write_bytes(encode(noise(i, SIDE, SIDE)))
        if captions:
            (folder / f"{name}.txt").write_text("a thing")
    for name in masks:
        (folder / name).write_bytes(encode(half()))
    return folder


def found(place: Path, **wanted: Any) -> dict[str, CaptionedPicture]:
    source = read_source(str(place), Wanted(masks=True, **wanted))
    assert not source.refused
    return {Path(picture.name).name: picture for picture in source.pictures}


def said(folder: Path, exit_code: int = 0) -> str:
    """What ``latentdiff doctor`` says of a folder, in one line."""
    app = typer.Typer()
    app.command()(doctor)
    result = CliRunner().invoke(app, [str(folder)])
    assert result.exit_code == exit_code
    return " ".join(result.output.split())


def test_beside_a_picture_a_mask_is_no_picture(tmp_path: Path) -> None:
    folder = fill(tmp_path / "data", "1.mask.png")
    (folder / "3.mask.png").write_bytes(encode(half()))  # beside no picture: one itself
    (folder / "3.mask.txt").write_text("a mask")
    pictures = found(folder)
    assert list(pictures) == ["1.png", "2.png", "3.mask.png"]
    assert pictures["2.png"].mask is None
    assert pictures["1.png"].mask is not None
    assert pictures["1.png"].mask() == (folder / "1.mask.png").read_bytes()
    unwanted = read_source(str(folder), Wanted(caption="all"))  # as trainings of autoencoders read it
    assert [Path(picture.name).name for picture in unwanted.pictures] == list(pictures)
    assert all(picture.mask is None for picture in unwanted.pictures)
    (folder / "1.mask.txt").write_text("a picture with a caption of its own")
    assert found(folder)["1.png"].mask is None


def test_of_a_table(tmp_path: Path) -> None:
    folder = fill(tmp_path / "data", "1.mask.png", "m.png", captions=False)
    rows = [{"file_name": "1.png", "text": "a", "where": "m.png"}, {"file_name": "2.png", "text": "b"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [picture.mask is None for picture in found(folder).values()] == [False, True]
    named = found(folder, mask_column="where")
    assert getattr(named["1.png"].mask, "path", "") == str(folder / "m.png")
    assert named["2.png"].mask is None
    with pytest.raises(ValueError, match="no column 'elsewhere'; it has file_name, text, where"):
        found(folder, mask_column="elsewhere")
    (tmp_path / "secret.png").write_bytes(encode(half()))
    for wrong, message in (("../secret.png", "leaves the folder"), (7, "expected a file's name, not 7")):
        rows[1]["where"] = wrong
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        refused = read_source(str(folder), Wanted(masks=True, mask_column="where")).refused
        assert message in refused[0].reason


def test_of_shards_and_datasets(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "shard.tar", "w") as archive:
        files = {"a.jpg": encode(noise(0, SIDE, SIDE)), "a.txt": b"a thing", "a.mask.png": encode(half())}
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    mask = found(tmp_path / "shard.tar")["a.jpg"].mask
    assert mask is not None
    assert mask() == files["a.mask.png"]
    rows = {"image": [noise(0, SIDE, SIDE)], "text": ["a thing"], "where": [half()], "number": [1]}
    images = datasets.Image()
    features = {"image": images, "text": datasets.Value("string"), "where": images, "number": datasets.Value("int64")}
    datasets.Dataset.from_dict(rows, datasets.Features(features)).save_to_disk(tmp_path / "saved")
    (picture,) = found(tmp_path / "saved", mask_column="where").values()
    assert picture.mask is not None
    assert decode_mask(picture.mask(), (SIDE, SIDE)).tobytes() == half().tobytes()
    for column, message in (("elsewhere", "no column 'elsewhere'"), ("number", "the column 'number' has no pictures")):
        with pytest.raises(ValueError, match=message):
            found(tmp_path / "saved", mask_column=column)


@pytest.mark.parametrize("view", [View(16, 16), View(16, 16, (1.0, 0.0), True), View(24, 8, (0.5, 0.25), True)])
def test_a_mask_is_seen_as_its_picture_is(view: View) -> None:
    drawn = noise(3, 24, 16).convert("L")
    drawn = drawn.resize((48, 32), Image.Resampling.NEAREST) if view.height == 8 else drawn
    content = encode(drawn)
    picture = CaptionedPicture("p", lambda: content, ("",), size=drawn.size, mask=lambda: content)
    pixels = read_pixels(picture, view.width, view.height, view.crop, view.flip)[:1]
    if view.height == 16:  # nothing is resized, so to the last bit what the picture is
        torch.testing.assert_close(read_mask(picture, view, 1), ((pixels + 1) / 2).half())
    small = read_mask(picture, view, 4)
    assert small.shape == (1, view.height // 4, view.width // 4)
    blocks = torch.nn.functional.avg_pool2d(read_mask(picture, view, 1).float(), 4)
    torch.testing.assert_close(small.float(), blocks, atol=0.006, rtol=0)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "I;16", "I", "F"])
def test_masks_of_any_grey_mode(mode: str) -> None:
    if mode in ("I;16", "I", "F"):
        values = np.asarray(half()).astype(np.float32) * (1 / 255 if mode == "F" else 257)
        image = Image.fromarray(values.astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]))
    else:
        image = half(mode=mode)
    with io.BytesIO() as file:
        image.save(file, "TIFF")
        assert decode_mask(file.getvalue(), (SIDE, SIDE)).tobytes() == half().tobytes()


BAD = {
    "size": (half(8, 8), "it has 8 x 8 pixels and the picture 16 x 16"),
    "colours": (noise(1, SIDE, SIDE), "it is in colours"),
    "transparent": (Image.new("RGBA", (SIDE, SIDE), (255, 255, 255, 9)), "it is transparent in places"),
    "black": (Image.new("L", (SIDE, SIDE)), "it is all black"),
    "none": (None, "not a picture of a known format"),
}


def settings(data: Path, **more: Any) -> DenoiserSettings:
    return DenoiserSettings(data=str(data), output=str(data.parent / "out"), autoencoder="pixels", **more)


@pytest.mark.parametrize("kind", BAD)
def test_a_mask_that_cannot_be_used_spoils_its_picture(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, (image, message) = fill(tmp_path / "data", "1.mask.png", "2.mask.png"), BAD[kind]
    good = settings(folder, max_bad_share=0.5)
    assert len(prepare_pictures(good)) == 2  # what was found before does not hide what comes
    (folder / "2.mask.png").write_bytes(b"no picture at all" if image is None else encode(image))
    with pytest.raises(ValueError, match=message):
        prepare_pictures(settings(folder))
    assert [Path(picture.name).name for picture in prepare_pictures(good)] == ["1.png"]
    assert "its mask cannot be used" in caplog.text
    assert len(prepare_pictures(settings(folder, masked_loss=False))) == 2
    assert message in said(folder, exit_code=1)
    (folder / "2.mask.png").write_bytes(encode(half()))
    assert len(prepare_pictures(settings(folder))) == 2


def test_all_pictures_have_a_mask_or_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    none = Joined(prepare_pictures(settings(fill(tmp_path / "none"))))
    assert not has_masks(none, "auto")
    with pytest.raises(ValueError, match=r"2 of 2 pictures have no mask, such as .*1.png; lay a NAME.mask.png"):
        has_masks(none, True)
    some = fill(tmp_path / "some", "2.mask.png")
    with pytest.raises(ValueError, match=r"1 of 2 pictures have no mask, such as .*1.png.*masked_loss=false"):
        has_masks(Joined(prepare_pictures(settings(some))), "auto")
    assert "1 of 2 have no mask; training wants one for each" in said(some)
    every = Joined(prepare_pictures(settings(fill(tmp_path / "every", "1.mask.png", "2.mask.png"))))
    assert has_masks(every, "auto")
    assert "the loss looks at the masks" in caplog.text


def test_unlisted_masks_are_not_pointed_out(pictures: Path) -> None:
    add_masks(pictures)
    output = said(pictures)
    assert "Each has a mask" in output
    assert "is in the folder, but not in" not in output


def test_settings_that_contradict_each_other() -> None:
    values = {"data": "d", "output": "o", "mask_column": "m"}
    assert FinetuneSettings.load(None, values).masked_loss is True
    with pytest.raises(ValueError, match="mask_column does nothing with masked_loss=false"):
        FinetuneSettings.load(None, {**values, "masked_loss": False})


def test_what_is_kept_of_a_picture_lies_in_it() -> None:
    for width in range(20, 60):
        for bucket in bucket_sizes(16, 8):
            left, top, right, bottom = covered_box((width, 16), *bucket, crop=(0.5, 0.5))
            assert 0 <= left < right <= width
            assert 0 <= top < bottom <= 16
