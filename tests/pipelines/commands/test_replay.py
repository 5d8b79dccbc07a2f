"""Pictures drawn again from what their files say."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tiny import tiny_pipeline

from latentdiff import TextToImagePipeline
from latentdiff.interchange.fingerprint import file_digest
from latentdiff.interchange.png import KEY, read_settings, save_picture
from latentdiff.pipelines.batch.many import draw_many

Run = Callable[..., int]


@pytest.fixture
def cup(model: str, run: Run) -> Path:
    """A picture drawn in a batch of two."""
    options = ["--steps", "2", "--seed", "5", "-n", "2", "--separate", "-o", "cup.png"]
    assert run("generate", "a red cup", "--model", model, *options) == 0
    return Path("cup-2.png").absolute()


def rewrite(file: Path, image: Image.Image | None = None, **changes: Any) -> None:
    """Change what is said in a picture, or the picture."""
    settings = read_settings(file) or {}
    with Image.open(file) as old:
        save_picture(image or old.copy(), file, {**settings, **changes})


def test_equal(cup: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    before = cup.read_bytes()
    assert run("replay", cup, "-o", "again.png") == 0
    assert re.search(r"again\.png, .*cup-2\.png: equal, \d", capsys.readouterr().out)
    with Image.open(cup) as a, Image.open("again.png") as b:
        assert a.tobytes() == b.tobytes()
    assert cup.read_bytes() == before
    assert read_settings(Path("again.png")) == read_settings(cup)
    assert run("replay", "again.png") == 0, "the new one can be drawn again too"


@pytest.mark.parametrize(
    "options",
    [
        ["-n", "3"],
        ["-n", "2", "--scheduler", "euler-ancestral", "--negative-prompt", "blue", "--guidance", "2"],
        ["-n", "2", "--variation-seed", "3", "--prompt-weights", "--guidance-rescale", "0.5"],
        ["--precision", "bfloat16", "--height", "32"],
        ["-n", "11"],
        ["-n", "2", "--image", "photo.png"],
        ["-n", "2", "--image", "photo.png", "--mask", "mask.png", "--strength", "0.9"],
    ],
)
def test_all_kinds(options: list[str], model: str, run: Run, tmp_path: Path) -> None:
    Image.effect_noise((32, 24), 90).convert("RGB").save(tmp_path / "photo.png")
    Image.linear_gradient("L").resize((32, 24)).save(tmp_path / "mask.png")
    assert run("generate", "a cup", "a red thing", "--model", model, "--steps", "3", *options, "-o", "a.png") == 0
    assert run("replay", "a.png") == 0


def test_not_equal(cup: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with Image.open(cup) as image:
        changed = image.copy()
    red, green, blue = changed.getpixel((3, 3))
    changed.putpixel((3, 3), (red, (green + 7) % 256, blue))
    changed.putpixel((4, 4), tuple(255 - value for value in changed.getpixel((4, 4))))
    rewrite(cup, changed)
    assert run("replay", cup) == 1
    out = capsys.readouterr().out
    assert re.search(r"cup-2\.png: 2 of 256 pixels differ, by at most \d+ of 255, .*Nothing that is known was", out)
    machine = {**(read_settings(cup) or {})["machine"], "threads": torch.get_num_threads() + 10_000, "torch": "1.0"}
    rewrite(cup, machine=machine)
    threads = torch.get_num_threads()
    try:
        assert run("replay", cup, "--threads", "1") == 1
    finally:
        torch.set_num_threads(threads)
    out = capsys.readouterr().out
    assert f"number of threads ({machine['threads']} then, 1 now), torch (1.0 then, {torch.__version__} now)." in out


def test_another_size(cup: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    rewrite(cup, Image.new("RGB", (18, 16)))
    assert run("replay", cup) == 1
    assert "the file has 18 x 16 pixels and the new picture 16 x 16" in capsys.readouterr().out
    rewrite(cup, Image.new("RGB", (8, 8)))
    assert run("replay", cup) == 2
    assert "has 8 x 8 pixels, and says that it shows pictures of 16 x 16" in capsys.readouterr().err


def test_the_model_elsewhere(
    cup: Path, model: str, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(cup, model="gone/away/model")
    assert run("replay", cup) == 2
    assert "say with --model where it is" in capsys.readouterr().err
    shutil.copytree(model, tmp_path / "copy")
    assert run("replay", cup, "--model", "copy") == 0


def test_a_folder_and_one_file_of_it_are_one_model(run: Run, tmp_path: Path) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "new")  # with BERT, which Stable Diffusion's layout has no place for
    assert run("convert", "new", "model") == 0  # the first loading adds keys to the tokenizer's config
    assert run("convert", "model", "full.safetensors") == run("convert", "full.safetensors", "back") == 0
    assert run("generate", "a red cup", "--model", "full.safetensors", "--steps", "2", "-o", "cup.png") == 0
    for same in ("full.safetensors", "back", "model"):
        assert run("replay", "cup.png", "--model", same) == 0
    rewrite(Path("cup.png"), model_digest=file_digest(Path("full.safetensors")))  # as it was before
    assert run("replay", "cup.png", "-o", "again.png") == 0
    assert run("replay", "cup.png", "--model", "back") == 2


def test_another_model(cup: Path, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tiny_pipeline("clip")
    torch.manual_seed(1)
    torch.nn.init.normal_(other.unet.conv_out.weight)
    other.save_pretrained(tmp_path / "other")
    assert run("replay", cup, "--model", "other", "-o", "new.png") == 2
    error = capsys.readouterr().err
    assert "was drawn with another model" in error
    assert "--any-model" in error
    assert not Path("new.png").exists()
    assert run("replay", cup, "--model", "other", "-o", "new.png", "--any-model") == 1
    assert re.search(r"pixels differ.*Otherwise then: model \(\w{16} then, \w{16} now\)", capsys.readouterr().out)
    assert run("replay", "new.png", "--model", "other") == 0


def test_a_picture_does_not_make_us_ask_the_network(
    cup: Path, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import socket

    def refuse(*arguments: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    rewrite(cup, model="somebody/something")
    assert run("replay", cup) == 2
    assert "the model 'somebody/something', with which this picture was drawn, is not here" in capsys.readouterr().err


def test_what_it_was_drawn_from_is_gone_or_changed(
    model: str, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    Image.effect_noise((16, 16), 90).save(tmp_path / "in" / "photo.png")
    options = ["--image", "in/photo.png", "-o", "new.png", "--steps", "2"]
    assert run("generate", "a cup", "--model", model, *options) == 0
    shutil.move("in/photo.png", "photo.png")
    assert run("replay", "new.png") == 0, "found beside the picture"
    Image.effect_noise((16, 16), 90).save("photo.png")
    assert run("replay", "new.png") == 2
    assert "in/photo.png has changed since this picture was made with it" in capsys.readouterr().err
    Path("photo.png").unlink()
    assert run("replay", "new.png") == 2
    assert "in/photo.png, which this picture was made with, is not there" in capsys.readouterr().err


def test_files_that_cannot_be_drawn_again(cup: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (8, 8)).save("other.png")
    Image.new("RGB", (8, 8)).save("other.jpg")
    info = PngInfo()
    info.add_text(KEY, "{nonsense")
    Image.new("RGB", (8, 8)).save("nonsense.png", pnginfo=info)
    settings = read_settings(cup) or {}
    before_digests = {key: settings[key] for key in settings if key not in ("batches", "pictures", "machine")}
    save_picture(Image.new("RGB", (8, 8)), Path("old.png"), {**before_digests, "version": "0.0.1"})
    save_picture(Image.new("RGB", (8, 8)), Path("new.png"), {**settings, "version": "99.0", "magic": True})
    save_picture(Image.new("RGB", (8, 8)), Path("index.png"), {**settings, "pictures": [[0, 7]]})
    Path("text.png").write_text("hello")
    expected = {
        "other.png": "other.png has no settings of latentdiff in it",
        "other.jpg": "other.jpg has no settings of latentdiff in it",
        "nonsense.png": "nonsense.png has settings that cannot be read",
        "old.png": "old.png was drawn by latentdiff 0.0.1, whose settings this version cannot draw again: batches",
        "new.png": "new.png was drawn by latentdiff 99.0, whose settings this version cannot draw again: magic",
        "index.png": "there is no picture 7 in a batch 0",
        "text.png": "text.png is not a picture of a known format",
        "missing.png": "missing.png: no such file",
    }
    for name, message in expected.items():
        assert run("replay", name) == 2
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error


def test_a_record_that_asks_for_too_much(cup: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    batch = {"prompts": ["a"] * 4096, "seeds": [1] * 4096}
    every = [[i, 0] for i in range(40)]
    for changes, message in (
        ({"batches": [batch] * 40, "pictures": every}, "163840 pictures would have to be drawn for the 40 in the file"),
        ({"filmstrip": 10**9}, "filmstrip: it must be at most 4096"),
        ({"pictures": [[0, 1]] * 40, "columns": 8}, "says that it shows 40 pictures of 16 x 16; it was changed"),
        ({"pictures": [[0, 1]] * 40, "columns": 10**9}, "says that it shows 40 pictures of 16 x 16; it was changed"),
        ({"guidance_scale": float("nan")}, "guidance_scale: a finite number is expected"),
    ):
        Path("new.png").write_bytes(cup.read_bytes())
        rewrite(Path("new.png"), **changes)
        assert run("replay", "new.png") == 2
        assert message in capsys.readouterr().err


def test_outputs_in_the_way(cup: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("replay", cup, "-o", cup) == 2
    assert "is the picture itself" in capsys.readouterr().err
    Path("mine.png").write_text("precious")
    assert run("replay", cup, "-o", "mine.png") == 2
    assert Path("mine.png").read_text() == "precious"


def test_pictures_drawn_from_python(model: str, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = TextToImagePipeline.from_pretrained(model)
    draw_many(pipeline, ["a cup", "a hat"], tmp_path / "out", num_inference_steps=2)
    assert run("replay", "out/000002.png") == 0
    pipeline.unet.conv_out.weight.data += 0.1
    draw_many(pipeline, ["a cup", "a hat"], tmp_path / "out", num_inference_steps=2)
    assert run("replay", "out/000002.png") == 2
    assert "was drawn with another model" in capsys.readouterr().err


def test_settings_are_plain(cup: Path) -> None:
    with Image.open(cup) as image:
        settings = json.loads(image.info[KEY])
        assert f"Model hash: {settings['model_digest'][:10]}" in image.info["parameters"]
    assert settings["batches"] == [{"prompts": ["a red cup"] * 2, "seeds": [5, 6]}]
    assert settings["pictures"] == [[0, 1]]
    assert settings["seed"] == 6


def test_a_mask_without_its_picture_is_refused(cup: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    rewrite(cup, mask={"file": "mask.png", "sha256": "0" * 64})
    assert run("replay", cup) == 2
    assert "there is a mask and no image, the picture that it is of" in capsys.readouterr().err
