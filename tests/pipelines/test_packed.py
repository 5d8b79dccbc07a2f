"""Single files of our own layout: any kind of pipeline out and in again, byte for byte, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import VAE, tiny_pipeline
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from latentdiff import ClassConditionalPipeline, ImageToImagePipeline, TextToImagePipeline, UnconditionalPipeline
from latentdiff.cli import application
from latentdiff.interchange.fingerprint import model_digest
from latentdiff.interchange.packed import KEY, pack, packed_content, packed_index
from latentdiff.models import AutoencoderKL, FSQModel, NoisyClassifier, UNet2DModel, VQModel
from latentdiff.pipelines import ImageVariationPipeline
from latentdiff.pipelines.registry import kind_in

TEXTLESS: dict[str, Any] = {
    "sample_size": 8,
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "block_out_channels": (8,),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
FSQ = {key: value for key, value in VAE.items() if key not in ("scaling_factor", "latent_channels")}


def textless() -> UnconditionalPipeline:
    return UnconditionalPipeline(
        UNet2DModel(**TEXTLESS, in_channels=4, out_channels=4).eval(),
        diffusers.DDIMScheduler(),
        VQModel(**VAE, num_vq_embeddings=16).eval(),
    )


def classes() -> ClassConditionalPipeline:
    scale = {
        key: TEXTLESS[key] for key in ("sample_size", "down_block_types", "block_out_channels", "layers_per_block")
    }
    classifier = NoisyClassifier(
        **scale, num_classes=3, attention_head_dim=4, norm_num_groups=4, attn_norm_num_groups=4
    ).eval()
    unet = UNet2DModel(**TEXTLESS, num_class_embeds=4).eval()
    names = {0: "cat, kitten", 1: "dog", 2: "bird"}
    return ClassConditionalPipeline(unet, diffusers.DDIMScheduler(), classifier=classifier, id2label=names)


def variations() -> ImageVariationPipeline:
    parts = tiny_pipeline("clip").components
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4,
        projection_dim=16,
    )  # fmt: skip
    encoder = CLIPVisionModelWithProjection(config).eval()
    return ImageVariationPipeline(parts["vae"], encoder, parts["unet"], parts["scheduler"])


def with_codes() -> TextToImagePipeline:
    parts = tiny_pipeline("clip").components
    return TextToImagePipeline(**{**parts, "vae": FSQModel(**FSQ, levels=(3, 3, 3, 3)).eval()})


def guided_by_itself() -> TextToImagePipeline:
    """With a UNet that takes the guidance scale, for which the original code has no weights."""
    return tiny_pipeline("clip", time_cond_proj_dim=8)


KINDS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "another text encoder": (tiny_pipeline, {"prompt": "a red thing"}),
    "another autoencoder": (with_codes, {"prompt": "a"}),
    "another UNet": (guided_by_itself, {"prompt": "a"}),
    "classes": (classes, {"class_labels": "dog"}),
    "unconditional": (textless, {"batch_size": 1}),
    "variations": (variations, {"image": torch.zeros(1, 3, 8, 8)}),
}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def run(*arguments: object) -> None:
    application()([str(argument) for argument in arguments], standalone_mode=False)


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_out_and_in_again(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make, call = KINDS[name]
    made, file = make(), tmp_path / "model.safetensors"
    made.save_pretrained(tmp_path / "made")  # the first loading adds keys to the tokenizer's config
    pipeline = type(made).from_pretrained(tmp_path / "made")
    pipeline.save_single_file(file)
    assert "model.safetensors is in latentdiff's own layout, which other programs do not read" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "model.safetensors"]
    pipeline.save_pretrained(tmp_path / "folder")
    again = type(pipeline).from_single_file(file)
    again.save_pretrained(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "folder")
    run("convert", file, tmp_path / "converted")
    assert contents(tmp_path / "converted") == contents(tmp_path / "folder")
    run("convert", tmp_path / "folder", tmp_path / "second.safetensors")
    assert (tmp_path / "second.safetensors").read_bytes() == file.read_bytes()
    assert model_digest(file) == model_digest(tmp_path / "folder")
    for one in (made, again):
        one.set_progress_bar_config(disable=True)
    call = {**call, "seed": 3, "num_inference_steps": 2, "output_type": "pt"}
    assert torch.equal(again(**call).images, made(**call).images)
    assert again.config._name_or_path == str(file)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with BERT's text encoder; not to be changed."""
    file = tmp_path_factory.mktemp("packed") / "model.safetensors"
    tiny_pipeline().save_single_file(file)
    return file


