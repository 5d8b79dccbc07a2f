"""Fine-tuning end to end at tiny sizes: what is trained and what is not, resuming, and what diffusers makes of it."""

import json
import logging
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler
from lives import forks, live
from peft import PeftModel
from safetensors.torch import load_file
from tiny import draw, tiny_pipeline
from typer.testing import CliRunner

from latentdiff import TextToImagePipeline
from latentdiff.interchange.png import read_settings
from latentdiff.text.words import add_words
from latentdiff.training.batch.random_choices import PictureOrder
from latentdiff.training.data import CaptionedPicture
from latentdiff.training.settings import FinetuneSettings
from latentdiff.training.trainers.dreambooth import draw_class_pictures, mix
from latentdiff.training.trainers.finetune import UNDISTILLED, complete, finetune
from latentdiff.training.trainers.textual_inversion import ExtendedEmbedding, check_captions

SMALL = {"batch_size": 2, "max_steps": 4, "checkpoint_every": 2, "sample_every": 4, "lora_rank": 2}
WEIGHTS = {"unet": "diffusion_pytorch_model.safetensors", "text_encoder": "model.safetensors"}

METHODS: dict[str, dict[str, object]] = {
    "full": {"lora_rank": 0, "train_text_encoder": True},
    "lora": {"train_text_encoder": True},
    "dreambooth": {"lora_rank": 0, "caption": "a red cup", "class_prompt": "a cup", "class_pictures": 3},
    "textual-inversion": {"lora_rank": 0, "placeholder_token": "<my-cup>", "initializer_token": "cup"},
    **{kind: {"method": "lora", "adapter": kind, "train_text_encoder": True} for kind in ("dora", "loha", "lokr")},
    "oft": {"method": "lora", "adapter": "oft", "lora_rank": 4},
}
RELATIVES = ("dora", "loha", "lokr", "oft")


def options(method: str, **changes: object) -> dict[str, object]:
    return {**SMALL, "method": method, "learning_rate": 1e-2, **METHODS[method], **changes}


def save_tiny(folder: Path, **kind: Any) -> Path:
    tiny_pipeline(**kind).save_pretrained(folder)
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model")


