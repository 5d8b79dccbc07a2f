"""Fine-tuning of SDXL: what it learns from, resuming, and what diffusers makes of it."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from accelerate import Accelerator
from lives import calm_and_killed, forks, live
from safetensors.torch import load_file
from tiny import draw
from tiny_sdxl import tiny_sdxl

from latentdiff import TextToImagePipeline
from latentdiff.training.batch.two_encoders import JointTextCache, caption_conditioner
from latentdiff.training.data import CaptionedPicture
from latentdiff.training.data.captioned_picture import View
from latentdiff.training.settings import FinetuneSettings
from latentdiff.training.trainers.average import average
from latentdiff.training.trainers.finetune import finetune

SMALL = {"batch_size": 2, "max_steps": 4, "checkpoint_every": 2, "sample_every": 4, "sample_steps": 2}
METHODS: dict[str, dict[str, Any]] = {
    "full": {"buckets": True, "cache_text": False},
    "lora": {"lora_rank": 2, "crop": "random", "random_flip": True},
    "lora of all": {"lora_rank": 2, "train_text_encoder": True},
    "full of all": {"train_text_encoder": True},
    "textual-inversion": {"placeholder_token": "<x>", "initializer_token": "a", "num_vectors": 2},
    "dreambooth": {"caption": "a red cup", "class_prompt": "a cup", "class_pictures": 3},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdxl") / "model"
    tiny_sdxl().save_pretrained(folder)
    return folder


def run(pictures: Path, model: Path, output: Path, method: str, **changes: object) -> Path:
    places = {"data": str(pictures), "model": str(model), "output": str(output)}
    values = {**SMALL, "method": method.split()[0], "learning_rate": 1e-2, **METHODS[method], **places, **changes}
    return finetune(FinetuneSettings.load(None, values))


def unet(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def ours(folder: Path) -> Any:
    pipeline = TextToImagePipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def theirs(folder: Path) -> Any:
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("method", [pytest.param("lora", marks=pytest.mark.slow), "lora of all"])
def test_a_lora_is_merged_and_beside_for_diffusers_too(
    pictures: Path, model: Path, tmp_path: Path, method: str
) -> None:
    out = run(pictures, model, tmp_path / "out", method)
    before, merged = draw(ours(model)), draw(theirs(out))
    assert (merged - before).abs().max() > 1e-3
    torch.testing.assert_close(draw(ours(out)), merged, atol=1e-4, rtol=0)
    for pipeline in (ours(model), theirs(model)):
        pipeline.load_lora_weights(str(out / "pytorch_lora_weights.safetensors"))
        torch.testing.assert_close(draw(pipeline), merged, atol=1e-4, rtol=0)
    parts = {key.split(".")[0] for key in load_file(out / "pytorch_lora_weights.safetensors")}
    assert parts == ({"unet"} if method == "lora" else {"unet", "text_encoder", "text_encoder_2"})
    assert (out / "training" / "samples" / "step-00000004.png").is_file()
    assert "from diffusers import StableDiffusionXLPipeline" in (out / "README.md").read_text()


@pytest.mark.slow
def test_a_lokr_of_both_text_encoders_is_beside(pictures: Path, model: Path, tmp_path: Path) -> None:
    out = run(pictures, model, tmp_path / "out", "lora of all", adapter="lokr")
    merged, adapted = draw(theirs(out)), ours(model)
    keys = load_file(out / "lycoris_weights.safetensors")
    assert {key.split("_")[1] for key in keys} == {"unet", "te1", "te2"}
    assert not adapted.load_lora_weights(out).unmatched
    torch.testing.assert_close(draw(adapted), merged, atol=1e-4, rtol=0)
    assert {path.name for path in (out / "adapter").iterdir()} == {"unet", "text_encoder", "text_encoder_2"}


@pytest.mark.slow
def test_all_networks_are_averaged_afterwards(pictures: Path, model: Path, tmp_path: Path) -> None:
    out = run(pictures, model, tmp_path / "out", "full of all", ema_snapshots=2)
    average(out, 0.1, tmp_path / "new")
    kept = load_file(out / "training" / "averages" / "step-00000004-0.1.safetensors")
    files = {"denoiser": "unet/diffusion_pytorch_model", "text_encoder.first": "text_encoder/model"}
    for part, file in {**files, "text_encoder.second": "text_encoder_2/model"}.items():
        found = load_file(tmp_path / "new" / f"{file}.safetensors")
        mine = {name.removeprefix(f"{part}."): one for name, one in kept.items() if name.startswith(f"{part}.")}
        assert len(mine) > 10
        for name, tensor in mine.items():
            torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-4)
    draw(theirs(tmp_path / "new"))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_resumes_exactly(pictures: Path, model: Path, tmp_path: Path, method: str) -> None:
    if method == "textual-inversion":
        (pictures / "metadata.jsonl").unlink()
    straight = run(pictures, model, tmp_path / "a", method)
    run(pictures, model, tmp_path / "b", method, max_steps=3)
    resumed = run(pictures, model, tmp_path / "b", method)
    if method == "textual-inversion":
        found = load_file(straight / "learned_embeds.safetensors")
        assert same(found, load_file(resumed / "learned_embeds.safetensors"))
        assert same(unet(straight), unet(model))
    else:
        assert same(unet(straight), unet(resumed))
        assert not same(unet(straight), unet(model))


@pytest.mark.slow
def test_trained_text_encoders_are_saved(pictures: Path, model: Path, tmp_path: Path) -> None:
    out = run(pictures, model, tmp_path / "out", "full of all")
    torch.testing.assert_close(draw(ours(out)), draw(theirs(out)), atol=1e-4, rtol=0)
    for part in ("text_encoder", "text_encoder_2"):
        before, after = (load_file(folder / part / "model.safetensors") for folder in (model, out))
        same_layers = {name for name in before if torch.equal(before[name], after[name])}
        unused = {name for name in before if "layers.1." in name or "final_layer_norm" in name}
        assert same_layers == (unused if part == "text_encoder" else set())


def test_cached_captions_are_what_diffusers_makes_of_them(model: Path, tmp_path: Path) -> None:
    conditioner = caption_conditioner(ours(model), torch.device("cpu"))
    cache = JointTextCache(tmp_path, conditioner)
    captions = ["", "a red thing", "blue"]
    cache.fill_with(captions, conditioner, Accelerator(cpu=True), batch_size=2)
    found = cache.conditioning(captions)
    states, _, pooled, _ = theirs(model).encode_prompt(captions, do_classifier_free_guidance=False)
    assert found.states is not None
    assert found.pooled is not None
    torch.testing.assert_close(found.states[1:].float(), states[1:], atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(found.pooled[1:].float(), pooled[1:], atol=2e-3, rtol=1e-3)
    assert not found.states[0].any()  # as a call without a negative prompt has it
    assert not found.pooled[0].any()
    with pytest.raises(KeyError, match="caption was not encoded: 'red'"):
        cache.conditioning(["red"])


@pytest.mark.parametrize(
    ("size", "view", "told"),
    [
        ((64, 32), View(16, 16), (32, 64, 0, 8, 16, 16)),  # half as large: 32 x 16, eight pixels cut at both sides
        ((64, 32), View(16, 16, crop=(0.25, 0.5)), (32, 64, 0, 4, 16, 16)),
        ((64, 32), View(16, 16, crop=(0.25, 0.5), flip=True), (32, 64, 0, 12, 16, 16)),
        ((30, 40), View(24, 16, crop=(0.5, 1.0)), (40, 30, 16, 0, 16, 24)),  # 24 x 32
    ],
)
def test_what_is_told_of_a_view(size: tuple[int, int], view: View, told: tuple[int, ...]) -> None:
    assert view.told(CaptionedPicture("a", bytes, ("",), size=size)) == told


def test_a_picture_without_size_cannot_be_told_of() -> None:
    with pytest.raises(ValueError, match=r"a\.png: has no size"):
        View(8, 8).told(CaptionedPicture("a.png", bytes, ("",)))


def test_a_new_word_for_both_encoders(pictures: Path, model: Path, tmp_path: Path) -> None:
    captions = {"caption": "a <x>"}
    (pictures / "metadata.jsonl").unlink()
    out = run(pictures, model, tmp_path / "out", "textual-inversion", **captions)
    file = out / "learned_embeds.safetensors"
    found = load_file(file)
    assert {name: tuple(rows.shape) for name, rows in found.items()} == {"clip_l": (2, 16), "clip_g": (2, 24)}
    pipeline, saved = ours(model), ours(out)
    plain, wanted = draw(pipeline, "a <x>"), draw(saved, "a <x>")
    pipeline.load_textual_inversion(file)
    torch.testing.assert_close(draw(pipeline, "a <x>"), wanted, atol=1e-5, rtol=0)
    peer = theirs(model)
    peer.load_textual_inversion(found["clip_l"], token="<x>", text_encoder=peer.text_encoder, tokenizer=peer.tokenizer)
    second = {"text_encoder": peer.text_encoder_2, "tokenizer": peer.tokenizer_2}
    peer.load_textual_inversion(found["clip_g"], token="<x>", **second)
    torch.testing.assert_close(draw(peer, "a <x>"), wanted, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="the word '<x>' is known already"):
        pipeline.load_textual_inversion(file)
    pipeline.unload_textual_inversion()
    torch.testing.assert_close(draw(pipeline, "a <x>"), plain, atol=0, rtol=0)


@pytest.mark.slow
@forks
def test_kills_change_nothing(pictures: Path, model: Path, tmp_path: Path) -> None:
    def train(name: str) -> Path:
        values = {"max_steps": 6, "checkpoint_every": 1, "sample_every": 100, "buckets": True}
        return run(pictures, model, tmp_path / name, "lora of all", **values)

    calm_and_killed(train, tmp_path / "log.txt")
    assert same(*(unet(tmp_path / name) for name in ("calm", "killed")))


@pytest.mark.slow
@forks
def test_two_processes_do_what_one_does(pictures: Path, model: Path, tmp_path: Path) -> None:
    def train(name: str, size: int) -> None:
        run(pictures, model, tmp_path / name, "lora of all", batch_size=size, learning_rate=1e-3)

    log = tmp_path / "log.txt"
    live(lambda: train("one", 2), log)
    live(lambda: train("two", 1), log, processes=2)
    one, two = (load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("one", "two"))
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, atol=1e-4, rtol=1e-3)
