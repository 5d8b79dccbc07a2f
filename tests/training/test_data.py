import json
from collections import Counter
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image

from latentdiff.training.data import BatchOrder, from_dataset, load_pictures, read_pixels


def test_folder_with_metadata(pictures: Path) -> None:
    train = load_pictures(str(pictures))
    assert len(train) == 10
    assert train[0].captions == ("a red thing", "red")
    assert len(load_pictures(str(pictures), "validation")) == 2


def test_folder_with_text_files(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "one.png")
    (tmp_path / "one.txt").write_text("a red square\n", encoding="utf-8")
    (picture,) = load_pictures(str(tmp_path))
    assert picture.captions == ("a red square",)


def test_datasets_dataset_in_memory_and_on_disk(tmp_path: Path) -> None:
    columns = {"photo": [Image.new("RGB", (8, 8), "blue")], "words": ["a blue square"]}
    features = datasets.Features({"photo": datasets.Image(), "words": datasets.Value("string")})
    dataset = datasets.Dataset.from_dict(columns, features=features)
    (picture,) = from_dataset(dataset, image_column="photo", caption_column="words")
    assert picture.captions == ("a blue square",)
    torch.testing.assert_close(read_pixels(picture, 8)[:, 0, 0], torch.tensor([-1.0, -1.0, 1.0]))

    dataset.save_to_disk(str(tmp_path / "saved"))
    (picture,) = load_pictures(str(tmp_path / "saved"), image_column="photo", caption_column="words")
    assert picture.captions == ("a blue square",)
    with pytest.raises(ValueError, match="no column 'image'; it has photo, words"):
        from_dataset(dataset)


def test_pixels_are_upright_on_white_and_cropped(tmp_path: Path) -> None:
    transparent = Image.new("RGBA", (40, 20), (255, 0, 0, 0))
    transparent.save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("nothing", encoding="utf-8")
    wide = Image.new("RGB", (60, 20), "black")
    wide.paste("white", (20, 0, 40, 20))
    wide.save(tmp_path / "b.png")
    (tmp_path / "b.txt").write_text("the middle", encoding="utf-8")
    turned = Image.new("RGB", (16, 16), "black")
    turned.paste("white", (0, 0, 16, 8))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    turned.save(tmp_path / "c.png", exif=exif)
    (tmp_path / "c.txt").write_text("turned", encoding="utf-8")
    on_white, middle, upright = (read_pixels(picture, 16) for picture in load_pictures(str(tmp_path)))
    assert on_white.shape == (3, 16, 16)
    assert (on_white == 1).all()
    assert middle.mean() > 0.9
    assert upright[:, 0].mean() < -0.9
    assert upright[:, -1].mean() > 0.9


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: not JSON"),
        ('{"text": "a"}', "line 1: expected"),
        ('{"file_name": "0.png"}', "line 1: 'text' must be a caption"),
        ('{"file_name": "0.png", "text": ""}', "must be a caption"),
        ('{"file_name": "0.png", "text": 3}', "must be a caption"),
        ('{"file_name": "0.png", "text": "a", "weight": -1}', "weight must be"),
        ('{"file_name": "../x.png", "text": "a"}', "leaves the folder"),
    ],
)
def test_bad_rows_are_named(pictures: Path, line: str, message: str) -> None:
    (pictures / "metadata.jsonl").write_text(line, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_pictures(str(pictures))


def test_missing_things_are_named(tmp_path: Path, pictures: Path) -> None:
    with pytest.raises(FileNotFoundError, match="not a folder"):
        load_pictures(str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="no-such-folder: no such folder here, and no dataset of that name"):
        load_pictures("no-such-folder")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no captioned pictures"):
        load_pictures(str(tmp_path / "empty"))
    (pictures / "metadata.jsonl").write_text(json.dumps({"file_name": "gone.png", "text": "a"}), encoding="utf-8")
    with pytest.raises(FileNotFoundError, match=r"line 1: no such picture: .*gone\.png"):
        load_pictures(str(pictures))
    (pictures / "metadata.jsonl").unlink()
    with pytest.raises(ValueError, match=r"0\.png: no caption; write one into 0\.txt"):
        load_pictures(str(pictures))


@pytest.mark.parametrize("content", [b"", b"no picture at all", b"\x89PNG\r\n\x1a\n and then nothing"])
def test_unreadable_picture_is_named(pictures: Path, content: bytes) -> None:
    (pictures / "0.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"0\.png: cannot be read as a picture"):
        read_pixels(load_pictures(str(pictures))[0], 16)


def test_order_sees_every_picture_once_an_epoch() -> None:
    order = BatchOrder([1.0] * 10, batch_size=4, seed=0)
    seen = [i for n in range(5) for i in order.batch(n)]
    assert sorted(seen[:10]) == list(range(10))
    assert sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]


def test_order_is_a_function_of_the_batch_number() -> None:
    order = BatchOrder([1.0, 2.0, 3.0] * 5, batch_size=4, seed=3)
    ahead = [order.batch(n) for n in range(12)]
    assert [BatchOrder([1.0, 2.0, 3.0] * 5, 4, 3).batch(n) for n in reversed(range(12))] == ahead[::-1]
    assert [BatchOrder([1.0, 2.0, 3.0] * 5, 4, 4).batch(n) for n in range(12)] != ahead


def test_processes_share_one_order() -> None:
    whole = BatchOrder([1.0] * 12, batch_size=4, seed=0)
    halves = [BatchOrder([1.0] * 12, 2, 0, process_index=p, num_processes=2) for p in (0, 1)]
    for n in range(6):
        assert halves[0].batch(n) + halves[1].batch(n) == whole.batch(n)


def test_weights_are_shares() -> None:
    order = BatchOrder([1.0, 3.0, 0.0, 4.0] * 25, batch_size=100, seed=0)
    counts = Counter(i % 4 for n in range(40) for i in order.batch(n))
    assert counts[2] == 0
    assert counts[3] / counts[0] == pytest.approx(4, rel=0.25)
    assert counts[1] / counts[0] == pytest.approx(3, rel=0.25)
    with pytest.raises(ValueError, match="no pictures of positive weight"):
        BatchOrder([0.0, 0.0], 1, 0)
