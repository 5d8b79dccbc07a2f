"""Captions by a model: a tiny BLIP with random weights."""

from pathlib import Path

import hostile
import pytest
import torch
from tiny_blip import WORDS, save_blip
from typer.testing import CliRunner

from latentdiff.cli import application
from latentdiff.training.data import load_pictures
from latentdiff.training.data.captioner import TOKENS, Captioner, write_new


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_blip(tmp_path / "blip")


def caption(*arguments: object) -> str:
    return CliRunner().invoke(application(), ["caption", *map(str, arguments)], catch_exceptions=False).output


def test_pictures_without_captions_get_some(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for name in ("1.png", "2.png", "more/3.png", "bad.png"):
        (folder / name).write_bytes(hostile.encode(hostile.noise(len(name))) if name != "bad.png" else b"no picture")
    (folder / "2.txt").write_text("my own")
    (folder / "more" / "3.txt").write_text(" ")
    before = hostile.state(folder)
    assert "1 caption is in a .txt file beside its picture" in caption(folder, "--model", model)
    written = (folder / "1.txt").read_text()
    assert set(written.split()) <= {word.lower() for word in WORDS} | set(WORDS)
    assert written.strip()
    after = hostile.state(folder)
    assert {name: after[name] for name in before} == before
    assert len(after) == len(before) + 1
    assert [picture.captions[0] for picture in load_pictures(str(folder))] == [written.strip(), "no picture", "my own"][
        ::2
    ]
    assert "No caption was written: no picture in" in caption(folder, "--model", model)


def test_without_a_model_one_that_works_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"latentdiff caption \S+ --model Salesforce/blip-image-captioning-base"):
        caption(tmp_path)


def test_a_prompt_begins_the_caption(model: Path, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "1.png").write_bytes(hostile.encode(hostile.noise(1)))
    caption(tmp_path / "pictures", "--model", model, "--prompt", "a red")
    assert "a red" in (tmp_path / "pictures" / "1.txt").read_text()


def test_what_cannot_caption(model: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        caption(tmp_path / "nowhere", "--model", model)
    (tmp_path / "pictures").mkdir()
    with pytest.raises(FileNotFoundError, match="no such folder; give the folder of an image-to-text model"):
        caption(tmp_path / "pictures", "--model", tmp_path / "nowhere")
    (tmp_path / "1.txt").write_text("mine")
    with pytest.raises(FileExistsError):
        write_new(tmp_path / "1.txt", "other")
    assert (tmp_path / "1.txt").read_text() == "mine"


def test_a_chat_model_answers(tmp_path: Path) -> None:
    """A tiny LLaVA with random weights: its answer is the caption, without the question."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<unk>", "</s>", "<image>", "user", "a", "red", "cup", "Describe", "this", "picture", "."]
    split = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    split.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>"}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=split, additional_special_tokens=["<image>"], **special
    )
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.LlavaConfig(
        vision_config={**size, "model_type": "clip_vision_model", "image_size": 32, "patch_size": 16},
        text_config={**size, **ids, "model_type": "llama", "vocab_size": len(words), "num_key_value_heads": 2},
        image_token_index=3,
    )
    square = {"height": 32, "width": 32}
    template = (
        "{% for m in messages %}{{ m['role'] }} {% for p in m['content'] %}"
        "{% if p['type'] == 'image' %}<image> {% else %}{{ p['text'] }}{% endif %}{% endfor %}{% endfor %}"
    )
    torch.manual_seed(0)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    transformers.LlavaProcessor(
        transformers.CLIPImageProcessor(size=square, crop_size=square),
        tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    ).save_pretrained(tmp_path)
    captioner = Captioner.load(str(tmp_path))
    answers = [captioner(hostile.noise(1), prompt) for prompt in (None, "a red cup")]
    assert answers[0] == captioner(hostile.noise(1))
    assert all(answer and set(answer.split()) <= set(words) for answer in answers)
    assert all(len(answer.split()) <= TOKENS for answer in answers)
