from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from latentdiff.interchange.png import check_output, image_grid, read_settings, save_picture

SETTINGS: dict[str, Any] = {
    "prompts": ["a red car", "赤い車"],
    "negative_prompt": "blue",
    "num_inference_steps": 20,
    "scheduler": "DDIMScheduler",
    "guidance_scale": 4.0,
    "seed": 7,
    "width": 8,
    "height": 8,
    "model": "emoji",
    "version": "0.1.0",
}


def test_settings_are_written_and_read(tmp_path: Path) -> None:
    file = tmp_path / "new" / "car.png"
    save_picture(Image.new("RGB", (8, 8), "red"), file, SETTINGS)
    assert read_settings(file) == SETTINGS
    assert [entry.name for entry in file.parent.iterdir()] == ["car.png"]
    with Image.open(file) as image:
        assert image.text["parameters"] == (  # type: ignore[attr-defined]
            "a red car\n赤い車\nNegative prompt: blue\nSteps: 20, Sampler: DDIMScheduler, CFG scale: 4.0, Seed: 7, "
            "Size: 8x8, Model: emoji, Version: latentdiff 0.1.0"
        )


def test_other_files_have_no_settings(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "other.png")
    (tmp_path / "text.png").write_text("hello")
    for name in ("other.png", "text.png", "missing.png"):
        assert read_settings(tmp_path / name) is None


def test_only_our_own_files_are_replaced(tmp_path: Path) -> None:
    save_picture(Image.new("RGB", (8, 8)), tmp_path / "ours.png", SETTINGS)
    check_output(tmp_path / "ours.png")
    check_output(tmp_path / "new.png")
    (tmp_path / "other.png").write_text("precious")
    with pytest.raises(FileExistsError, match="was not drawn by latentdiff"):
        check_output(tmp_path / "other.png")
    check_output(tmp_path / "other.png", overwrite=True)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(FileExistsError, match="is a folder"):
        check_output(tmp_path / "folder.png", overwrite=True)
    with pytest.raises(ValueError, match=r"name it car\.png"):
        check_output(tmp_path / "car.jpg")


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_picture(Image.new("RGB", (8, 8), "red"), tmp_path / "car.png", SETTINGS)
    before = (tmp_path / "car.png").read_bytes()

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_picture(Image.new("RGB", (8, 8), "blue"), tmp_path / "car.png", SETTINGS)
    assert (tmp_path / "car.png").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_grid() -> None:
    images = [Image.new("RGB", (4, 3), colour) for colour in ("red", "green", "blue")]
    grid = image_grid(images, columns=2, gap=1)
    assert grid.size == (9, 7)
    assert grid.getpixel((0, 4)) == (0, 0, 255)
    assert grid.getpixel((6, 5)) == (255, 255, 255)
    with pytest.raises(ValueError, match="at least one"):
        image_grid([], 2)
