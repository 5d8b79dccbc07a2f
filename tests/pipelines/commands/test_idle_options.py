"""An option that does nothing with the model at hand is refused, in a sentence that says why."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import VAE, tiny_pipeline
from tiny_codes import randomized, save_codes
from tiny_sdxl import tiny_refiner, tiny_sdxl
from tiny_transformers import dit_folder, pixart_folder

from latentdiff import ClassConditionalPipeline, UnconditionalPipeline, VQModel
from latentdiff.models import TokenTransformer, UNet2DModel
from latentdiff.pipelines import ClassTokenPipeline, UnconditionalTokenPipeline

Run = Callable[..., int]
PIXELS = {"sample_size": 8, "block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 4}
PIXELS |= {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each family."""
    folder = tmp_path_factory.mktemp("families")
    tiny_pipeline("clip").save_pretrained(folder / "sd")
    base = tiny_sdxl()
    base.save_pretrained(folder / "sdxl")
    tiny_refiner(base).save_pretrained(folder / "refiner")
    torch.manual_seed(0)
    scheduler = diffusers.DDIMScheduler()
    ClassConditionalPipeline(
        UNet2DModel(**PIXELS, num_class_embeds=4), scheduler, id2label={0: "a", 1: "b", 2: "c"}
    ).save_pretrained(folder / "classes")
    UnconditionalPipeline(UNet2DModel(**PIXELS), scheduler).save_pretrained(folder / "any")
    save_codes(folder)
    picture = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(picture).save(folder / "in.png")
    return folder


