"""Transformer denoisers from a folder of pictures to a picture that diffusers draws too: text, classes and neither."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from compare import largest_difference
from lives import calm_and_killed, forks, live
from safetensors.torch import load_file

from latentdiff import ClassConditionalPipeline, TextToImagePipeline
from latentdiff.training.settings import DenoiserSettings
from latentdiff.training.trainers.denoiser import train_denoiser

UNET = ("block_out_channels", "attention_levels", "attention_head_dim", "norm_num_groups")
SMALL = {"network": "dit", "network_options": {"depth": 2, "width": 24, "heads": 2}}


def train(values: dict[str, Any], output: Path, **changes: object) -> Path:
    values = {key: value for key, value in values.items() if key not in UNET}
    return train_denoiser(DenoiserSettings.load(None, {**values, **SMALL, "output": str(output), **changes}))


def transformer(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_text_resumes_exactly_and_diffusers_draws_the_same(denoiser_settings: dict[str, Any], tmp_path: Path) -> None:
    out = train(denoiser_settings, tmp_path / "a", max_steps=3)
    train(denoiser_settings, tmp_path / "b", max_steps=1)
    assert same(transformer(out), transformer(train(denoiser_settings, tmp_path / "b", max_steps=3)))
    plain = train(denoiser_settings, tmp_path / "c", max_steps=3, cache_text=False)
    for name, weights in transformer(plain).items():  # a cache keeps states in half precision
        torch.testing.assert_close(weights, transformer(out)[name], atol=2e-3, rtol=0)
    assert (out / "training" / "samples").is_dir()

    ours: Any = TextToImagePipeline.from_pretrained(out)
    theirs = diffusers.DiffusionPipeline.from_pretrained(out)
    assert type(theirs) is diffusers.PixArtAlphaPipeline
    told = {"clean_caption": False, "use_resolution_binning": False, "max_sequence_length": 12}
    assert ours.diffusers_options == told
    card = (out / "README.md").read_text()
    assert "from diffusers import PixArtAlphaPipeline" in card
    options = "clean_caption=False, use_resolution_binning=False, max_sequence_length=12"
    assert f'\nPixArtAlphaPipeline.from_pretrained("a")("a red thing", {options}).images[0]\n' in card
    for pipeline in (ours, theirs):
        for parameter in pipeline.transformer.parameters():  # three updates make no picture
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(3))
        pipeline.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 3, "output_type": "pt", "guidance_scale": 3.0}
    found = ours("A red disc", generator=torch.Generator().manual_seed(7), **call).images
    wanted = theirs("A red disc", generator=torch.Generator().manual_seed(7), **call, **told).images
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


@pytest.mark.slow
@forks
@pytest.mark.parametrize("condition", ["text", "class"])
def test_kills_and_several_processes_change_nothing(
    labelled: Path, denoiser_settings: dict[str, Any], tmp_path: Path, condition: str
) -> None:
    values = {**denoiser_settings, "condition": condition, "max_steps": 4, "checkpoint_every": 1, "optimizer": "sgd"}
    values |= {"caption_column": "colour" if condition == "class" else "text", "learning_rate": 0.1}
    log = tmp_path / "log.txt"

    def work(name: str, size: int = 2) -> None:
        train(values, tmp_path / name, batch_size=size)

    calm_and_killed(work, log)
    live(lambda: work("two", 1), log, processes=2)
    calm, two, killed = (transformer(tmp_path / name) for name in ("calm", "two", "killed"))
    assert same(calm, killed)
    for name, tensor in calm.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("condition", ["class", "none"])
def test_classes_and_none_are_drawn_by_diffusers_too(
    labelled: Path, denoiser_settings: dict[str, Any], tmp_path: Path, condition: str
) -> None:
    values = {**denoiser_settings, "condition": condition, "caption_column": "colour", "caption_dropout": 0.5}
    out = train(values, tmp_path / "a", max_steps=3)
    train(values, tmp_path / "b", max_steps=1)
    assert same(transformer(out), transformer(train(values, tmp_path / "b", max_steps=3)))
    ours: Any = ClassConditionalPipeline.from_pretrained(out)
    theirs: Any = diffusers.DiffusionPipeline.from_pretrained(out)
    assert type(theirs) is diffusers.DiTPipeline
    for pipeline in (ours, theirs):
        torch.manual_seed(3)
        for parameter in pipeline.transformer.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        pipeline.set_progress_bar_config(disable=True)
    scale = 3.0 if condition == "class" else 1.0
    assert largest_difference(ours, theirs, class_labels=[0], num_inference_steps=3, guidance_scale=scale) < 1e-4
    assert ours.id2label[0] == ("blue" if condition == "class" else "picture")


def test_only_labels_of_the_classes_and_of_none_are_learned(
    labelled: Path, denoiser_settings: dict[str, Any], tmp_path: Path
) -> None:
    values = {**denoiser_settings, "condition": "class", "caption_column": "colour", "caption_dropout": 0.5}
    values |= {"weight_decay": 0.0, "max_steps": 5}  # labels do nothing at first, and so learn later
    tables = [
        transformer(train(values, tmp_path / name, learning_rate=rate, ema_decay=0.0))[
            "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight"
        ]
        for name, rate in (("a", 1e-9), ("b", 1e-2))
    ]
    moved = [int(i) for i in (tables[0] - tables[1]).abs().amax(1).gt(1e-6).nonzero().flatten()]
    classes = len(ClassConditionalPipeline.from_pretrained(tmp_path / "a").id2label)  # type: ignore[arg-type]
    assert moved
    assert set(moved) <= {*range(classes), 1000}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network_options": {"width": 20, "heads": 3}}, "heads=3 do not divide width=20"),
        ({"network_options": {"patch_size": 3}}, "latents of 8x8, no multiple of patch_size=3"),
        ({"network_options": {"layers": 3}}, "denoiser_options of denoiser=dit: .*'layers'"),
        ({"network_options": {"depth": 0}}, "num_layers=0"),
        ({"layers_per_block": 2}, "layers_per_block is for denoiser=unet"),
        ({"network": "unet"}, "denoiser_options are for another denoiser"),
        ({"denoiser": "dit"}, "'denoiser' is given twice, as 'network' too"),
    ],
)
def test_what_makes_no_sense_is_refused(
    denoiser_settings: dict[str, Any], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train(denoiser_settings, tmp_path / "out", max_steps=1, **changes)
    assert not (tmp_path / "out" / "model_index.json").exists()