@pytest.fixture
def uncaptioned(pictures: Path) -> Path:
    """The same pictures without captions."""
    rows = [json.loads(row) for row in (pictures / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    text = "\n".join(json.dumps({"file_name": row["file_name"], "split": row["split"]}) for row in rows)
    (pictures / "metadata.jsonl").write_text(text, encoding="utf-8")
    return pictures


def run(pictures: Path, model: Path, output: Path, **changes: object) -> Path:
    values = {"data": str(pictures), "model": str(model), "output": str(output), **changes}
    return finetune(FinetuneSettings.load(None, values))


def weights(folder: Path, part: str) -> dict[str, torch.Tensor]:
    return load_file(folder / part / WEIGHTS[part])


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def ours(folder: Path) -> TextToImagePipeline:
    pipeline = TextToImagePipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def theirs(folder: Path) -> Any:
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("text", ["bert", "clip"])
def test_lora_merged_and_beside(pictures: Path, tmp_path: Path, text: str) -> None:
    model = save_tiny(tmp_path / "model", text=text)
    out = run(pictures, model, tmp_path / "out", **options("lora"))
    before, merged = draw(ours(model)), draw(theirs(out))
    assert (merged - before).abs().max() > 1e-3
    adapted = ours(model)
    adapted.load_lora_weights(out)
    torch.testing.assert_close(draw(adapted), merged, atol=1e-4, rtol=0)
    if text == "clip":  # diffusers' loader knows no other text encoder
        peer = theirs(model)
        peer.load_lora_weights(str(out / "pytorch_lora_weights.safetensors"))
        torch.testing.assert_close(draw(peer), merged, atol=1e-4, rtol=0)
    for part in WEIGHTS:
        changed, old = weights(out, part), weights(model, part)
        assert changed.keys() == old.keys()
        assert {name for name in old if not torch.equal(changed[name], old[name])} == {
            name for name in old if is_adapted(name)
        }
    assert ours(out).defaults == ours(model).defaults
    assert (out / "training" / "samples" / "step-00000004.png").is_file()


@pytest.mark.parametrize("kind", RELATIVES)
def test_relatives_of_lora(pictures: Path, tmp_path: Path, kind: str) -> None:
    model = save_tiny(tmp_path / "model", text="clip")
    out = run(pictures, model, tmp_path / "out", **options(kind))
    merged = draw(theirs(out))
    assert (merged - draw(ours(model))).abs().max() > 1e-3
    torch.testing.assert_close(draw(ours(out)), merged, atol=1e-4, rtol=0)
    if kind != "oft":
        adapted = ours(model)
        adapted.load_lora_weights(out)
        torch.testing.assert_close(draw(adapted), merged, atol=1e-4, rtol=0)
    if kind == "dora":
        peer = theirs(model)
        peer.load_lora_weights(str(out / "pytorch_lora_weights.safetensors"))
        peer.text_encoder = theirs(out).text_encoder  # transformers 5 leaves out the magnitudes of text encoders
        torch.testing.assert_close(draw(peer), merged, atol=1e-4, rtol=0)
        return
    network: Any = PeftModel.from_pretrained(theirs(model).unet, str(out / "adapter" / "unet"))
    state = network.merge_and_unload().state_dict()
    for name, tensor in weights(out, "unet").items():
        torch.testing.assert_close(state[name], tensor, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "full", "adapter": "loha"}, "adapter does nothing with method=full"),
        ({"method": "lora", "adapter": "oft", "lora_alpha": 2}, "lora_alpha does nothing with adapter=oft"),
        (
            {**METHODS["dreambooth"], "method": "dreambooth", "adapter": "lokr"},
            "adapter=lokr needs a lora_rank=16 or so with method=dreambooth",
        ),
    ],
)
def test_adapters_that_would_do_nothing(
    pictures: Path, model: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(pictures, model, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def is_adapted(name: str) -> bool:
    layers = ("q_proj", "k_proj", "v_proj", "out_proj", "query", "key", "value", "attention.output.dense")
    targets = FinetuneSettings.model_fields["lora_targets"].default
    return any(name.endswith(f".{layer}.weight") for layer in (*layers, *targets))


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=[pytest.mark.slow] if name in RELATIVES else []) for name in METHODS]
)
def test_resumes_exactly(pictures: Path, uncaptioned: Path, model: Path, tmp_path: Path, method: str) -> None:
    caption = {} if method in ("dreambooth", "textual-inversion") else {"caption": "a cup"}
    common = {**options(method), **caption, "ema_decay": 0.5}
    straight = run(uncaptioned, model, tmp_path / "a", **common)
    run(uncaptioned, model, tmp_path / "b", **{**common, "max_steps": 3})
    resumed = run(uncaptioned, model, tmp_path / "b", **common)
    other = run(uncaptioned, model, tmp_path / "c", **{**common, "seed": 1})
    part = "text_encoder" if method == "textual-inversion" else "unet"
    for name in WEIGHTS:
        assert same(weights(straight, name), weights(resumed, name))
    assert not same(weights(straight, part), weights(other, part))


@pytest.mark.slow
@forks
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_do_what_one_does(uncaptioned: Path, model: Path, tmp_path: Path, method: str) -> None:
    caption = {} if method in ("dreambooth", "textual-inversion") else {"caption": "a cup"}

    def train(name: str, size: int) -> None:
        changes = {**options(method, batch_size=size, log_every=1, learning_rate=1e-3), **caption}
        run(uncaptioned, model, tmp_path / name, **changes)

    log = tmp_path / "log.txt"
    live(lambda: train("one", 4), log)
    live(lambda: train("two", 2), log, processes=2)
    for part in WEIGHTS:
        one, two = weights(tmp_path / "one", part), weights(tmp_path / "two", part)
        assert one.keys() == two.keys()
        for name, tensor in one.items():
            torch.testing.assert_close(two[name], tensor, atol=2e-4, rtol=1e-3)


def test_full_trains_all_of_the_unet(pictures: Path, model: Path, tmp_path: Path) -> None:
    out = run(pictures, model, tmp_path / "out", **options("full", train_text_encoder=False))
    changed, old = weights(out, "unet"), weights(model, "unet")
    assert all(not torch.equal(changed[name], old[name]) for name in old)
    assert same(weights(out, "text_encoder"), weights(model, "text_encoder"))
    torch.testing.assert_close(draw(ours(out)), draw(theirs(out)), atol=1e-4, rtol=0)


