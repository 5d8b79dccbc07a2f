"""Folders of DiT and PixArt are drawn from as diffusers' pipelines draw, and found by what they are."""

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from compare import largest_difference
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_transformers import dit_folder, pixart_folder

from latentdiff.pipelines import (
    ClassConditionalPipeline,
    DiTPipeline,
    ImageToImagePipeline,
    InpaintPipeline,
    PixArtTextToImagePipeline,
    TextToImagePipeline,
)
from latentdiff.pipelines.registry import kind_in

PLAIN = {"clean_caption": False, "use_resolution_binning": False, "max_sequence_length": 12}
"""How diffusers draws from a PixArt of another size than the released ones."""


PLAIN_SIZE = {"clean_caption": False, "use_resolution_binning": False}


@pytest.fixture(scope="module")
def dit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of diffusers' DiTPipeline."""
    return dit_folder(tmp_path_factory.mktemp("dit") / "model")


@pytest.fixture(scope="module")
def pixart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of diffusers' PixArtAlphaPipeline, with T5."""
    return pixart_folder(tmp_path_factory.mktemp("pixart") / "model")


def both(ours: Any, theirs: Any, folder: Path) -> tuple[Any, Any]:
    pipelines = ours.from_pretrained(folder), theirs.from_pretrained(folder)
    for pipeline in pipelines:
        pipeline.set_progress_bar_config(disable=True)
    return pipelines


def test_dit_draws_diffusers_pictures(dit: Path) -> None:
    ours, theirs = both(ClassConditionalPipeline, diffusers.DiTPipeline, dit)
    assert type(ours) is DiTPipeline
    for call in ({"class_labels": [3, 999]}, {"class_labels": [7], "guidance_scale": 1.0}):
        assert largest_difference(ours, theirs, **{**call, "num_inference_steps": 3}) < 1e-4
    named = ours(["item 3", "thing 999"], num_inference_steps=2, seed=0, output_type="pt").images
    numbered = ours([3, 999], num_inference_steps=2, seed=0, output_type="pt").images
    assert torch.equal(named, numbered)


def test_pixart_draws_diffusers_pictures(pixart: Path) -> None:
    ours, theirs = both(TextToImagePipeline, diffusers.PixArtAlphaPipeline, pixart)
    assert type(ours) is PixArtTextToImagePipeline
    calls: list[dict[str, Any]] = [
        {"prompt": ["a red thing", "sun"], "num_images_per_prompt": 2},
        {"prompt": " A Red Thing", "negative_prompt": "blue"},
        {"prompt": "a thing", "guidance_scale": 1.0, "height": 24, "width": 16},
        {"prompt": "a very long prompt that is cut somewhere"},
        {"prompt": "a red thing", "max_sequence_length": 4, **PLAIN_SIZE},
    ]
    for call in calls:
        found = [pipeline_call(one, **call) for one in (ours, theirs)]
        assert found[0].shape == found[1].shape
        assert float((found[0] - found[1]).abs().max()) < 1e-4, call
        assert found[0].std() > 0.01
    states, mask, negative, negative_mask = ours.encode_prompt("a red thing")
    told: dict[str, Any] = {"prompt_embeds": states, "negative_prompt_embeds": negative, "seed": 0}
    masks = {"prompt_attention_mask": mask, "negative_prompt_attention_mask": negative_mask}
    expected = ours("a red thing", seed=0, output_type="pt", clean_caption=False, use_resolution_binning=False).images
    for given in ({}, masks):
        assert torch.equal(ours(**told, **given, output_type="pt").images, expected)
    theirs_mask = theirs.encode_prompt("a red thing", max_sequence_length=mask.shape[1])[1]
    assert torch.equal(mask, theirs_mask)
    hidden = ours(**{**told, "prompt_embeds": states + 1}, **masks, output_type="pt").images  # padding, not zero
    shown = torch.where(mask[..., None] == 1, states + 1, 0)
    assert torch.equal(hidden, ours(**{**told, "prompt_embeds": shown}, output_type="pt").images)
    with pytest.raises(ValueError, match="max_sequence_length=500 is more than the 12 tokens of this model"):
        ours("a", max_sequence_length=500)
    with pytest.raises(ValueError, match="clean_caption=True is not supported; leave it out, or give False"):
        ours("a", clean_caption=True)
    with pytest.raises(
        ValueError, match=r"prompt_attention_mask is \(1, 2\), for prompt_embeds .* they are \(1, 12, 16\)"
    ):
        ours(**told, prompt_attention_mask=torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"negative_prompt_attention_mask is .* none are given"):
        ours("a", negative_prompt_attention_mask=torch.ones(1, 2))


