"""Cached text states are the encoder's own, under a key that changes with whatever they depend on."""

import logging
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from accelerate import Accelerator

from latentdiff.text import encode_prompts
from latentdiff.training.batch.conditions import TextCache, caption_key, text_digest

CAPTIONS = ["", "a red thing", "red", "a", "green, blue; Grün 🙂", "a \x00 b", "a broken \ud800 half", "A RED THING"]


@pytest.fixture(params=["bert", "clip"])
def parts(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    made = tiny.bert_parts() if request.param == "bert" else tiny.clip_parts()
    return made["tokenizer"], made["text_encoder"]


def filled(folder: Path, captions: list[str], parts: tuple[Any, Any], accelerator: Accelerator) -> TextCache:
    cache = TextCache(folder, *parts)
    cache.fill(captions, *parts, accelerator, batch_size=3)
    return cache


def test_states_are_those_of_encode_prompts(parts: tuple[Any, Any], accelerator: Accelerator, tmp_path: Path) -> None:
    captions = [caption for caption in CAPTIONS if "\ud800" not in caption]
    cache = filled(tmp_path, captions, parts, accelerator)
    for caption in captions:
        with torch.no_grad():
            states = encode_prompts([caption], *parts)[0]
        assert cache[caption].shape == (12, 16)
        assert cache[caption].dtype == torch.float16
        torch.testing.assert_close(cache[caption].float(), states, atol=1e-4, rtol=1e-3)
    with pytest.raises(KeyError, match="caption was not encoded: 'nothing'"):
        cache["nothing"]


def test_captions_that_differ_at_all_have_keys_of_their_own() -> None:
    assert len({caption_key(caption) for caption in CAPTIONS}) == len(CAPTIONS)


def test_only_what_is_missing_is_encoded(
    parts: tuple[Any, Any], accelerator: Accelerator, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    filled(tmp_path, ["a red thing", "red"], parts, accelerator)
    filled(tmp_path, ["a red thing", "blue", "red"], parts, accelerator)
    filled(tmp_path, ["blue", "red"], parts, accelerator)
    said = [record.getMessage() for record in caplog.records if "to encode" in record.getMessage()]
    assert said == ["2 captions to encode, 0 are there already", "1 captions to encode, 2 are there already"]


def test_folder_changes_with_encoder_and_tokenizer(parts: tuple[Any, Any]) -> None:
    tokenizer, encoder = parts
    digests = [text_digest(*parts)]
    tokenizer(["a", "a long caption"], padding="max_length", max_length=9, truncation=True)
    tokenizer(["a"], padding=True)
    assert text_digest(*parts) == digests[0], "how it was last used does not count"
    weight = encoder.get_input_embeddings().weight.data
    weight[0, 0] += 1e-3
    digests.append(text_digest(*parts))
    tokenizer.add_tokens(["<cup>"])
    digests.append(text_digest(*parts))
    tokenizer.pad_token = "a"
    digests.append(text_digest(*parts))
    tokenizer.padding_side = "left"
    digests.append(text_digest(*parts))
    tokenizer.model_max_length = 8
    digests.append(text_digest(*parts))
    encoder.config.use_attention_mask = not getattr(encoder.config, "use_attention_mask", False)
    digests.append(text_digest(*parts))
    assert len(set(digests)) == len(digests)


def test_folder_survives_saving(parts: tuple[Any, Any], tmp_path: Path) -> None:
    before = text_digest(*parts)
    loaded = [type(part).from_pretrained(tmp_path) for part in parts if part.save_pretrained(tmp_path) or True]
    assert text_digest(loaded[0], loaded[1].eval()) == before


def test_long_captions_are_warned_of_once(
    parts: tuple[Any, Any], accelerator: Accelerator, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fits, long, symbols = "q w e r t y u i o p", "q w e r t y u i o p a", "🙂 " * 11  # two more mark the ends
    caplog.set_level(logging.WARNING, logger="latentdiff")
    filled(tmp_path / "a", [fits], parts, accelerator)
    assert not caplog.records
    filled(tmp_path / "a", [fits, long, symbols, "z " * 50_000, *"abc"], parts, accelerator)
    assert [record.getMessage() for record in caplog.records] == [
        f"3 captions are longer than the text encoder's 12 tokens and are cut; the first begins with {long!r}"
    ]


def test_words_of_several_vectors_count_with_all_of_them(
    accelerator: Accelerator, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = tiny.bert_parts()
    tokenizer, encoder = made["tokenizer"], made["text_encoder"]
    tokenizer.add_tokens(["<cup>", *(f"<cup>_{i}" for i in range(1, 12))])
    encoder.resize_token_embeddings(len(tokenizer))
    filled(tmp_path, ["<cup>"], (tokenizer, encoder), accelerator)
    assert "1 captions are longer" in caplog.text


def test_dropout_is_off_while_encoding(accelerator: Accelerator, tmp_path: Path) -> None:
    made = tiny.bert_parts()
    parts = (made["tokenizer"], made["text_encoder"])
    calm = filled(tmp_path / "calm", ["a red thing"], parts, accelerator)
    parts[1].train()
    trained = filled(tmp_path / "trained", ["a red thing"], parts, accelerator)
    assert torch.equal(calm["a red thing"], trained["a red thing"])
    assert parts[1].training


def test_states_that_are_no_numbers_are_not_kept(
    parts: tuple[Any, Any], accelerator: Accelerator, tmp_path: Path
) -> None:
    for parameter in parts[1].parameters():
        parameter.data.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"'a red thing': .* is the text encoder sound"):
        filled(tmp_path / "cache", ["a red thing"], parts, accelerator)
    assert not (tmp_path / "cache").exists()
