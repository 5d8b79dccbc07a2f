"""What ``generate``, ``many`` and ``replay`` do with what only SDXL takes."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_sdxl import tiny_refiner, tiny_sdxl
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from latentdiff import ImageToImagePipeline, TextToImagePipeline
from latentdiff.interchange.png import read_settings
from latentdiff.pipelines.batch.many import draw_many

Run = Callable[..., int]

SAID = ["--original-size", "40", "32", "--crop", "3", "5", "--target-size", "16", "24", "--prompt-2", "sun"]
SAID += ["--negative-prompt", "", "--negative-prompt-2", "red", "--negative-original-size", "8", "9"]
CALL = {"original_size": (40, 32), "crops_coords_top_left": (3, 5), "target_size": (16, 24), "prompt_2": "sun"}
CALL |= {"negative_prompt": "", "negative_prompt_2": "red", "negative_original_size": (8, 9)}


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("sdxl") / "model"
    base = tiny_sdxl()
    base.save_pretrained(folder)
    tiny_refiner(base).save_pretrained(folder.with_name("refiner"))
    return str(folder)


def test_sizes_and_second_prompts_are_drawn_with_recorded_and_replayed(sdxl: str, run: Run) -> None:
    assert run("generate", "a car", "--model", sdxl, "--steps", 2, "--seed", 1, *SAID, "-o", "car.png") == 0
    pipeline = TextToImagePipeline.from_pretrained(sdxl)
    wanted = pipeline("a car", num_inference_steps=2, seed=1, **CALL).images[0]
    with Image.open("car.png") as drawn:
        assert (np.asarray(drawn) == np.asarray(wanted)).all()
    found = read_settings(Path("car.png")) or {}
    assert {name: found[name] for name in CALL} == {
        name: list(value) if isinstance(value, tuple) else value for name, value in CALL.items()
    }
    assert run("replay", "car.png") == 0
    Path("prompts.txt").write_text("a car\n")
    assert run("many", "prompts.txt", "--model", sdxl, "--steps", 2, "--seed", 1, *SAID, "-o", "many") == 0
    with Image.open("many/000001.png") as drawn:
        assert (np.asarray(drawn) == np.asarray(wanted)).all()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--crop", "1", "2"], "--crop is for SDXL, and the model {model} is not; leave it out"),
        (["--negative-prompt-2", "x"], "--negative-prompt-2 is for SDXL"),
        (["--target-size", "0", "8"], "target_size: two numbers of pixels from 1 to 65536 are expected"),
    ],
)
def test_other_models_refuse_them(
    options: list[str], why: str, model: str, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("generate", "a car", "--model", model, "--refiner", model, "-o", "car.png") != 0
    assert "--refiner is for SDXL, and the model" in capsys.readouterr().err
    assert run("generate", "a car", "--model", model, *options, "-o", "car.png") != 0
    assert why.format(model=model) in " ".join(capsys.readouterr().err.split())
    Path("prompts.txt").write_text("a car\n")
    assert run("many", "prompts.txt", "--model", model, *options, "-o", "many") != 0
    assert not Path("car.png").exists()
    assert not Path("many").exists()


def test_a_refiner_draws_the_last_steps_and_is_recorded_and_replayed(sdxl: str, run: Run) -> None:
    refiner = str(Path(sdxl).with_name("refiner"))
    asked = ["a car", "--model", sdxl, "--refiner", refiner, "--steps", 4, "--seed", 1, "-n", 2, "--separate"]
    more = ["--negative-prompt", "sun", "--prompt-2", "red", "--aesthetic-score", 9]
    assert run("generate", *asked, *more, "--denoising-end", 0.5, "-o", "car.png") == 0
    call = {"prompt": "a car", "negative_prompt": "sun", "num_inference_steps": 4, "num_images_per_prompt": 2}
    first = TextToImagePipeline.from_pretrained(sdxl)(
        **call, prompt_2="red", seed=1, denoising_end=0.5, output_type="latent"
    )
    second = ImageToImagePipeline.from_pretrained(refiner)
    wanted = second(**call, image=first.images, denoising_start=0.5, aesthetic_score=9.0, seed=1).images
    for number, one in enumerate(wanted, 1):
        with Image.open(f"car-{number}.png") as drawn:
            assert (np.asarray(drawn) == np.asarray(one)).all()
    found = read_settings(Path("car-1.png")) or {}
    assert (found["refiner"], found["denoising_end"], len(found["refiner_digest"])) == (refiner, 0.5, 64)
    assert run("replay", "car-1.png") == 0
    Path(refiner).rename("elsewhere")
    assert run("replay", "car-1.png") != 0
    assert run("replay", "car-1.png", "--refiner", "elsewhere") == 0
    assert run("replay", "car-1.png", "--refiner", sdxl) != 0
    Path("elsewhere").rename(refiner)
    assert run("generate", *asked, "-o", "usual.png") == 0
    assert (read_settings(Path("usual-1.png")) or {})["denoising_end"] == 0.8


def test_many_refines_as_generate_does(sdxl: str, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    refiner = str(Path(sdxl).with_name("refiner"))
    asked = ["--model", sdxl, "--steps", 4, "--seed", 1, "-n", 2, "--negative-prompt", "sun", "--prompt-2", "red"]
    refined = [*asked, "--refiner", refiner, "--aesthetic-score", 9]
    assert run("generate", "a car", *refined, "--separate", "-o", "car.png") == 0
    Path("prompts.txt").write_text("a car\n")
    for drawn in (2, 0):
        assert run("many", "prompts.txt", *refined, "-o", "many") == 0
        assert f"{drawn} drawn, {2 - drawn} there already" in capsys.readouterr().out
    for number in (1, 2):
        with Image.open(f"car-{number}.png") as one, Image.open(f"many/{number:06d}.png") as other:
            assert (np.asarray(one) == np.asarray(other)).all()
    records = [read_settings(Path(file)) or {} for file in ("car-1.png", "many/000001.png")]
    for name in ("refiner", "refiner_digest", "denoising_end", "aesthetic_score"):
        assert records[0][name] == records[1][name]
    assert run("replay", "many/000001.png") == 0
    assert run("many", "prompts.txt", *refined, "--denoising-end", "0.5", "-o", "many") == 0
    assert "2 drawn" in capsys.readouterr().out
    assert run("many", "prompts.txt", *asked, "--denoising-end", "0.5", "-o", "other") != 0
    assert not Path("other").exists()


def test_a_refiner_is_taught_the_words_of_its_base_model(
    sdxl: str, run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    save_file({"clip_l": torch.randn(2, 16), "clip_g": torch.randn(2, 24)}, "x.safetensors")
    refiner = Path(sdxl).with_name("refiner")
    base, second = TextToImagePipeline.from_pretrained(sdxl), ImageToImagePipeline.from_pretrained(refiner)
    for one in (base, second):
        one.load_textual_inversion("x.safetensors", "<x>")
    call = {"prompt": "a <x>", "num_inference_steps": 4, "seed": 1}
    latents = base(**call, denoising_end=0.5, output_type="latent").images
    wanted = second(**call, image=latents, denoising_start=0.5).images[0]

    def is_drawn(file: str) -> bool:
        with Image.open(file) as drawn:
            return bool((np.asarray(drawn) == np.asarray(wanted)).all())

    Path("prompts.txt").write_text("a <x>\n")
    base.save_pretrained("taught")
    options = ["--refiner", refiner, "--steps", 4, "--seed", 1, "--denoising-end", 0.5]
    for model in (["--model", sdxl, "--embedding", "x.safetensors:<x>"], ["--model", "taught"]):
        assert run("generate", "a <x>", *model, *options, "-o", "car.png") == 0
        assert is_drawn("car.png")
        assert run("replay", "car.png") == 0
        assert run("many", "prompts.txt", *model, *options, "-o", f"many-{Path(model[1]).name}") == 0
        assert is_drawn(f"many-{Path(model[1]).name}/000001.png")

    base.refiner = ImageToImagePipeline.from_pretrained(refiner)
    asked = {"num_inference_steps": 4, "refiner": "mine", "denoising_end": 0.5, "seed": 1}
    with pytest.raises(ValueError, match=r"was taught <x>, and its refiner was not; refiner\.learn_words\(pipeline\)"):
        draw_many(base, ["a <x>"], tmp_path / "pictures", **asked)
    base.refiner.learn_words(base)
    draw_many(base, ["a <x>"], tmp_path / "pictures", **asked)
    assert is_drawn(str(tmp_path / "pictures/000001.png"))

    second.unload_textual_inversion()
    wide = CLIPTextConfig(**{**second.text_encoder_2.config.to_dict(), "hidden_size": 32})
    second.register_modules(text_encoder_2=CLIPTextModelWithProjection(wide))
    second.save_pretrained("wide")
    assert run("generate", "a <x>", "--model", "taught", "--refiner", "wide", "-o", "no.png") != 0
    said = " ".join(capsys.readouterr().err.split())
    assert "--refiner: wide cannot learn the new words of the model: these tensors: the embedding '<x>'" in said
    assert not Path("no.png").exists()


def test_draw_many_with_a_pipelines_refiner(sdxl: str, tmp_path: Path) -> None:
    pipeline, refiner = TextToImagePipeline.from_pretrained(sdxl), Path(sdxl).with_name("refiner")
    call = {"num_inference_steps": 4, "refiner": "mine", "denoising_end": 0.5}
    with pytest.raises(ValueError, match=r"the pipeline has no refiner, and mine should draw the last steps"):
        draw_many(pipeline, ["a car"], tmp_path / "pictures", **call)
    pipeline.refiner = ImageToImagePipeline.from_pretrained(refiner)
    assert draw_many(pipeline, ["a car"], tmp_path / "pictures", **call).drawn == ["000001.png"]
    found = read_settings(tmp_path / "pictures/000001.png") or {}
    assert (found["refiner"], found["refiner_digest"][:8]) == ("mine", "weights:")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--denoising-end", "0.5"], "--denoising-end needs --refiner, the model that draws the rest"),
        (["--refiner", "{other}"], "--refiner: {other} is not a model of SDXL"),
        (["--refiner", "{refiner}", "--filmstrip", "strip.png"], "without --mask and --filmstrip"),
        (["--refiner", "nowhere/at/all"], "nowhere/at/all"),
        (["--aesthetic-score", "nan"], "aesthetic_score: a finite number is expected"),
    ],
)
def test_refiners_that_cannot_be(
    sdxl: str, options: list[str], why: str, model: str, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"other": model, "refiner": str(Path(sdxl).with_name("refiner"))}
    options = [option.format(**names) for option in options]
    assert run("generate", "a car", "--model", sdxl, *options, "-o", "car.png") != 0
    assert why.format(**names) in " ".join(capsys.readouterr().err.split())
    assert not Path("car.png").exists()


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (["generate", "a car", "--model", "{sdxl}", "--runtime", "onnx", "-o", "new.png"], "is drawn with by torch"),
        (["convert", "{sdxl}", "new", "--runtime", "onnx"], "is drawn with by torch only; leave --runtime out"),
        (["convert", "{sdxl}", "new", "--to", "onnx"], "a StableDiffusionXLPipeline cannot be exported to ONNX"),
    ],
)
def test_runtimes_refuse_sdxl(
    sdxl: str, command: list[str], why: str, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("onnxruntime", "onnxscript"):
        pytest.importorskip(name)  # asked for first
    assert run(*(argument.format(sdxl=sdxl) for argument in command)) != 0
    assert why in " ".join(capsys.readouterr().err.split())
    assert not [*Path().glob("new*")]