def pipeline_call(pipeline: Any, **call: Any) -> torch.Tensor:
    plain = PLAIN if type(pipeline).__module__.startswith("diffusers") else {}
    options = {"num_inference_steps": 3, "output_type": "pt", "generator": torch.Generator().manual_seed(7)}
    return pipeline(**{**options, **plain, **call}).images


def test_a_folder_of_another_family_says_what_loads_it(dit: Path, pixart: Path) -> None:
    for kind, folder, message in (
        (TextToImagePipeline, dit, "is of a DiTPipeline, which draws classes, and TextToImagePipeline cannot.*DiTPip"),
        (InpaintPipeline, dit, "load it with DiTPipeline"),
        (ClassConditionalPipeline, pixart, "which draws from a prompt, .* load it with PixArtTextToImagePipeline"),
    ):
        with pytest.raises(ValueError, match=message):
            kind.from_pretrained(folder)  # type: ignore[attr-defined]


def test_pixart_is_told_the_size_if_it_takes_that(tmp_path: Path) -> None:
    folder = pixart_folder(tmp_path, "bert", use_additional_conditions=True)
    ours = TextToImagePipeline.from_pretrained(folder)
    ours.set_progress_bar_config(disable=True)
    theirs = diffusers.PixArtTransformer2DModel.from_pretrained(folder / "transformer")
    call: dict[str, Any] = {"num_inference_steps": 2, "seed": 0, "output_type": "pt", "height": 24, "width": 16}
    found = ours("a thing", **call).images
    given: list[Any] = []
    theirs.register_forward_hook(lambda *args: given.append(args[2]["added_cond_kwargs"]), with_kwargs=True)
    ours.transformer = theirs
    torch.testing.assert_close(found, ours("a thing", **call).images, atol=1e-4, rtol=1e-4)
    assert given[0]["resolution"].tolist() == [[24, 16]] * 2
    assert given[0]["aspect_ratio"].tolist() == [[1.5]] * 2


def test_pixart_starts_from_pictures_and_fills_masks(pixart: Path) -> None:
    picture = Image.linear_gradient("L").resize((16, 16)).convert("RGB")
    call: dict[str, Any] = {"seed": 0, "num_inference_steps": 3, "output_type": "pt", "image": picture}
    ours = ImageToImagePipeline.from_pretrained(pixart)
    assert ours("a thing", **call, strength=0.7).images.shape == (1, 3, 16, 16)
    mask = Image.new("L", (16, 16), 0)
    mask.paste(255, (4, 4, 12, 15))
    filled = InpaintPipeline.from_pipe(ours)
    assert type(filled).__name__ == "PixArtInpaintPipeline"
    assert filled("a thing", **call, mask_image=mask).images.shape == (1, 3, 16, 16)


@pytest.mark.parametrize("name", ["dit", "pixart"])
def test_what_is_saved_is_diffusers_and_ours(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    source = request.getfixturevalue(name)
    base: Any = ClassConditionalPipeline if name == "dit" else TextToImagePipeline
    ours = base.from_pretrained(source)
    ours.register_defaults(num_inference_steps=2)
    ours.save_pretrained(tmp_path / "folder")
    ours.save_single_file(tmp_path / "file.safetensors")
    index = json.loads((tmp_path / "folder" / "model_index.json").read_text())
    assert index["transformer"][0] == "diffusers"
    theirs = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "folder")
    assert type(theirs).__name__ == index["_class_name"] == ("DiTPipeline" if name == "dit" else "PixArtAlphaPipeline")
    first: Any = [3] if name == "dit" else "a thing"
    back, packed = base.from_pretrained(tmp_path / "folder"), base.from_single_file(tmp_path / "file.safetensors")
    pictures = [one(first, seed=0, output_type="pt").images for one in (ours, back, packed)]
    assert torch.equal(pictures[0], pictures[1])
    assert torch.equal(pictures[0], pictures[2])