def test_lora_learns(pictures: Path, model: Path, tmp_path: Path) -> None:
    """What it learns on pictures shows on others of the kind, which it has not seen."""
    targets = ("to_q", "to_k", "to_v", "to_out.0", "conv_in", "conv1", "conv2", "conv_out")
    changes = options("lora", max_steps=40, batch_size=4, sample_every=8, lora_rank=8, lora_targets=targets)
    out = run(pictures, model, tmp_path / "out", **changes)
    rows = [json.loads(line) for line in (out / "training" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["val_loss"] for row in rows if "val_loss" in row]
    assert len(losses) == 5
    assert losses[-1] < 0.96 * losses[0]


def test_gradient_checkpointing_changes_nothing(pictures: Path, model: Path, tmp_path: Path) -> None:
    plain = run(pictures, model, tmp_path / "a", **options("lora"))
    saving = run(pictures, model, tmp_path / "b", **options("lora", gradient_checkpointing=True))
    for name, tensor in load_file(plain / "pytorch_lora_weights.safetensors").items():
        other = load_file(saving / "pytorch_lora_weights.safetensors")[name]
        torch.testing.assert_close(other, tensor, atol=1e-5, rtol=1e-4)


def test_codebook_latents(pictures: Path, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", autoencoder="vq")
    out = run(pictures, model, tmp_path / "out", **options("lora", max_steps=1))
    assert draw(ours(out)).shape == (1, 3, 16, 16)


def test_class_pictures_are_drawn_once(model: Path, tmp_path: Path) -> None:
    def draw_them(**changes: object) -> list[CaptionedPicture]:
        values = {
            **options("dreambooth"),
            "data": "unused",
            "model": str(model),
            "output": str(tmp_path / "o"),
            **changes,
        }
        settings = complete(FinetuneSettings.load(None, values), pipeline)
        return draw_class_pictures(settings, pipeline)

    pipeline = ours(model)
    pictures = draw_them()
    files = [Path(picture.name) for picture in pictures]
    assert [file.name for file in files] == ["00000.png", "00001.png", "00002.png"]
    assert [read_settings(file)["seed"] for file in files] == [0, 1, 2]
    assert all(read_settings(file)["prompts"] == ["a cup"] for file in files)
    assert pictures[0].read() == files[0].read_bytes()
    assert pictures[0].size == (16, 16)
    content = [file.read_bytes() for file in files]

    files[1].unlink()
    times = [files[0].stat().st_mtime_ns, files[2].stat().st_mtime_ns]
    draw_them()
    assert [files[0].stat().st_mtime_ns, files[2].stat().st_mtime_ns] == times  # not drawn again
    assert [file.read_bytes() for file in files] == content  # and the missing one as it was
    draw_them(class_prompt="a thing")
    assert read_settings(files[0])["prompts"] == ["a thing"]
    files[0].write_bytes(b"mine")
    with pytest.raises(FileExistsError, match=r"00000.png was not drawn by latentdiff"):
        draw_them()
    assert files[0].read_bytes() == b"mine"


def test_half_of_the_draws_are_class_pictures() -> None:
    def picture(name: str, weight: float = 1.0, loss_weight: float = 1.0) -> CaptionedPicture:
        return CaptionedPicture(name, bytes, ("a cup",), weight, loss_weight)

    instances = [picture("mine", 1.0), picture("mine", 3.0)]
    priors = [picture("class", loss_weight=0.3) for _ in range(50)]
    mixed = mix(instances, priors)
    order = PictureOrder([one.weight for one in mixed], 20, seed=0)
    drawn = [mixed[i] for step in range(200) for i in order.update(step)]
    assert sum(one.name == "class" for one in drawn) / len(drawn) == pytest.approx(0.5, abs=0.03)
    assert {one.loss_weight for one in drawn if one.name == "class"} == {0.3}
    assert sum(one.weight == 3 for one in drawn) / sum(one.name == "mine" for one in drawn) > 0.7


def test_dreambooth_by_lora(uncaptioned: Path, model: Path, tmp_path: Path) -> None:
    out = run(uncaptioned, model, tmp_path / "out", **options("dreambooth", lora_rank=2))
    assert (out / "pytorch_lora_weights.safetensors").is_file()
    assert len(list((out / "training" / "class_pictures").iterdir())) == 3


@pytest.mark.parametrize(("text", "vectors"), [("bert", 1), ("clip", 3)])
def test_textual_inversion_changes_only_its_rows(uncaptioned: Path, tmp_path: Path, text: str, vectors: int) -> None:
    model = save_tiny(tmp_path / "model", text=text)
    start = "cup" if text == "bert" else "c"
    changes = options("textual-inversion", num_vectors=vectors, initializer_token=start, weight_decay=0.5)
    out = run(uncaptioned, model, tmp_path / "out", **changes)
    assert same(weights(out, "unet"), weights(model, "unet"))
    old, new = weights(model, "text_encoder"), weights(out, "text_encoder")
    (name,) = [name for name in old if name.endswith(("word_embeddings.weight", "token_embedding.weight"))]
    count = len(old[name])
    assert len(new[name]) == count + vectors
    assert torch.equal(new.pop(name)[:count], old.pop(name))
    assert same(old, new)

    learned = load_file(out / "learned_embeds.safetensors")
    assert {word: rows.shape for word, rows in learned.items()} == {"<my-cup>": (vectors, 16)}
    untrained = ours(model)
    first = untrained.text_encoder.get_input_embeddings().weight[
        untrained.tokenizer.convert_tokens_to_ids(untrained.tokenizer.tokenize(start)[0])
    ]
    assert (learned["<my-cup>"] - first).abs().max() > 1e-3
    expected = draw(theirs(out), "a <my-cup>")
    torch.testing.assert_close(draw(ours(out), "a <my-cup>"), expected, atol=1e-4, rtol=0)
    untrained.load_textual_inversion(out)
    torch.testing.assert_close(draw(untrained, "a <my-cup>"), expected, atol=1e-4, rtol=0)
    assert (draw(ours(out), f"a {start}") - expected).abs().max() > 1e-4


def test_extended_embedding() -> None:
    table = torch.nn.Embedding(10, 4)
    extended = ExtendedEmbedding(table, 10, torch.full((2, 4), 7.0))
    ids = torch.tensor([[0, 10, 9, 11]])
    states = extended(ids)
    assert torch.equal(states[0, [0, 2]], table.weight[[0, 9]])
    assert bool((states[0, [1, 3]] == 7).all())
    states[0, 1].sum().backward()
    assert table.weight.grad is None
    assert torch.equal(extended.learned.grad, torch.tensor([[1.0] * 4, [0.0] * 4]))


def test_what_the_method_does_not_use_is_refused(pictures: Path, model: Path, tmp_path: Path) -> None:
    for method, changes in {
        "full": {"lora_rank": 4},
        "lora": {"class_prompt": "a cup"},
        "textual-inversion": {"train_text_encoder": True},
        "dreambooth": {"num_vectors": 2},
    }.items():
        (key,) = changes
        with pytest.raises(ValueError, match=f"{key} does nothing with method={method}"):
            run(pictures, model, tmp_path / "out", **options(method, **changes))


def test_a_word_inside_another_is_not_the_word_to_learn() -> None:
    tokenizer = tiny_pipeline("clip").tokenizer
    add_words(tokenizer, ["qat"])
    check_captions([CaptionedPicture("0.png", bytes, ("a qat, red",))], "qat", tokenizer, 12)
    with pytest.raises(ValueError, match="'conqate' does not have the new word qat, as a word of its own"):
        check_captions([CaptionedPicture("0.png", bytes, ("conqate",))], "qat", tokenizer, 12)


def test_words_that_cannot_be_learned(uncaptioned: Path, model: Path, tmp_path: Path) -> None:
    def learn(**changes: object) -> None:
        run(uncaptioned, model, tmp_path / "out", **options("textual-inversion", **changes))

    with pytest.raises(ValueError, match=r"0.png: its caption 'a cup' does not have the new word <my-cup>"):
        learn(caption="a cup")
    with pytest.raises(ValueError, match=r"0.png: .* longer than the 12 tokens .* <my-cup> is cut off"):
        learn(caption="a beautiful picture of <my-cup>")
    with pytest.raises(ValueError, match="the tokenizer knows 'red' already"):
        learn(placeholder_token="red")
    with pytest.raises(ValueError, match="'mug' is not one token but 3: 'm', '##u', '##g'"):
        learn(initializer_token="mug")
    with pytest.raises(ValueError, match="does not know '%'"):
        learn(initializer_token="%")
    with pytest.raises(ValueError, match="does not take 'my cup' as one word"):
        learn(placeholder_token="my cup")


def test_models_that_cannot_be_fine_tuned(pictures: Path, model: Path, tmp_path: Path) -> None:
    inpainting = save_tiny(tmp_path / "inpainting", in_channels=9)
    with pytest.raises(ValueError, match=r"its UNet takes 9 channels .* inpainting .* cannot be fine-tuned"):
        run(pictures, inpainting, tmp_path / "out", **options("lora"))
    with pytest.raises(ValueError, match="resolution 17 is not divisible by the autoencoder's factor 2"):
        run(pictures, model, tmp_path / "out", **options("lora", resolution=17))
    with pytest.raises(FileNotFoundError, match="no such folder"):
        run(pictures, tmp_path / "missing", tmp_path / "out", **options("lora"))
    with pytest.raises(ValueError, match="is the model to start from"):
        run(pictures, model, model, **options("lora"))
    with pytest.raises(ValueError, match="was not made by training"):
        run(pictures, model, save_tiny(tmp_path / "precious"), **options("lora"))


def test_what_depends_on_the_model(model: Path) -> None:
    values = {**options("lora"), "data": "unused", "model": str(model), "output": "unused"}
    own = complete(FinetuneSettings.load(None, values), ours(model))
    assert (own.resolution, own.sample_steps, own.sample_guidance_scale) == (16, 2, 3.0)
    given = {**values, "resolution": 32, "sample_steps": 5, "sample_guidance_scale": 2.0}
    mine = complete(FinetuneSettings.load(None, given), ours(model))
    assert (mine.resolution, mine.sample_steps, mine.sample_guidance_scale) == (32, 5, 2.0)


def test_min_snr_is_off_for_a_model_that_begins_at_pure_noise(model: Path) -> None:
    values = {**options("full"), "data": "unused", "model": str(model), "output": "unused"}
    pipeline = ours(model)
    assert complete(FinetuneSettings.load(None, values), pipeline).min_snr_gamma == 5
    change = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    pipeline.scheduler = DDIMScheduler.from_config({**pipeline.scheduler.config, **change})
    assert complete(FinetuneSettings.load(None, values), pipeline).min_snr_gamma is None
    assert complete(FinetuneSettings.load(None, {**values, "min_snr_gamma": 5}), pipeline).min_snr_gamma == 5
    named = {**values, "process": "gaussian", "process_options": {"zero_terminal_snr": True}}
    assert FinetuneSettings.load(None, named).min_snr_gamma is None


@pytest.mark.parametrize(("method", "undone"), [("lora", True), ("full", True), ("textual-inversion", False)])
def test_a_model_of_few_steps_draws_in_many_once_its_unet_is_tuned(
    request: pytest.FixtureRequest, model: Path, tmp_path: Path, method: str, undone: bool
) -> None:
    pictures = request.getfixturevalue("pictures" if undone else "uncaptioned")
    few = {"num_inference_steps": 4, "guidance_scale": 1.0}
    pipeline = ours(model)
    pipeline.register_defaults(**few)
    pipeline.save_pretrained(tmp_path / "few")
    changes = options(method)
    changes.pop("sample_steps", None)
    changes.pop("sample_guidance_scale", None)
    run(pictures, tmp_path / "few", tmp_path / "out", **{**changes, "max_steps": 1, "warmup_steps": 0})
    assert ours(tmp_path / "out").defaults == (UNDISTILLED if undone else few)
    assert ours(tmp_path / "few").defaults == few


def test_command(pictures: Path, model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import typer

    from latentdiff.training.commands.train import finetune as command

    app = typer.Typer()
    app.command()(command)
    logging.getLogger("latentdiff").setLevel(logging.NOTSET)
    common = ["--data", str(pictures), "--output", str(tmp_path / "out"), "--model", str(model)]
    small = [f"{key}={value}" for key, value in options("lora", max_steps=1, warmup_steps=0).items() if key != "method"]
    result = CliRunner().invoke(app, [*common, "--method", "lora", *small], catch_exceptions=False)
    assert result.exit_code == 0
    assert "The pipeline is in" in result.output
    assert (tmp_path / "out" / "model_index.json").is_file()
    assert (tmp_path / "out" / "training" / "reconstructions.png").is_file()
    assert f"{model} cannot hold these pictures" in caplog.text
    with pytest.raises(ValueError, match="'method' is given twice"):
        CliRunner().invoke(app, [*common, "--method", "lora", "method=full"], catch_exceptions=False)
