"""``latentdiff generate`` and ``replay`` with models that draw without text."""

import json
from collections.abc import Callable
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import VAE

from latentdiff import ClassConditionalPipeline, UnconditionalPipeline, VQModel
from latentdiff.interchange.png import image_grid
from latentdiff.models import TokenTransformer, UNet2DModel
from latentdiff.pipelines import ClassTokenPipeline, UnconditionalTokenPipeline
from latentdiff.pipelines.batch.record import read_record

Run = Callable[..., int]
UNET = {
    "sample_size": 8,
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "block_out_channels": (8,),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders classes/ (with names), numbered/ (without) and any/, all in pixels."""
    folder = tmp_path_factory.mktemp("textless")
    torch.manual_seed(0)
    scheduler = diffusers.DDIMScheduler()
    of_classes = UNet2DModel(**UNET, num_class_embeds=4)
    names = {0: "cat", 1: "dog, hound", 2: "bird"}
    ClassConditionalPipeline(of_classes, scheduler, id2label=names).save_pretrained(folder / "classes")
    ClassConditionalPipeline(of_classes, scheduler).save_pretrained(folder / "numbered")
    UnconditionalPipeline(UNet2DModel(**UNET), scheduler).save_pretrained(folder / "any")
    return folder


def same(file: str, image: Image.Image) -> bool:
    with Image.open(file) as opened:
        return bool((np.asarray(opened) == np.asarray(image)).all())


def test_classes(models: Path, run: Run) -> None:
    classes, options = ["--class", "hound", "--class", "2"], ["--steps", "2", "--guidance", "2", "--seed", "3"]
    assert run("generate", "--model", models / "classes", *classes, *options, "-n", "2", "-o", "a.png") == 0
    pipeline = ClassConditionalPipeline.from_pretrained(models / "classes")
    labels = ["dog, hound"] * 2 + ["bird"] * 2
    drawn = pipeline(labels, seed=3, num_inference_steps=2, guidance_scale=2).images
    assert same("a.png", image_grid(drawn, 2))
    assert read_record(Path("a.png"))[1].prompts == ["hound", "2"]
    assert run("replay", "a.png") == 0


def test_a_single_file(models: Path, run: Run) -> None:
    for name, asked in (("classes", ["--class", "bird"]), ("any", [])):
        assert run("convert", models / name, f"{name}.safetensors") == 0
        for model in (f"{name}.safetensors", models / name):
            assert run("generate", "--model", model, *asked, "--steps", "2", "--seed", "3", "-o", f"{name}.png") == 0
            with Image.open(f"{name}.png") as drawn:
                drawn.copy().save(f"{Path(model).name}.png")
        with Image.open(f"{name}.png") as of_folder:
            assert same(f"{name}.safetensors.png", of_folder)


def test_classes_without_names(models: Path, run: Run) -> None:
    assert run("generate", "--model", models / "numbered", "--class", "3", "--steps", "2", "--seed", "1") == 0
    drawn = ClassConditionalPipeline.from_pretrained(models / "numbered")(3, seed=1, num_inference_steps=2).images[0]
    assert same("3.png", drawn)


def test_nothing_to_be_drawn_of(models: Path, run: Run) -> None:
    options = ["--steps", "2", "--seed", "1", "-n", "3", "--variation-seed", "4", "--filmstrip", "strip.png"]
    assert run("generate", "--model", models / "any", *options) == 0
    pipeline = UnconditionalPipeline.from_pretrained(models / "any")
    mixed = {"seed": [1] * 3, "variation_seed": [4, 5, 6], "variation_strength": 0.1}
    assert same("picture.png", image_grid(pipeline(3, num_inference_steps=2, **mixed).images, 2))
    assert run("replay", "picture.png") == run("replay", "strip.png") == 0


def test_many_of_classes(models: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", models / "classes", "--steps", "2", "--guidance", "2", "--seed", "3"]
    assert run("many", "--class", "hound", "--class", "bird", "-n", "2", "-o", "a", *options) == 0
    pipeline = ClassConditionalPipeline.from_pretrained(models / "classes")
    drawn = pipeline([1, 1, 2, 2], seed=3, num_inference_steps=2, guidance_scale=2).images
    assert all(same(f"a/{i + 1:06d}.png", image) for i, image in enumerate(drawn))
    assert [json.loads(line)["text"] for line in Path("a/metadata.jsonl").read_text().splitlines()] == ["hound"] * 2 + [
        "bird"
    ] * 2
    Path("kinds.csv").write_text("class,seed\ncat,1\n2,2\n")
    assert run("many", "kinds.csv", "-o", "b", *options) == 0
    (bird,) = pipeline("bird", seed=2, num_inference_steps=2, guidance_scale=2).images
    assert read_record(Path("b/000002.png"))[1].prompts == ["2"]
    with Image.open("b/000002.png") as opened:  # drawn in another batch
        assert abs(np.asarray(opened, dtype=int) - np.asarray(bird, dtype=int)).max() <= 1
    assert run("replay", "a/000003.png") == 0
    assert run("many", "kinds.csv", "-o", "b", *options) == 0
    assert "b: 0 drawn, 2 there already" in capsys.readouterr().out


def test_many_of_anything(models: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", models / "any", "--steps", "2", "--batch-size", "2"]
    assert run("many", "-n", "3", "-o", "a", *options) == 0
    pipeline = UnconditionalPipeline.from_pretrained(models / "any")
    first, _ = pipeline(2, num_inference_steps=2, seed=[0, 1]).images
    assert same("a/000001.png", first)
    assert run("many", "-n", "5", "-o", "a", *options) == 0
    assert "a: 2 drawn, 3 there already" in capsys.readouterr().out
    assert run("many", "-n", "5", "-o", "a", *options) == 0
    assert "a: 0 drawn, 5 there already" in capsys.readouterr().out


@pytest.mark.parametrize("order", ["raster", "masked"])
def test_codes(order: str, run: Run) -> None:
    torch.manual_seed(0)
    vae = VQModel(**VAE, num_vq_embeddings=16)
    small = {"order": order, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}
    UnconditionalTokenPipeline(TokenTransformer(16, 4, **small), vae).save_pretrained("any")
    ClassTokenPipeline(TokenTransformer(16, 4, num_classes=2, **small), vae, {0: "cat", 1: "dog"}).save_pretrained(
        "two"
    )
    for model, asked in (("any", []), ("two", ["--class", "dog"])):
        assert run("generate", *asked, "--model", model, "-n", "2", "--seed", "3", "-o", f"{model}.png") == 0
        assert run("replay", f"{model}.png") == 0
        assert run("many", *asked, "--model", model, "-n", "2", "--seed", "3", "-o", f"{model}-many") == 0
        with Image.open(f"{model}-many/000001.png") as first, Image.open(f"{model}-many/000002.png") as second:
            assert same(f"{model}.png", image_grid([first.copy(), second.copy()], 2))


def test_mistakes_of_many(models: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    Path("kinds.txt").write_text("cat\ncow\n")
    for model, arguments, message in (
        ("classes", ["kinds.txt"], "there is no class 'cow'; there are bird, cat, dog, hound"),
        ("classes", ["-n", "3"], "say of which: --class NAME"),
        ("classes", ["--class", "cat", "--negative-prompt", "dog"], "--negative-prompt: the model"),
        ("any", ["kinds.txt"], "does not draw from words; leave the file out, and say with -n how many"),
        ("any", ["--class", "cat"], "was trained without classes; leave it out"),
    ):
        assert run("many", *arguments, "--model", models / model, "--steps", "2", "-o", "out") == 2
        assert message in capsys.readouterr().err
        assert not Path("out").exists()


MISTAKES: list[tuple[str, list[str], str]] = [
    ("classes", [], "say of which: --class NAME"),
    ("classes", ["a cat"], "classes does not draw from words; say --class NAME"),
    ("classes", ["--class", "cow"], "there is no class 'cow'; there are bird, cat, dog, hound"),
    ("classes", ["--class", "3"], "there is no class 3; they are numbered from 0 to 2"),
    ("classes", ["--class", "cat", "--negative-prompt", "dog"], "--negative-prompt: the model"),
    ("classes", ["--class", "cat", "--image", "in.png"], "draws without text, and starts from no picture"),
    ("any", ["a cat"], "does not draw from words; leave the prompt out, and say with -n how many"),
    ("any", ["--class", "cat"], "was trained without classes; leave it out"),
    ("any", ["--guidance", "2"], "draws from nothing that could guide it; leave it out"),
    ("any", ["--lora", "x.safetensors"], "--lora: the model"),
]


@pytest.mark.parametrize(("model", "arguments", "message"), MISTAKES)
def test_mistakes(
    model: str, arguments: list[str], message: str, models: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (8, 8)).save("in.png")
    assert run("generate", "--model", models / model, *arguments, "--steps", "2", "-o", "out.png") == 2
    assert message in capsys.readouterr().err
    assert not Path("out.png").exists()


def test_models_with_text_have_no_classes(model: str, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--class", "cat"], "draws from words and has no classes"),
        ([], "PROMPT: say what to draw"),
    ):
        assert run("generate", "--model", model, *arguments) == 2
        assert message in capsys.readouterr().err
