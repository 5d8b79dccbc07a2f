"""What ``latentdiff generate`` does beyond words to pictures; for that see tests/test_cli.py."""

import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kinds import KINDS, make_model
from PIL import Image, ImageColor
from safetensors.torch import save_file
from tiny import clip_parts, tiny_pipeline
from tiny_clip import save_clip
from transformers import CLIPTextConfig, CLIPTextModel

from latentdiff import ImageToImagePipeline, InpaintPipeline, TextToImagePipeline
from latentdiff.interchange.png import read_settings
from latentdiff.pipelines.batch import draw
from latentdiff.pipelines.batch.record import read_record

Run = Callable[..., int]


def pixels(image: Any) -> np.ndarray:
    if isinstance(image, (str, Path)):
        with Image.open(image) as opened:
            return np.asarray(opened.convert("RGB"))
    return np.asarray(image)


def settings_of(name: str) -> dict[str, Any]:
    return read_settings(Path(name)) or {}


@pytest.fixture
def photo(tmp_path: Path) -> Image.Image:
    """A picture of 32 x 16 in photo.png, and a mask of its right half in mask.png."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 32, 3), dtype=np.uint8))
    image.save(tmp_path / "photo.png")
    mask = np.zeros((16, 32), dtype=np.uint8)
    mask[:, 16:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return image


def test_from_a_picture(model: str, run: Run, photo: Image.Image) -> None:
    options = ["--image", "photo.png", "--strength", "0.6", "--steps", "5", "--seed", "3", "-o", "new.png"]
    assert run("generate", "a cup", "--model", model, *options, "--width", "32") == 0
    pipeline = ImageToImagePipeline.from_pretrained(model)
    call = {"height": 16, "width": 32, "num_inference_steps": 5, "seed": 3}
    drawn = pipeline("a cup", image=photo, strength=0.6, **call).images[0]
    assert (pixels("new.png") == pixels(drawn)).all()
    settings = settings_of("new.png")
    assert settings["image"]["file"] == "photo.png"
    assert len(settings["image"]["sha256"]) == 64
    assert (settings["strength"], settings["width"], settings["height"]) == (0.6, 32, 16)


def test_a_picture_is_brought_to_the_models_area(model: str, run: Run, photo: Image.Image) -> None:
    assert run("generate", "a cup", "--model", model, "--image", "photo.png", "-o", "new.png", "--steps", "2") == 0
    assert Image.open("new.png").size == (22, 12)
    assert settings_of("new.png")["strength"] == 0.8
    sizes = ["--width", "16", "--height", "16"]
    assert run("generate", "a", "--model", model, "--image", "photo.png", "-o", "new.png", "--steps", "2", *sizes) == 0
    assert Image.open("new.png").size == (16, 16)


def test_a_picture_near_the_size_of_training_keeps_its_own(
    model: str, run: Run, photo: Image.Image, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in a call from Python."""
    near = photo.resize((19, 17))
    near.save("near.png")
    options = ["--strength", "0.6", "--steps", "5", "--seed", "3"]
    assert run("generate", "a cup", "--model", model, "--image", "near.png", *options, "-o", "new.png") == 0
    assert "near.png has 19 x 17 pixels and is cut at 18 x 16; --width and" in capsys.readouterr().out
    call = {"strength": 0.6, "num_inference_steps": 5, "seed": 3}
    drawn = ImageToImagePipeline.from_pretrained(model)("a cup", image=near, **call).images[0]
    assert drawn.size == (18, 16)
    assert (pixels("new.png") == pixels(drawn)).all()
    assert settings_of("new.png")["cut"] is True
    assert run("replay", "new.png") == 0
    Image.new("L", (19, 17), 255).save("all.png")
    assert run("generate", "a", "--model", model, "--image", "near.png", "--mask", "all.png", "-o", "in.png") == 0
    assert run("replay", "in.png") == 0