def test_precisions_and_components(packed: Path, tmp_path: Path) -> None:
    run("convert", packed, tmp_path / "half.safetensors", "--dtype", "float16")
    half = tmp_path / "half.safetensors"
    assert {tensor.dtype for tensor in load_file(half).values() if tensor.is_floating_point()} == {torch.float16}
    assert TextToImagePipeline.from_single_file(half, dtype=None).unet.dtype == torch.float16
    assert AutoencoderKL.from_single_file(half, dtype=None).dtype == torch.float16
    loaded = ImageToImagePipeline.from_single_file(half)
    assert loaded.unet.dtype == loaded.text_encoder.dtype == loaded.vae.dtype == torch.float32
    vae = AutoencoderKL.from_single_file(packed)
    assert TextToImagePipeline.from_single_file(packed, vae=vae, tokenizer=loaded.tokenizer).vae is vae
    run("convert", packed, tmp_path / "vae", "--component", "vae")
    assert torch.equal(
        AutoencoderKL.from_pretrained(tmp_path / "vae").decoder.conv_in.weight, vae.decoder.conv_in.weight
    )
    classes().save_single_file(tmp_path / "classes.safetensors")
    assert NoisyClassifier.from_single_file(tmp_path / "classes.safetensors").config.num_classes == 3


def test_what_the_file_is_for_is_seen_without_its_weights(packed: Path, tmp_path: Path) -> None:
    textless().save_single_file(tmp_path / "any.safetensors")
    assert kind_in(packed).name == "TextToImagePipeline"
    assert kind_in(packed, ["image"]).name == "ImageToImagePipeline"
    assert kind_in(tmp_path / "any.safetensors", textless=True).name == "UnconditionalPipeline"


