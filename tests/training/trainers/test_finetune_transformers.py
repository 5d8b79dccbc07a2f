"""Fine-tuning of PixArt's and DiT's folders, as they come from diffusers: from pictures to what diffusers draws."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from compare import largest_difference
from lives import calm_and_killed, forks, live
from peft import PeftModel
from safetensors.torch import load_file
from tiny_transformers import dit_folder, pixart_folder

from latentdiff import ClassConditionalPipeline, TextToImagePipeline
from latentdiff.interchange.lora.formats import convert_lora
from latentdiff.training.settings import FinetuneSettings
from latentdiff.training.trainers.encode import encode
from latentdiff.training.trainers.finetune import finetune

SMALL = {"batch_size": 2, "max_steps": 4, "checkpoint_every": 2, "sample_every": 4, "learning_rate": 1e-2}
ATTENTION = {"to_q", "to_k", "to_v", "to_out.0"}
CALL: dict[str, Any] = {"num_inference_steps": 3, "seed": 0, "output_type": "pt"}


def slow(name: str) -> Any:
    return pytest.param(name, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def pixart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pixart_folder(tmp_path_factory.mktemp("pixart") / "model", "bert")


@pytest.fixture(scope="module")
def dit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dit_folder(tmp_path_factory.mktemp("dit") / "model")


def run(data: Path, model: Path, output: Path, **changes: object) -> Path:
    values = {**SMALL, "data": str(data), "model": str(model), "output": str(output), **changes}
    return finetune(FinetuneSettings.load(None, values))


def transformer(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def changed(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> set[str]:
    assert a.keys() == b.keys()
    return {name for name in a if not torch.equal(a[name], b[name])}


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn(folder: Path) -> Any:
    return quiet(TextToImagePipeline.from_pretrained(folder))("a red thing", **CALL).images


def test_a_lora_of_pixart_merged_and_beside(pictures: Path, pixart: Path, tmp_path: Path) -> None:
    out = run(pictures, pixart, tmp_path / "out", method="lora", lora_rank=2)
    merged = drawn(out)
    assert (merged - drawn(pixart)).abs().max() > 1e-3
    layers = {name.partition(".")[2].partition(".")[2] for name in changed(transformer(out), transformer(pixart))}
    assert {name.removesuffix(".weight").partition(".")[2] for name in layers if name.startswith("attn")} == ATTENTION
    assert {name for name in layers if not name.startswith("attn")} == {"ff.net.0.proj.weight", "ff.net.2.weight"}
    adapted: Any = quiet(TextToImagePipeline.from_pretrained(pixart))
    loaded = adapted.load_lora_weights(out)
    assert not loaded.unmatched
    assert all(key.startswith("transformer.transformer_blocks.") for key in loaded.matched)
    torch.testing.assert_close(adapted("a red thing", **CALL).images, merged, atol=1e-4, rtol=0)
    adapted.unload_lora_weights()
    assert torch.equal(adapted("a red thing", **CALL).images, drawn(pixart))
    # PEFT loads it into diffusers' transformer, and its own format is read, as PixArt's scripts write it
    convert_lora(out / "pytorch_lora_weights.safetensors", tmp_path / "peft", "peft")
    theirs = diffusers.PixArtTransformer2DModel.from_pretrained(pixart / "transformer")
    peer = PeftModel.from_pretrained(theirs, tmp_path / "peft").merge_and_unload()
    for name, tensor in peer.state_dict().items():
        torch.testing.assert_close(tensor, transformer(out)[name], atol=1e-6, rtol=0)
    adapted.load_lora_weights(tmp_path / "peft")
    torch.testing.assert_close(adapted("a red thing", **CALL).images, merged, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="kohya's format has no name for it"):
        convert_lora(out / "pytorch_lora_weights.safetensors", tmp_path / "kohya.safetensors", "kohya")


@pytest.mark.parametrize("method", [slow("full"), "lora", slow("dreambooth")])
def test_pixart_resumes_exactly_and_diffusers_draws_it(
    pictures: Path, pixart: Path, tmp_path: Path, method: str
) -> None:
    options: dict[str, Any] = {"method": method, **({"lora_rank": 2} if method == "lora" else {})}
    if method == "dreambooth":
        options |= {"caption": "a red thing", "class_prompt": "a thing", "class_pictures": 2}
    out = run(pictures, pixart, tmp_path / "a", **options)
    run(pictures, pixart, tmp_path / "b", **options, max_steps=2)
    assert same(transformer(out), transformer(run(pictures, pixart, tmp_path / "b", **options)))
    ours, theirs = (quiet(one.from_pretrained(out)) for one in (TextToImagePipeline, diffusers.DiffusionPipeline))
    assert type(theirs) is diffusers.PixArtAlphaPipeline
    call = {"num_inference_steps": 2, "output_type": "pt"}
    found = ours("a red thing", generator=torch.Generator().manual_seed(7), **call).images
    wanted = theirs("a red thing", generator=torch.Generator().manual_seed(7), **call, **ours.diffusers_options).images
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    assert "PixArtAlphaPipeline.from_pretrained" in (out / "README.md").read_text()


def test_pixart_that_is_told_sizes_is_trained_with_them(pictures: Path, tmp_path: Path) -> None:
    model = pixart_folder(tmp_path / "model", "bert", use_additional_conditions=True)
    before = transformer(model)
    for cached in (True, False):
        out = run(pictures, model, tmp_path / str(cached), method="full", cache_text=cached, max_steps=2)
        assert any("resolution_embedder" in name for name in changed(before, transformer(out)))


@pytest.mark.parametrize("method", [slow("full"), "lora"])
def test_dit_learns_its_own_classes_and_diffusers_draws_it(
    numbered: Path, dit: Path, tmp_path: Path, method: str
) -> None:
    options: dict[str, Any] = {"method": method, **({"lora_rank": 2} if method == "lora" else {})}
    out = run(numbered, dit, tmp_path / "a", **options)
    run(numbered, dit, tmp_path / "b", **options, max_steps=2)
    assert same(transformer(out), transformer(run(numbered, dit, tmp_path / "b", **options)))
    ours, theirs = (quiet(one.from_pretrained(out)) for one in (ClassConditionalPipeline, diffusers.DiffusionPipeline))
    assert type(theirs) is diffusers.DiTPipeline
    assert largest_difference(ours, theirs, class_labels=[3], num_inference_steps=2) < 1e-4
    before: Any = quiet(ClassConditionalPipeline.from_pretrained(dit))
    merged, old = ours(["item 3"], **CALL).images, before(["item 3"], **CALL).images
    assert (merged - old).abs().max() > 1e-3
    assert "latentdiff generate --class 'thing 3, item 3' --model" in (out / "README.md").read_text()
    if method == "lora":
        before.load_lora_weights(out)
        torch.testing.assert_close(before(["item 3"], **CALL).images, merged, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("pixart", {"method": "lora", "train_text_encoder": True}, "whose text encoder, if any, is not trained"),
        (
            "pixart",
            {"method": "textual-inversion", "placeholder_token": "<x>", "initializer_token": "cup"},
            "is a PixArtTextToImagePipeline, whose text encoder",
        ),
        ("pixart", {"method": "lora", "adapter": "loha"}, "adapter=loha is for UNets"),
        ("pixart", {"method": "lora", "lora_targets": ("conv1",)}, "the denoiser has no layer 'conv1'"),
        ("pixart", {"method": "full", "process": "flow"}, "gives 8 channels for latents of 4, variances among them"),
        ("pixart", {"method": "full", "resolution": 18}, "do not divide into patches of 2"),
        ("dit", {"method": "dreambooth", "caption": "a", "class_prompt": "b"}, "draws classes and reads no text"),
        ("dit", {"method": "full"}, r"there is no class 'a red thing'.*a class that the model knows is needed"),
    ],
)
def test_what_does_not_go_is_refused(
    pictures: Path, tmp_path: Path, request: pytest.FixtureRequest, kind: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(pictures, request.getfixturevalue(kind), tmp_path / "out", **changes)
    assert not (tmp_path / "out" / "model_index.json").exists()


@pytest.mark.parametrize("kind", ["pixart", slow("dit")])
def test_encoded_beforehand_nothing_is_left_to_encode(
    numbered: Path, tmp_path: Path, request: pytest.FixtureRequest, kind: str
) -> None:
    model, cache = request.getfixturevalue(kind), tmp_path / "cache"
    values = {**SMALL, "data": str(numbered), "model": str(model), "method": "full", "max_steps": 1}
    encode(FinetuneSettings.load(None, {**values, "output": str(cache)}))
    before = {file for file in cache.rglob("*.safetensors")}
    assert {file.relative_to(cache).parts[0] for file in before} >= (
        {"latents", "text"} if kind == "pixart" else {"latents"}
    )
    run(numbered, model, tmp_path / "out", method="full", max_steps=1, cache_dir=str(cache))
    assert {file for file in cache.rglob("*.safetensors")} == before


@pytest.mark.slow
@forks
@pytest.mark.parametrize("kind", ["pixart", "dit"])
def test_kills_and_several_processes_change_nothing(
    numbered: Path, tmp_path: Path, request: pytest.FixtureRequest, kind: str
) -> None:
    model, log = request.getfixturevalue(kind), tmp_path / "log.txt"

    def train(name: str, size: int = 2) -> None:
        changes = {"method": "lora", "lora_rank": 2, "checkpoint_every": 1, "batch_size": size, "learning_rate": 1e-3}
        run(numbered, model, tmp_path / name, **changes)

    calm_and_killed(train, log)
    live(lambda: train("two", 1), log, processes=2)
    calm, two, killed = (transformer(tmp_path / name) for name in ("calm", "two", "killed"))
    assert same(calm, killed)
    for name, tensor in calm.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-4, rtol=1e-3)