TOKENS: dict[str, Any] = {"order": "masked", "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}


UNGUIDED = "it acts by guidance, of which there is none at a scale of 1, but above 1; leave it out"
REFUSED: list[tuple[str, str, str]] = [
    ("a --model sd", "--variation-strength 0.5", "--variation-strength needs --variation-seed"),
    ("a --model sd", "--strength 0.5", "--strength needs --image"),
    ("a --model sd", "--temperature 0.5", "--temperature: the model {} draws by diffusion and not code by code"),
    ("a --model sd --guidance 1", "--negative-prompt b", f"--negative-prompt: {UNGUIDED}"),
    ("a --model sd --guidance 0", "--guidance-rescale 0.5", "--guidance-rescale: it acts by guidance"),
    ("a --model sd --guidance 1", "--guidance-interval 0.1 3", f"--guidance-interval: {UNGUIDED}"),
    ("a --model sdxl --guidance 1", "--negative-original-size 8 9", f"--negative-original-size: {UNGUIDED}"),
    ("a --model sdxl --guidance 1", "--negative-crop 8 9", f"--negative-crop: {UNGUIDED}"),
    ("a --model sdxl", "--aesthetic-score 9", "--aesthetic-score: SDXL's refiner takes it, as a model or beside one"),
    ("a --model sdxl", "--negative-aesthetic-score 9", "--negative-aesthetic-score: SDXL's refiner takes it"),
    ("a --model sdxl --refiner sdxl", "--aesthetic-score 9", "--aesthetic-score: SDXL's refiner takes it"),
    ("a --model refiner --image in.png", "--target-size 9 9", "--target-size: SDXL's refiner takes an aesthetic_score"),
    ("--class a --model classes", "--long-prompts chunk", "--long-prompts: the model {} draws without text"),
    ("--class a --model classes --guidance 1", "--guidance-rescale 0.5", f"--guidance-rescale: {UNGUIDED}"),
    ("--model any", "--guidance 3", "--guidance: the model {} draws from nothing that could guide it; leave it out"),
    ("--model any", "--guidance-rescale 0.5", "--guidance-rescale: the model {} draws from nothing that"),
    ("a --model words", "--guidance-rescale 0.5", "--guidance-rescale: the model {} draws code by code and not by"),
    ("a --model words", "--variation-seed 3", "--variation-seed: the model {} draws code by code and not by diffusion"),
    ("a --model words --image in.png --mask in.png", "--strength 0.5", "--strength: the model {} draws code by code"),
    ("a --model words --guidance 1", "--negative-prompt b", f"--negative-prompt: {UNGUIDED}"),
]


def asked(models: Path, words: str) -> list[str]:
    """The words of a command, where folders and pictures of `models` are whole paths."""
    return [str(models / word) if (models / word).exists() else word for word in words.split()]


@pytest.mark.parametrize(("drawing", "option", "why"), REFUSED, ids=lambda words: words[:40])
def test_refused(
    drawing: str, option: str, why: str, models: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    command = asked(models, drawing)
    assert run("generate", *command, *option.split(), "--steps", "2", "-o", "out.png") == 2
    model = command[command.index("--model") + 1]
    assert why.format(model) in " ".join(capsys.readouterr().err.split())
    assert not Path("out.png").exists()


@pytest.mark.parametrize(
    ("table", "options", "why"),
    [
        ("prompt\na\nb", ["--negative-prompt", "c", "--guidance", "1"], "Error: negative_prompt: it acts by guidance"),
        ("prompt,guidance_scale,negative_prompt\na,2,c\nb,1,c", [], "Error: prompt 2: negative_prompt: it acts by"),
        ("prompt,guidance_scale\na,1\nb,2", ["--negative-prompt", "c"], ""),
        ("prompt,guidance_scale\na,2\nb,2", ["--negative-prompt", "c", "--guidance", "1"], ""),
    ],
)
def test_of_many_each_acts_on_one_at_least(
    table: str, options: Sequence[str], why: str, models: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("prompts.csv").write_text(table)
    command = ["many", "prompts.csv", "--model", models / "sd", "--steps", "2", *options, "-o", "out"]
    assert run(*command) == (2 if why else 0)
    assert why in " ".join(capsys.readouterr().err.split())
    assert Path("out").exists() == (not why)


def test_replay_refuses_what_does_nothing(models: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("generate", "a", "--model", models / "sd", "--steps", "2", "-o", "out.png") == 0
    for options, why in (
        (["--refiner", models / "refiner"], "--refiner: out.png was drawn without one; leave it out"),
        (["--overwrite"], "--overwrite needs --output, the file for the new picture"),
    ):
        assert run("replay", "out.png", *options) == 2
        assert why in capsys.readouterr().err


DRAWINGS = {
    "sd": "cup",
    "sd image": "cup --image in.png",
    "sdxl": "cup",
    "sdxl image": "cup --image in.png",
    "sdxl refined": "cup --refiner refiner --denoising-end 0.3",
    "refiner": "cup --image in.png",
    "pixart": "cup",
    "classes": "--class a",
    "dit": "--class 3",
    "any": "",
    "words": "cup",
    "any codes": "",
    "two codes": "--class 0",
}
OPTIONS = (
    "--negative-prompt b",
    "--guidance 5.5",
    "--guidance-rescale 0.9",
    "--guidance-interval 0.1 3",
    "--temperature 0.3",
    "--top-k 1",
    "--top-p 0.2",
    "--prompt-2 b",
    "--original-size 40 32",
    "--crop 3 5",
    "--target-size 40 32",
    "--negative-original-size 8 9",
    "--negative-crop 3 4",
    "--negative-target-size 8 9",
    "--denoising-end 0.3",
    "--aesthetic-score 90",
    "--negative-aesthetic-score -90",
    "--variation-seed 7",
    "--variation-strength 0.5",
    "--strength 0.6",
    "--refiner refiner --denoising-end 0.3",
    "--steps 6",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", DRAWINGS)
def test_every_option_acts_or_is_refused(name: str, models: Path, run: Run) -> None:
    of_model(name, models)
    own = f"{DRAWINGS[name]} --model {name if 'codes' in name else name.split()[0]}".replace(" codes", "-codes")

    def drawn(*options: str) -> Any:
        Path("out.png").unlink(missing_ok=True)
        steps = [] if "--steps" in options else ["--steps", "4"]
        status = run("generate", *asked(models, own), *options, *steps, "--seed", "1", "-o", "out.png")
        if status:
            assert status == 2
            return None
        with Image.open("out.png") as picture:
            return np.asarray(picture).copy()

    for guided in ([], ["--guidance", "1"]):
        plain = drawn(*guided)
        for option in OPTIONS:
            if guided and not option.startswith(("--neg", "--guidance-")):
                continue
            if option.split()[0] not in own.split() and f"--{name}" not in option:  # itself again is the same
                changed = drawn(*guided, *asked(models, option))
                assert changed is None or (changed != plain).any(), (guided, option)


def of_model(name: str, models: Path) -> None:
    """Models that are for the slow test alone."""
    torch.manual_seed(1)
    if name == "pixart":
        pixart_folder(models / "pixart")
    if name == "dit":
        dit_folder(models / "dit")
    vae = VQModel(**VAE, num_vq_embeddings=16)
    if name == "any codes":
        UnconditionalTokenPipeline(randomized(TokenTransformer(16, 8, **TOKENS)), vae).save_pretrained(
            models / "any-codes"
        )
    if name == "two codes":
        transformer = randomized(TokenTransformer(16, 8, num_classes=2, **TOKENS))
        ClassTokenPipeline(transformer, vae).save_pretrained(models / "two-codes")