def test_released_folders_name_the_former_class(dit: Path, pixart: Path, tmp_path: Path) -> None:
    for folder, base in ((dit, ClassConditionalPipeline), (pixart, TextToImagePipeline)):
        pipeline: Any = base.from_pretrained(folder)
        pipeline.save_pretrained(tmp_path / folder.parent.name)
        for file in (tmp_path / folder.parent.name / "model_index.json", *tmp_path.glob("*/transformer/config.json")):
            text = file.read_text()
            for old in ("DiTTransformer2DModel", "PixArtTransformer2DModel"):
                text = text.replace(old, "Transformer2DModel")
            file.write_text(text)
        again: Any = base.from_pretrained(tmp_path / folder.parent.name)
        assert type(again.transformer) is type(pipeline.transformer)


def test_the_kind_is_found_by_the_folder(dit: Path, pixart: Path) -> None:
    assert kind_in(dit, textless=True).name == "DiTPipeline"
    assert kind_in(pixart).name == "PixArtTextToImagePipeline"
    assert kind_in(pixart, ("image",)).name == "PixArtImageToImagePipeline"
    with pytest.raises(ValueError, match="draws without text"):
        kind_in(dit, ("image",), textless=True)


def test_what_does_not_go_is_refused(dit: Path, pixart: Path) -> None:
    ours: Any = TextToImagePipeline.from_pretrained(pixart)
    with pytest.raises(ValueError, match="height=18 is not a multiple of 4"):
        ours("a thing", height=18)
    with pytest.raises(ValueError, match="FreeU is for UNets"):
        ours.enable_freeu(1, 1, 1, 1)
    with pytest.raises(FileNotFoundError, match="x"):
        ours.load_lora_weights("./x")
    with pytest.raises(ValueError, match="original_size is for SDXL"):
        ours("a thing", original_size=(8, 8))
    classes: Any = ClassConditionalPipeline.from_pretrained(dit)
    with pytest.raises(ValueError, match="there is no class 'thing 1000'"):
        classes("thing 1000")
    with pytest.raises(ValueError, match="at most the 1000 of the transformer"):
        DiTPipeline(classes.transformer, classes.vae, classes.scheduler, {i: str(i) for i in range(1001)})


def config_says(folder: Path, **changes: Any) -> None:
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def weights_say(folder: Path, change: Any) -> None:
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file(change(load_file(file)), file)


def of_nan(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor * torch.nan if name == "proj_out.bias" else tensor for name, tensor in weights.items()}


def without_one(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in weights.items() if name != "proj_out.bias"}


def pickled(folder: Path) -> None:
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda folder: config_says(folder, num_layers=0), "num_layers=0"),
        (lambda folder: config_says(folder, num_layers=3), "weights do not fit config.json"),
        (lambda folder: config_says(folder, patch_size="2"), "patch_size"),
        (lambda folder: config_says(folder, caption_channels=32), "weights do not fit config.json"),
        (lambda folder: config_says(folder, capton_channels=16), "unknown config key 'capton_channels'; did you mean"),
        (lambda folder: weights_say(folder, of_nan), "not finite"),
        (lambda folder: weights_say(folder, without_one), "1 are missing, such as proj_out.bias"),
        (pickled, "transformer"),
    ],
)
def test_hostile_folders_are_refused(pixart: Path, tmp_path: Path, harm: Any, message: str) -> None:
    folder = shutil.copytree(pixart, tmp_path / "folder")
    harm(folder)
    with pytest.raises((ValueError, OSError), match=message):
        TextToImagePipeline.from_pretrained(folder)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"lora_A": torch.ones(2, 24)}, "no up .B. matrix"),
        ({"lora_A": torch.ones(2, 8), "lora_B": torch.ones(24, 2)}, "is made for a weight of shape"),
        ({"lora_A": torch.ones(2, 24), "lora_B": torch.full((24, 2), torch.nan)}, "not finite"),
        ({"lora_A": torch.ones(2, 24), "lora_B": torch.ones(24, 3)}, "do not fit each other"),
    ],
)
def test_hostile_loras_are_refused(
    pixart: Path, tmp_path: Path, tensors: dict[str, torch.Tensor], message: str
) -> None:
    name = "transformer.transformer_blocks.0.attn1.to_q."
    save_file({f"{name}{part}.weight": tensor for part, tensor in tensors.items()}, tmp_path / "lora.safetensors")
    pipeline: Any = TextToImagePipeline.from_pretrained(pixart)
    with pytest.raises(ValueError, match=message):
        pipeline.load_lora_weights(tmp_path / "lora.safetensors")
    assert not getattr(pipeline.transformer, "peft_config", {})
