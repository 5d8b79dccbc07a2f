"""CLIP score with small random models of transformers and open_clip."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from tiny import clip_parts
from tiny_clip import MEAN, STD, save_clip
from transformers import CLIPModel

from latentdiff.metrics.clip import load_clip
from latentdiff.metrics.extractors import load_extractor
from latentdiff.metrics.pixels import resize_pictures

PICTURES = [Image.new("RGB", (20, 30), "red"), Image.new("RGB", (30, 20), "blue")]
CAPTIONS = ["a red thing", "blue"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_clip(tmp_path / "clip")


def test_transformers_clip(folder: Path) -> None:
    clip = load_clip(str(folder))
    scores = clip.scores(PICTURES, CAPTIONS)
    model, tokenizer = CLIPModel.from_pretrained(folder), clip_parts()["tokenizer"]
    pixels = (resize_pictures(PICTURES, 16) / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    for i, caption in enumerate(CAPTIONS):
        tokens = tokenizer([caption], return_tensors="pt")
        with torch.no_grad():
            output = model(
                input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, pixel_values=pixels[i : i + 1]
            )
        cosine = F.cosine_similarity(output.image_embeds, output.text_embeds)
        torch.testing.assert_close(scores[i], 100 * cosine[0].clamp(min=0), atol=1e-3, rtol=1e-3)
    pairs = list(zip(PICTURES, CAPTIONS, strict=True))
    assert clip.mean(pairs, batch_size=1) == pytest.approx(float(scores.double().mean()), abs=1e-3)
    assert clip.name == "transformers CLIPModel clip"


def test_long_captions_are_cut(folder: Path) -> None:
    clip = load_clip(str(folder))
    assert clip.scores(PICTURES[:1], ["a very long caption " * 50]).isfinite().all()


def test_its_picture_tower_is_an_extractor_too(folder: Path) -> None:
    assert load_extractor(str(folder))(PICTURES).shape == (2, 8)


def test_open_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "tiny-for-a-test"
    vision = {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8}
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, config)
    model = open_clip.create_model(name).eval()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    clip = load_clip(f"open_clip:{name}/{tmp_path / 'weights.safetensors'}")
    scores = clip.scores(PICTURES, CAPTIONS)
    look = open_clip.get_model_preprocess_cfg(model)
    pixels = resize_pictures(PICTURES, 16) / 255
    pixels = (pixels - torch.tensor(look["mean"]).view(3, 1, 1)) / torch.tensor(look["std"]).view(3, 1, 1)
    with torch.no_grad():
        seen, read = model.encode_image(pixels), model.encode_text(open_clip.get_tokenizer(name)(CAPTIONS))
    torch.testing.assert_close(scores, 100 * F.cosine_similarity(seen, read).clamp(min=0), atol=1e-3, rtol=1e-3)
    assert clip.name == f"open_clip {name} weights.safetensors"
    save_file({"other": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other.safetensors could not be loaded: .*Missing key"):
        load_clip(f"open_clip:{name}/{tmp_path / 'other.safetensors'}")
    whole = (tmp_path / "weights.safetensors").read_bytes()
    (tmp_path / "short.safetensors").write_bytes(whole[:-4])
    with pytest.raises(ValueError, match=r"short\.safetensors is damaged"):
        load_clip(f"open_clip:{name}/{tmp_path / 'short.safetensors'}")
    (tmp_path / "weights.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="pickled weights can run code"):
        load_clip(f"open_clip:{name}/{tmp_path / 'weights.pt'}")
    with pytest.raises(FileNotFoundError, match="no such weights"):
        load_clip(f"open_clip:{name}/nobody")


def test_what_is_no_clip(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ValueError, match="write open_clip:NAME/PRETRAINED"):
        load_clip("open_clip:ViT-B-32")
    with pytest.raises(ValueError, match="no model named 'no-such'"):
        load_clip("open_clip:no-such/laion2b")
    with pytest.raises(FileNotFoundError, match="a CLIP is open_clip"):
        load_clip(str(tmp_path / "none"))
    clip_parts()["text_encoder"].save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match="a CLIP score needs a model of pictures and text"):
        load_clip(str(tmp_path / "text"))
    with pytest.raises(ValueError, match="1 pictures and 2 captions"):
        load_clip(str(folder)).scores(PICTURES[:1], CAPTIONS)


def cut_short(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])


def without_words(folder: Path) -> None:
    for file in folder.glob("*token*"):
        file.unlink()


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def configured(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_short, r"model\.safetensors is damaged"),
        (without_words, "has no tokenizer that knows any words"),
        (pickled, r"clip could not be loaded: .*model\.safetensors"),
        (configured(projection_dim=9), r"clip could not be loaded: the weights are of other shapes than config\.json"),
        (
            configured(model_type="own", auto_map={"AutoConfig": "own.Config", "AutoModel": "own.Model"}),
            "clip could not be loaded: it needs code of its own, which is not run",
        ),
    ],
)
def test_damaged_models_are_refused(folder: Path, damage: Callable[[Path], None], message: str) -> None:
    (folder / "own.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    damage(folder)
    with pytest.raises(ValueError, match=message):
        load_clip(str(folder))
    assert not (folder / "ran").exists()


def test_models_that_cannot_be_fetched_are_named() -> None:
    with pytest.raises(ValueError, match=r"^nobody/has-this is not on this machine, and the hub cannot be reached"):
        load_clip("nobody/has-this")
    with pytest.raises(ValueError, match=r"^open_clip:ViT-B-32/openai is not on this machine, and the hub cannot"):
        load_clip("open_clip:ViT-B-32/openai")
