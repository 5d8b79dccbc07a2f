import json
import shutil
from pathlib import Path

import pytest

from latentdiff.interchange.fingerprint import digest_in_background, model_digest


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Files named as a pipeline's are."""
    folder = tmp_path / "model"
    index = {"_class_name": "X", "_diffusers_version": "1", "unet": ["diffusers", "UNet"], "tokenizer": ["a", "B"]}
    index |= {"safety_checker": [None, None]}
    (folder / "unet").mkdir(parents=True)
    (folder / "tokenizer").mkdir()
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "unet" / "config.json").write_text('{"a": 1, "_diffusers_version": "1"}')
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"weights")
    (folder / "tokenizer" / "merges.txt").write_text("a b")
    return folder


def test_it_depends_on_names_and_contents_only(model: Path, tmp_path: Path) -> None:
    digest = model_digest(model)
    assert len(digest) == 64
    copy = tmp_path / "elsewhere"
    copy.mkdir()
    for file in sorted((path for path in model.rglob("*") if path.is_file()), reverse=True):
        (copy / file.relative_to(model)).parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy / file.relative_to(model))
    assert model_digest(copy) == digest
    assert digest_in_background(copy).result() == digest


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("unet/diffusion_pytorch_model.safetensors", "weightz"),
        ("unet/config.json", '{"a": 2, "_diffusers_version": "1"}'),
        ("tokenizer/merges.txt", "b a"),
        ("tokenizer/vocab.json", "{}"),
        ("model_index.json", '{"unet": ["diffusers", "UNet"]}'),
        ("model_index.json", '{"unet": ["diffusers", "UNet2"], "tokenizer": ["a", "B"]}'),
    ],
)
def test_another_model_has_another(model: Path, name: str, content: str) -> None:
    before = model_digest(model)
    (model / name).write_text(content)
    assert model_digest(model) != before


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("README.md", "hello"),
        ("training/config.json", "{}"),
        ("unet/diffusion_pytorch_model.bin", "pickle"),
        ("unet/diffusion_pytorch_model.fp16.safetensors", "half"),
        ("unet/diffusion_pytorch_model.safetensors.index.json", "{}"),
        ("unet/config.json", '{"_diffusers_version": "2",\n "a": 1}'),
        ("safety_checker/config.json", "{}"),
    ],
)
def test_what_is_not_used_does_not_count(model: Path, name: str, content: str) -> None:
    before = model_digest(model)
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).write_text(content)
    assert model_digest(model) == before


def test_variant(model: Path) -> None:
    before = model_digest(model)
    half = model / "unet" / "diffusion_pytorch_model.fp16-00001-of-00002.safetensors"
    half.write_bytes(b"half")
    assert model_digest(model) == before
    assert model_digest(model, "fp16") != before
    assert model_digest(model, "bf16") == before, "a component without the variant has its ordinary weights"


def test_blobs_of_the_hub_are_known_by_their_names(model: Path, tmp_path: Path) -> None:
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    before = model_digest(model)
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    import hashlib

    blob = blobs / hashlib.sha256(b"weights").hexdigest()
    blob.write_bytes(b"never read")
    weights.unlink()
    weights.symlink_to(blob)
    assert model_digest(model) == before


def test_no_model(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="model_index"):
        model_digest(tmp_path)
    with pytest.raises(FileNotFoundError, match="model_index"):
        digest_in_background(tmp_path).result()