def test_a_small_picture_is_enlarged(run: Run, photo: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS["upscaler"], "num_class_embeds", 21)  # levels of noise, up to the usual one
    make_model("upscaler", clip_parts()).save_pretrained("upscaler")
    assert run("generate", "a cup", "--model", "upscaler", "--image", "photo.png", "--steps", "2", "-o", "big.png") == 0
    assert Image.open("big.png").size == (64, 32)
    assert run("replay", "big.png") == 0


def test_a_picture_lies_as_its_camera_says(model: str, run: Run, photo: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    photo.save("side.png", exif=exif)
    photo.transpose(Image.Transpose.ROTATE_270).save("upright.png")
    for name in ("side", "upright"):
        options = ["--image", f"{name}.png", "-o", f"new-{name}.png", "--seed", "1", "--steps", "2"]
        assert run("generate", "a", "--model", model, *options) == 0
    assert Image.open("new-side.png").size == (12, 22)
    assert (pixels("new-side.png") == pixels("new-upright.png")).all()


def test_part_of_a_picture(model: str, run: Run, photo: Image.Image) -> None:
    options = ["--image", "photo.png", "--mask", "mask.png", "--seed", "3", "-o", "new.png", "--steps", "3"]
    assert run("generate", "a cup", "--model", model, *options, "--width", "32") == 0
    pipeline = InpaintPipeline.from_pretrained(model)
    call = {"height": 16, "width": 32, "num_inference_steps": 3, "seed": 3}
    drawn = pipeline("a cup", image=photo, mask_image=Image.open("mask.png"), **call).images[0]
    assert (pixels("new.png") == pixels(drawn)).all()
    assert settings_of("new.png")["mask"]["file"] == "mask.png"


def test_guidance_and_variations_reach_the_picture(model: str, run: Run) -> None:
    options = ["--guidance-rescale", "0.7", "--guidance-interval", "0.2", "3", "--seed", "3", "--steps", "4"]
    options += ["--variation-seed", "9", "--variation-strength", "0.3", "-n", "2", "--separate"]
    assert run("generate", "a cup", "--model", model, *options, "-o", "new.png") == 0
    pipeline = TextToImagePipeline.from_pretrained(model)
    call: dict[str, Any] = {"guidance_rescale": 0.7, "guidance_interval": (0.2, 3.0), "num_inference_steps": 4}
    call |= {"seed": [3, 3], "variation_seed": [9, 10], "variation_strength": 0.3}
    drawn = pipeline(["a cup", "a cup"], **call).images
    plain = pipeline(["a cup", "a cup"], **{**call, "guidance_interval": None}).images
    for i in (0, 1):
        assert (pixels(f"new-{i + 1}.png") == pixels(drawn[i])).all()
        assert (pixels(f"new-{i + 1}.png") != pixels(plain[i])).any()
    assert (pixels("new-1.png") != pixels("new-2.png")).any()
    assert settings_of("new-2.png")["batches"][0]["variation_seeds"] == [9, 10]


def test_prompt_weights_and_chunks_reach_the_picture(model: str, run: Run) -> None:
    words = "a (red:1.8) cup " + "and a cup " * 4
    common = ["--model", model, "--seed", "3", "--steps", "2"]
    for name, options in (("a", []), ("b", ["--prompt-weights"]), ("c", ["--long-prompts", "chunk"])):
        assert run("generate", words, "-o", f"{name}.png", *common, *options) == 0
    assert settings_of("b.png")["prompt_weights"] is True
    assert settings_of("c.png")["long_prompts"] == "chunk"
    assert (pixels("a.png") != pixels("b.png")).any()
    assert (pixels("a.png") != pixels("c.png")).any()


def test_lora_and_new_word(model: str, run: Run, tmp_path: Path) -> None:
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipeline = TextToImagePipeline.from_pretrained(model)
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    TextToImagePipeline.save_lora_weights(tmp_path / "lora", get_peft_model_state_dict(pipeline.unet))
    save_file({"<thing>": torch.randn(16)}, tmp_path / "word.safetensors")
    file = str(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    common = ["--model", model, "--seed", "3", "--steps", "2"]
    assert run("generate", "a <thing>", "-o", "plain.png", *common) == 0
    assert run("generate", "a <thing>", "-o", "lora.png", *common, "--lora", f"{file}:0.5") == 0
    assert run("generate", "a <thing>", "-o", "word.png", *common, "--embedding", "word.safetensors") == 0
    assert (pixels("lora.png") != pixels("plain.png")).any()
    assert (pixels("word.png") != pixels("plain.png")).any()
    fresh = TextToImagePipeline.from_pretrained(model)
    fresh.load_lora_weights(file, scale=0.5)
    assert (pixels("lora.png") == pixels(fresh("a <thing>", seed=3, num_inference_steps=2).images[0])).all()
    assert settings_of("lora.png")["loras"][0]["scale"] == 0.5
    for name in ("lora", "word"):
        assert run("replay", f"{name}.png") == 0
    save_file({"<thing>": torch.randn(16)}, tmp_path / "word.safetensors")
    assert run("replay", "word.png") == 2, "its file has changed"


def test_a_variant_of_the_weights(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = tiny_pipeline("clip")
    pipeline.save_pretrained(tmp_path / "model")
    before = pipeline("a cup", seed=3, num_inference_steps=2).images[0]
    pipeline.unet.conv_out.weight.data += 0.1
    pipeline.save_pretrained(tmp_path / "model", variant="other")
    after = pipeline("a cup", seed=3, num_inference_steps=2).images[0]
    common = ["a cup", "--model", "model", "--seed", "3", "--steps", "2"]
    assert run("generate", *common, "-o", "before.png") == 0
    assert run("generate", *common, "-o", "after.png", "--variant", "other") == 0
    assert (pixels("before.png") == pixels(before)).all()
    assert (pixels("after.png") == pixels(after)).all()
    assert settings_of("before.png")["model_digest"] != settings_of("after.png")["model_digest"]
    assert run("replay", "after.png") == 0


def test_a_single_file(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = tiny_pipeline("clip")
    config = {**pipeline.text_encoder.config.to_dict(), "vocab_size": 49408, "max_position_embeddings": 77}
    pipeline.text_encoder = CLIPTextModel(CLIPTextConfig(**config))
    pipeline.save_single_file(tmp_path / "one.safetensors")
    (tmp_path / "one.ckpt").write_bytes(b"pickle")
    common = ["a cup", "--seed", "3", "--steps", "2", "-o", "cup.png"]
    assert run("generate", *common, "--model", "one.ckpt") == 2
    assert "one.ckpt: only .safetensors files are drawn with as they are" in capsys.readouterr().err
    assert run("generate", *common, "--model", "one.safetensors") == 0
    assert len(settings_of("cup.png")["model_digest"]) == 64
    assert run("replay", "cup.png") == 0


def test_the_best_of_several(model: str, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tiny_clip import save_clip  # type: ignore[import-not-found]

    clip = save_clip(tmp_path / "clip")
    options = ["--candidates", "10", "--clip", clip, "--seed", "3", "-n", "2", "--separate", "--steps", "2"]
    assert run("generate", "a red cup", "--model", model, *options, "-o", "best.png") == 0
    settings = [settings_of(f"best-{i}.png") for i in (1, 2)]
    scores = [one["scores"][0] for one in settings]
    assert scores[0] >= scores[1]
    assert f"best-1.png: CLIP score {scores[0]:.1f}, seed {settings[0]['seed']}" in capsys.readouterr().out
    assert len({one["seed"] for one in settings}) == 2
    assert all(3 <= one["seed"] < 13 for one in settings)
    assert run("replay", "best-2.png") == 0


def test_a_filmstrip(model: str, run: Run) -> None:
    options = ["--filmstrip", "strip.png", "-n", "2", "--seed", "1", "--steps", "10"]
    assert run("generate", "a cup", "--model", model, *options, "-o", "cups.png") == 0
    with Image.open("strip.png") as strip, Image.open("cups.png") as grid:
        assert strip.size == (9 * 18 - 2, 2 * 18 - 2)
        assert (pixels(strip.crop((8 * 18, 0, 160, 16))) == pixels(grid.crop((0, 0, 16, 16)))).all()
    assert run("replay", "strip.png") == 0
    assert run("generate", "a", "-n", "9", "--model", model, "--filmstrip", "strip.png") == 2


class Interrupting:
    """Stops a drawing as Ctrl-C does, in the second batch."""

    def __init__(self, calls: int = 2) -> None:
        self.calls, self.draw = calls, draw.draw_batch

    def __call__(self, *arguments: Any) -> Any:
        self.calls -= 1
        if self.calls == 0:
            signal.raise_signal(signal.SIGINT)
        return self.draw(*arguments)


@pytest.mark.parametrize("separate", [True, False])
def test_ctrl_c_leaves_what_is_finished(
    separate: bool, model: str, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["-n", "12", "--steps", "2", "-o", "cups.png", "--seed", "4", *(["--separate"] if separate else [])]
    with monkeypatch.context() as patch:
        patch.setattr(draw, "draw_batch", Interrupting())
        assert run("generate", "a cup", "--model", model, *options) == 130
    error = capsys.readouterr().err
    assert "Stopped; 8 of 12 pictures were drawn: cups" in error
    assert "Traceback" not in error
    files = sorted(path.name for path in Path().glob("*"))
    assert files == ([f"cups-{i:02d}.png" for i in range(1, 9)] if separate else ["cups.png"])
    assert run("replay", files[-1]) == 0
    assert len(read_record(Path(files[-1]))[1].pictures) == (1 if separate else 8)


def test_withheld_pictures_are_named(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(vision_config={**vision, "image_size": 16, "patch_size": 8}, projection_dim=8)
    checker = StableDiffusionSafetyChecker(config)
    checker.concept_embeds_weights.data.fill_(-1.0)  # objects to everything
    parts = tiny_pipeline("clip").components
    extractor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    pipeline = TextToImagePipeline(**{**parts, "safety_checker": checker, "feature_extractor": extractor})
    pipeline.save_pretrained(tmp_path / "strict")
    options = ["--model", "strict", "--steps", "2", "-n", "2", "-o", "cup.png"]
    assert run("generate", "a cup", "--separate", *options) == 0
    assert "cup-2.png: withheld by the model's safety checker; it is black" in capsys.readouterr().err
    assert not pixels("cup-2.png").any()
    assert settings_of("cup-2.png")["withheld"] == [0]
    assert run("generate", "a cup", *options) == 0
    assert "picture 2 in cup.png: withheld" in capsys.readouterr().err


def test_spoilt_pictures_end_with_an_error(
    model: str, run: Run, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    common = ["generate", "a cup", "--model", model, "--steps", "2", "--guidance", "1e38"]
    assert run(*common, "-o", "cup.png", "--filmstrip", "strip.png") == 1
    error = capsys.readouterr().err
    assert "The unet gave values that are not finite" in caplog.text
    assert "cup.png: not written, for a network gave values that are not finite" in error
    assert run(*common, "-o", "cup.png", "-n", "2", "--separate") == 1
    assert "cup-2.png: not written" in capsys.readouterr().err
    assert list(Path().iterdir()) == []


MISTAKES: list[tuple[list[str], str]] = [
    (["--mask", "mask.png"], "--mask needs --image"),
    (["--strength", "0.5"], "--strength needs --image"),
    (["--image", "none.png"], "none.png: no such file"),
    (["--image", "text.png"], "text.png is not a picture of a known format"),
    (["--image", "photo.png", "--mask", "small.png"], "photo.png has 32 x 16 pixels and small.png has 8 x 8"),
    (["--candidates", "4"], "--candidates and --clip go together"),
    (["--candidates", "1", "--clip", "x", "-n", "2"], "--candidates 1 are fewer than the 2"),
    (["--candidates", "2", "--clip", "no/such/clip/here"], "no/such/clip/here"),
    (["--lora", "none.safetensors"], "none.safetensors: no such file"),
    (["--lora", "text.png:0.5"], "text.png: only safetensors"),
    (["--embedding", "none.safetensors:word"], "none.safetensors: no such file"),
    (["--filmstrip", "out.png", "-o", "out.png"], "out.png: the filmstrip needs a file of its own"),
    (["--filmstrip", "photo.png"], "photo.png exists and was not drawn by latentdiff"),
    (["--guidance-interval", "5", "1"], "guidance_interval"),
    (["--guidance-interval", "nan", "1"], "option guidance_interval"),
    (["--guidance", "inf"], "option guidance_scale: a finite number is expected (got inf)"),
    (["--guidance", "nan"], "option guidance_scale: a finite number is expected (got nan)"),
    (["--lora", "style.safetensors:nan"], "--lora style.safetensors:nan: the scale must be a finite number, not nan"),
    (["--lora", "style.safetensors:-1e999"], "the scale must be a finite number, not -1e999"),
    (["--seed", str(2**63 - 1), "-n", "2"], "the seed 9223372036854775807 is too large"),
    (["-n", "1000000000", "--separate"], "1000000000 pictures are too many for one command"),
    (["--candidates", "1000000000", "--clip", "x"], "1000000000 pictures are too many for one command"),
    (["-n", "5000"], "5000 pictures are too many for one grid"),
    (["\udcff"], "is not text in this terminal's encoding"),
]


def test_a_size_that_the_program_chose_is_not_warned_of(
    model: str, run: Run, photo: Image.Image, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    photo.resize((39, 7)).save("flat.png")
    assert run("generate", "a cup", "--model", model, "--image", "flat.png", "--steps", "2", "-o", "new.png") == 0
    assert pixels("new.png").shape[0] * 4 < pixels("new.png").shape[1]
    assert "far from that size" not in capsys.readouterr().err + caplog.text


@pytest.mark.parametrize("command", [["generate", "a", "--candidates", "2"], ["evaluate", "--data", "none"]])
def test_a_missing_clip_is_said_before_the_model_is_loaded(
    command: list[str], model: str, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(model, "broken")
    for weights in Path("broken").rglob("*.safetensors"):
        weights.write_bytes(b"these cannot be loaded")
    place = ["./broken"] if command[0] == "evaluate" else ["--model", "./broken"]
    assert run(*command, *place, "--clip", "./no-clip") == 2
    assert "./no-clip: no such folder; a CLIP is" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_mistakes(
    arguments: list[str], message: str, model: str, run: Run, photo: Image.Image, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("text.png").write_text("hello")
    Image.new("L", (8, 8)).save("small.png")
    before = sorted(path.name for path in Path().iterdir())
    assert run("generate", "a", "--model", model, "--steps", "2", *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("Error: ")
    assert message in error
    assert sorted(path.name for path in Path().iterdir()) == before


def test_candidates_are_compared_where_the_pipeline_computes(tmp_path: Path) -> None:
    """On "meta" nothing is computed, and torch says so when the scores are asked for."""
    from latentdiff.pipelines.batch.record import Drawn, Settings
    from latentdiff.pipelines.core import candidates

    settings = Settings(
        negative_prompt=None,
        num_inference_steps=1,
        guidance_scale=1.0,
        candidates=2,
        reranker=str(save_clip(tmp_path / "clip")),
        model="tiny",
        scheduler="DDIMScheduler",
        precision="float32",
        width=16,
        height=16,
        version="0",
    )
    pictures = [Drawn(Image.new("RGB", (16, 16), colour), (0, i)) for i, colour in enumerate(("red", "blue"))]
    assert len(list(candidates.best_of_each(iter(pictures), ["a cup"], 1, settings, torch.device("cpu")))) == 1
    for keep in ("red", "blue"):  # the other is black since a network failed
        spoilt = [replace(one, spoilt=colour != keep) for one, colour in zip(pictures, ("red", "blue"), strict=True)]
        best = next(candidates.best_of_each(iter(spoilt), ["a cup"], 1, settings, torch.device("cpu")))
        assert best.image.getpixel((0, 0)) == ImageColor.getrgb(keep)
    with pytest.raises(NotImplementedError, match="meta"):
        list(candidates.best_of_each(iter(pictures), ["a cup"], 1, settings, torch.device("meta")))
    candidates._load_once.cache_clear()
