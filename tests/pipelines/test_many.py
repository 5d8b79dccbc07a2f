"""Many prompts to a folder."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lives import forks, kill, live, start, wait
from PIL import Image
from tiny import tiny_pipeline

from latentdiff import TextToImagePipeline
from latentdiff.interchange.png import read_settings
from latentdiff.pipelines.batch.many import draw_many

PROMPTS: list[Any] = ["a cup", {"prompt": "a red cup", "guidance_scale": 2.0}, "a sun", "a car", "a hat"]
CALL: dict[str, Any] = {"num_inference_steps": 2, "batch_size": 2}


@pytest.fixture(scope="module")
def pipeline() -> TextToImagePipeline:
    return tiny_pipeline("clip")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_folder_of_pictures_and_their_table(pipeline: Any, tmp_path: Path) -> None:
    report = draw_many(pipeline, PROMPTS, tmp_path / "out", seed=7, **CALL)
    names = [f"{i:06d}.png" for i in range(1, 6)]
    assert sorted(report.drawn) == names
    assert (report.kept, report.failed, report.withheld) == ([], {}, [])
    assert sorted(contents(tmp_path / "out")) == [*names, "metadata.jsonl"]
    table = rows(tmp_path / "out")
    assert [row["file_name"] for row in table] == names
    assert [row["text"] for row in table] == ["a cup", "a red cup", "a sun", "a car", "a hat"]
    assert [row["seed"] for row in table] == [7, 8, 9, 10, 11]
    assert table[1]["guidance_scale"] == 2.0
    with Image.open(tmp_path / "out" / names[1]) as image:  # alone in its batch
        drawn = pipeline("a red cup", seed=8, guidance_scale=2.0, num_inference_steps=2).images[0]
        assert image.tobytes() == drawn.tobytes()


def test_only_what_is_missing_or_other_is_drawn(pipeline: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    draw_many(pipeline, PROMPTS, out, **CALL)
    before = contents(out)
    again = draw_many(pipeline, PROMPTS, out, **CALL)
    assert (again.drawn, len(again.kept)) == ([], 5)
    (out / "000004.png").unlink()
    again = draw_many(pipeline, PROMPTS, out, **CALL)
    assert again.drawn == ["000004.png"]
    assert contents(out) == before, "bit for bit, drawn in the same batch"
    changed = [*PROMPTS[:4], "another hat"]
    assert draw_many(pipeline, changed, out, **CALL).drawn == ["000005.png"]
    assert rows(out)[4]["text"] == "another hat"
    assert len(draw_many(pipeline, changed, out, **{**CALL, "num_inference_steps": 3}).drawn) == 5
    assert draw_many(pipeline, [*changed, "more"], out, **{**CALL, "num_inference_steps": 3}).drawn == ["000006.png"]


def test_a_prompt_with_a_line_separator_can_be_continued(pipeline: Any, tmp_path: Path) -> None:
    for drawn in (1, 0):
        assert len(draw_many(pipeline, ["a\u2028cup"], tmp_path, **CALL).drawn) == drawn


def test_numbers_of_other_libraries(pipeline: Any, tmp_path: Path) -> None:
    others = {"seed": np.int64(3), "batch_size": np.int64(2), "height": np.int64(16), "guidance_scale": np.float32(2)}
    draw_many(pipeline, ["a cup"], tmp_path, **{**CALL, **others})
    plain = {"seed": 3, "batch_size": 2, "height": 16, "guidance_scale": 2.0}
    assert draw_many(pipeline, ["a cup"], tmp_path, **{**CALL, **plain}).drawn == []


def test_another_model_draws_all_again(pipeline: Any, tmp_path: Path) -> None:
    other = tiny_pipeline("clip")
    assert draw_many(other, PROMPTS, tmp_path, **CALL).kept == []
    assert draw_many(pipeline, PROMPTS, tmp_path, **CALL).drawn == [], "the same weights in another pipeline"
    other.unet.conv_out.weight.data += 0.1
    assert len(draw_many(other, PROMPTS, tmp_path, **CALL).drawn) == 5


def test_the_batch_changes_next_to_nothing(pipeline: Any, tmp_path: Path) -> None:
    for name, size in (("a", 1), ("b", 8)):
        draw_many(pipeline, PROMPTS, tmp_path / name, **{**CALL, "batch_size": size})
    for i in range(1, 6):
        a, b = (np.asarray(Image.open(tmp_path / name / f"{i:06d}.png")).astype(int) for name in "ab")
        assert abs(a - b).max() <= 1
    assert draw_many(pipeline, PROMPTS, tmp_path / "a", **{**CALL, "batch_size": 3}).drawn == []


def test_what_fails_does_not_stop_the_rest(pipeline: Any, tmp_path: Path) -> None:
    prompts = ["a cup", {"prompt": "a sun", "height": 15}, {"prompt": "a car", "num_inference_steps": 5000}, "a hat"]
    report = draw_many(pipeline, prompts, tmp_path, **CALL)
    assert report.drawn == ["000001.png", "000004.png"]
    assert "height=15 is not a multiple of 2" in report.failed["000002.png"]
    assert "num_inference_steps must lie in [1, 1000]" in report.failed["000003.png"]
    assert [row["file_name"] for row in rows(tmp_path)] == ["000001.png", "000004.png"]


def test_one_bad_prompt_does_not_take_its_batch_along(pipeline: Any, tmp_path: Path) -> None:
    too_long = "a cup " * 50

    class Strict(TextToImagePipeline):
        def condition(self, prompts: Any, *options: Any) -> Any:
            if too_long in prompts.texts:
                raise ValueError("a prompt is too long")
            return super().condition(prompts, *options)

    strict = Strict.from_pipe(pipeline)
    strict.set_progress_bar_config(disable=True)
    strict.register_defaults(**pipeline.defaults)
    report = draw_many(strict, ["a cup", too_long, "a hat"], tmp_path, num_inference_steps=2)
    assert report.failed == {"000002.png": "a prompt is too long"}
    assert report.drawn == ["000001.png", "000003.png"]


def test_withheld_pictures_are_no_data(pipeline: Any, tmp_path: Path) -> None:
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(vision_config={**vision, "image_size": 16, "patch_size": 8}, projection_dim=8)
    checker = StableDiffusionSafetyChecker(config)
    checker.concept_embeds_weights.data.fill_(-1.0)  # objects to everything
    extractor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    strict = TextToImagePipeline.from_pipe(pipeline, safety_checker=checker, feature_extractor=extractor)
    strict.set_progress_bar_config(disable=True)
    for drawn in (2, 0):  # the second time they are there, and known
        report = draw_many(strict, ["a cup", "a hat"], tmp_path, num_inference_steps=2)
        assert len(report.drawn) == drawn
        assert sorted(report.withheld) == ["000001.png", "000002.png"]
        assert not (tmp_path / "metadata.jsonl").exists()
    pipeline.set_progress_bar_config(disable=True)
    draw_many(pipeline, ["a cup", "a hat", "a car"], tmp_path, num_inference_steps=2)
    assert [row["file_name"] for row in rows(tmp_path)] == ["000001.png", "000002.png", "000003.png"]


def test_others_files_are_not_replaced(pipeline: Any, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "000003.png")
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match=r"000003\.png exists and was not drawn by latentdiff"):
        draw_many(pipeline, PROMPTS, tmp_path, **CALL)
    assert contents(tmp_path) == before
    (tmp_path / "000003.png").unlink()
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "mine.png", "text": "mine"}\n')
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match=r"metadata\.jsonl exists and was not written by latentdiff"):
        draw_many(pipeline, PROMPTS, tmp_path, **CALL)
    assert contents(tmp_path) == before
    (tmp_path / "metadata.jsonl").rename(tmp_path / "metadata.csv")
    with pytest.raises(FileExistsError, match="a table of its own"):
        draw_many(pipeline, PROMPTS, tmp_path, **CALL)


@pytest.mark.parametrize("before", [False, True])
def test_a_name_that_cannot_be_written_does_not_stop_the_rest(before: bool, pipeline: Any, tmp_path: Path) -> None:
    if before:  # a picture of an earlier run where now a folder is wanted
        draw_many(pipeline, [{"prompt": "a cup", "file_name": "a.png"}], tmp_path, **CALL)
    (tmp_path / "circle").symlink_to("circle")
    names = ["x" * 300 + ".png", "new/" + "y" * 300 + ".png", "A.png/b.png", "a.png/b/c.png", "circle/d.png"]
    rest = [] if before else ["a.png"]
    prompts = ["a cup", *({"prompt": "a hat", "file_name": name} for name in [*names, *rest]), "a sun"]
    if before:
        names.remove("A.png/b.png")  # where upper case is another name, it is possible
        prompts.pop(3)
    report = draw_many(pipeline, prompts, tmp_path, **CALL)
    assert {*report.failed} == {*names}
    assert "too long" in report.failed[names[0]]
    assert "too long" in report.failed[names[1]]
    assert ("a.png is a picture of this table" in report.failed["a.png/b/c.png"]) != before
    assert report.drawn == ["000001.png", *rest, f"00000{len(prompts)}.png"]
    assert {row["file_name"] for row in rows(tmp_path)} == {*report.drawn, "a.png"}


def test_a_full_disk_stops(pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match=r"No space left .*/000001\.png"):
        draw_many(pipeline, PROMPTS, tmp_path, **CALL)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("name", ["000002.png", "metadata.jsonl"])
@pytest.mark.parametrize("kind", ["pipe", "link to a device"])
def test_a_pipe_or_a_device_in_the_folder(kind: str, name: str, pipeline: Any, tmp_path: Path) -> None:
    if kind == "pipe":
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(FileExistsError, match=f"{name} exists and was not"):
        draw_many(pipeline, PROMPTS, tmp_path, **CALL)


def test_spoilt_pictures_are_not_written(pipeline: Any, tmp_path: Path) -> None:
    prompts = ["a cup", {"prompt": "a hat", "guidance_scale": 1e38}, "a sun"]
    report = draw_many(pipeline, prompts, tmp_path, **CALL)
    assert report.drawn == ["000001.png", "000003.png"]
    assert "not written, for a network gave values that are not finite" in report.failed["000002.png"]
    assert [row["file_name"] for row in rows(tmp_path)] == report.drawn
    again = draw_many(pipeline, prompts, tmp_path, **CALL)
    assert (again.drawn, [*again.failed]) == ([], ["000002.png"])


def test_names_stay_in_the_folder(pipeline: Any, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "link").symlink_to(tmp_path / "outside")
    for name in ("../x.png", str(tmp_path / "x.png"), "link/x.png"):
        with pytest.raises(ValueError, match=r"leaves|leads out"):
            draw_many(pipeline, [{"prompt": "a cup", "file_name": name}], tmp_path / "out", **CALL)
    assert list((tmp_path / "outside").iterdir()) == []
    draw_many(pipeline, [{"prompt": "a cup", "file_name": "sub/x.png"}], tmp_path / "out", **CALL)
    draw_many(pipeline, ["a hat"], tmp_path / "out", **CALL)
    assert [row["file_name"] for row in rows(tmp_path / "out")] == ["sub/x.png", "000001.png"], "earlier rows stay"


@pytest.mark.parametrize(
    ("prompts", "options", "error"),
    [
        ([], {}, "there are no prompts"),
        ([{"text": "a"}], {}, "prompt 1: unknown column 'text'"),
        (["a", 3], {}, "prompt 2: a text or a mapping is expected"),
        (["a"], {"magic": 1}, "magic: Extra inputs are not permitted"),
        (["a"], {"batch_size": 0}, r"batch_size must lie in \[1, 4096\], not 0"),
        (["a"], {"guidance_scale": float("nan")}, r"guidance_scale: a finite number is expected \(got nan\)"),
        ([{"prompt": "a", "guidance_scale": float("inf")}], {}, r"prompt 1: guidance_scale: a finite number is"),
        (["a"], {"guidance_interval": (float("nan"), 1.0)}, "guidance_interval: two noise levels are expected"),
        (["a"], {"loras": [{"file": "a", "sha256": "0" * 64, "scale": float("nan")}]}, r"loras\.0\.scale: .*finite"),
        (["a"], {"seed": -1}, "a seed is a whole number from 0, not -1"),
        (["a", "b"], {"seed": 2**63 - 1}, "the seed 9223372036854775807 is too large"),
        (["a"], {"seed": 1.5}, "seed must be a whole number, not 1.5"),
        (["a"], {"seed": True}, "seed must be a whole number, not True"),
        (["a"], {"batch_size": "x"}, "batch_size must be a whole number, not 'x'"),
        (["a"], {"height": 15}, "height=15 is not a multiple of 2"),
    ],
)
def test_mistakes(prompts: Any, options: dict[str, Any], error: str, pipeline: Any, tmp_path: Path) -> None:
    with pytest.raises((ValueError, TypeError), match=error):
        draw_many(pipeline, prompts, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_the_folder_is_data(pipeline: Any, tmp_path: Path) -> None:
    import datasets

    from latentdiff.training.data.load import load_pictures

    draw_many(pipeline, PROMPTS, tmp_path / "out", **CALL)
    loaded = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert loaded["train"]["text"] == ["a cup", "a red cup", "a sun", "a car", "a hat"]
    assert loaded["train"][0]["image"].size == (16, 16)
    found = load_pictures(str(tmp_path / "out"))
    assert [one.captions for one in found] == [("a cup",), ("a red cup",), ("a sun",), ("a car",), ("a hat",)]


@pytest.mark.slow
@forks
def test_two_processes_and_a_kill(pipeline: Any, tmp_path: Path) -> None:
    """The same folder, bit for bit, whatever the number of processes, and after kills."""
    prompts = [f"a cup {'abcdefghijklmnopqrstuvwxyz'[i % 26]}" for i in range(40)]
    log = tmp_path / "log.txt"

    def work(name: str) -> None:
        draw_many(pipeline, prompts, tmp_path / name, seed=3, num_inference_steps=10, batch_size=4)

    live(lambda: work("one"), log)
    live(lambda: work("two"), log, processes=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    children = start(lambda: work("killed"), log, processes=2)
    while len(list((tmp_path / "killed").glob("0*.png"))) < 9:
        assert (tmp_path / "log.txt").exists()
    kill(children)
    wait(children)
    some = contents(tmp_path / "killed")
    assert 0 < len([name for name in some if name.startswith("0")]) < 40
    live(lambda: work("killed"), log)
    finished = {name: data for name, data in contents(tmp_path / "killed").items() if not name.startswith(".")}
    assert finished == contents(tmp_path / "one")
    assert read_settings(tmp_path / "two" / "000011.png")["seed"] == 13  # type: ignore[index]