def test_what_does_nothing_is_refused(packed: Path, tmp_path: Path) -> None:
    for options, message in (
        ({"scaling_factor": 0.5}, "scaling_factor='0.5' does nothing"),
        ({"ema": True}, "ema='True' does nothing"),
        ({"tokenizer": "somewhere"}, "tokenizer='somewhere' does nothing"),
        ({"vae": tmp_path / "vae.safetensors"}, "vae=.* does nothing"),
    ):
        with pytest.raises(ValueError, match=rf"model\.safetensors holds the whole folder of a model, so {message}"):
            TextToImagePipeline.from_single_file(packed, **options)
    with pytest.raises(ValueError, match=r"model\.safetensors holds its networks' configs, so sample_size=8 does noth"):
        AutoencoderKL.from_single_file(packed, sample_size=8)
    with pytest.raises(ValueError, match=r"model\.safetensors holds no VQModel; it has .*AutoencoderKL \(vae\)"):
        VQModel.from_single_file(packed)
    with pytest.raises(
        ValueError, match=r"model\.safetensors: its unet is a UNet2DConditionModel; this pipeline takes"
    ):
        UnconditionalPipeline.from_single_file(packed)
    with pytest.raises(ValueError, match="--ema does nothing for a file that holds a whole folder"):
        run("convert", packed, tmp_path / "x", "--ema")
    with pytest.raises(FileNotFoundError, match=r"is a file, and a model's folder is needed here: 'latentdiff convert"):
        TextToImagePipeline.from_pretrained(packed)
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors does not hold a ClassConditionalPipeline"):
        ClassConditionalPipeline.from_single_file(tmp_path / "other.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["other.safetensors"]


def changed(source: Path, target: Path, change: Callable[[dict[str, Any]], Any], **tensors: torch.Tensor) -> Path:
    """A copy with other metadata."""
    with safe_open(source, "pt") as stream:
        metadata = dict(stream.metadata())
    content = json.loads(metadata[KEY])
    change(content)
    metadata[KEY] = json.dumps(content)
    save_file(load_file(source) | tensors, target, metadata)
    return target


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(version=2), "its layout has the version 2, and this latentdiff reads version 1"),
        (lambda c: c.update(texts=[]), "its texts should have a text for each name"),
        (lambda c: c["texts"].update({"../mark.json": "{}"}), r"'\.\./mark\.json' is no name for a file"),
        (lambda c: c["texts"].update({"/tmp/mark.json": "{}"}), "is no name for a file"),
        (lambda c: c["texts"].update({"unet/../../mark.json": "{}"}), "is no name for a file"),
        (lambda c: c["texts"].update({"unet\\..\\mark.json": "{}"}), "is no name for a file"),
        (lambda c: c["texts"].update({"unet/.hidden.json": "{}"}), "is no name for a file"),
        (lambda c: c["texts"].update({"unet/evil.py": "open('mark', 'w')"}), "is no name for a file"),
        (lambda c: c["binaries"].update({"unet/model.bin": "AAAA"}), "is no name for a file"),
        (lambda c: c["binaries"].update({"tokenizer/spiece.model": "no base 64"}), "spiece.model is not base64"),
        (lambda c: c["texts"].update({"tokenizer/a.txt": "\ud800"}), "a.txt is not Unicode"),
        (lambda c: c["weights"].update(unet="../x.safetensors"), "is no name for a component's weights"),
        (lambda c: c["weights"].update({"..": "x.safetensors"}), "is no name for a component's weights"),
        (lambda c: c["weights"].update(unet="diffusion_pytorch_model.bin"), "is no name for a component's weights"),
        (lambda c: c["weights"].pop("unet"), "'unet.* is of no component"),
        (lambda c: c["texts"].update({"UNET/config.json": "{}"}), "files of one name"),
        (lambda c: c["texts"].update({f"a/{i}.txt": "" for i in range(1001)}), "too many of them"),
        (lambda c: c["texts"].pop("model_index.json"), "it has no model_index.json"),
        (lambda c: c["texts"].update({"model_index.json": "[]"}), "a JSON object is expected"),
        (lambda c: c["texts"].update({"unet/adapter_config.json": "{}"}), "/unet holds an adapter"),
        (lambda c: c["texts"].update({"model_index.json": '{"unet": ["os", "system"]}'}), "unet is of 'os'"),
        (lambda c: c["texts"].update({"unet/config.json": '{"sample_size": "x"}'}), "/unet: "),
    ],
)
def test_hostile_files(change: Any, message: str, packed: Path, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "here"))
    file = changed(packed, tmp_path / "bad.safetensors", change)
    with pytest.raises((ValueError, OSError), match=rf"{file}.*{message}"):
        TextToImagePipeline.from_single_file(file)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["bad.safetensors", "here"]


def test_weights_must_be_there(packed: Path, tmp_path: Path) -> None:
    file = changed(packed, tmp_path / "more.safetensors", lambda content: None, alone=torch.zeros(1))
    with pytest.raises(ValueError, match="its 'alone' is of no component"):
        packed_content(file)
    with safe_open(packed, "pt") as stream:
        metadata = stream.metadata()
    save_file({"vae.decoder.conv_in.bias": torch.zeros(8)}, file, metadata)
    with pytest.raises(ValueError, match=rf"{file}/.* are missing"):
        TextToImagePipeline.from_single_file(file)
    with pytest.raises(ValueError, match=rf"{file}: \d+ weights of its vae are missing"):
        AutoencoderKL.from_single_file(file)


def test_files_that_are_no_text(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    (folder / "tokenizer" / "spiece.model").write_bytes(b"\xff\x00\r\n")
    (folder / "tokenizer" / "merges.txt").write_bytes("ä\r\nb\rc\n".encode())
    pack(folder, tmp_path / "a.safetensors")
    from latentdiff.interchange.packed import unpack

    (tmp_path / "out").mkdir()
    unpack(tmp_path / "a.safetensors", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(folder)
    assert packed_index(tmp_path / "a.safetensors") == {}
    (folder / "tokenizer" / "code.py").write_text("")
    with pytest.raises(ValueError, match=r"'tokenizer/code\.py' is no name for a file"):
        pack(folder, tmp_path / "b.safetensors")
    assert not (tmp_path / "b.safetensors").exists()
