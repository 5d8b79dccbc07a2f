"""Prompts to states, with tiny encoders of every kind."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel, BertTokenizer, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from latentdiff.text import as_prompts, encode_prompts, load_text_encoder, max_tokens

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "green", "blue", "car", "house"]


@pytest.fixture
def bert() -> tuple[Any, Any]:
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}, model_max_length=6)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=6,
    )
    return tokenizer, BertModel(config).eval()


@pytest.fixture
def t5() -> tuple[Any, Any]:
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    backend.post_processor = TemplateProcessing(single="$A [SEP]", special_tokens=[("[SEP]", 3)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", eos_token="[SEP]", model_max_length=7
    )
    config = T5Config(vocab_size=len(WORDS), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    return tokenizer, T5EncoderModel(config).eval()


@torch.no_grad()
@pytest.mark.parametrize(("kind", "length"), [("bert", 6), ("t5", 7)])
def test_states_have_one_length(request: pytest.FixtureRequest, kind: str, length: int) -> None:
    tokenizer, encoder = request.getfixturevalue(kind)
    states = encode_prompts(["a red car", "", "house"], tokenizer, encoder)
    assert states.shape == (3, length, 16)
    assert encode_prompts(["a red car"], tokenizer, encoder, max_length=4).shape == (1, 4, 16)
    alone = encode_prompts(["house"], tokenizer, encoder)
    torch.testing.assert_close(states[2:], alone)


@torch.no_grad()
def test_t5_reads_weights_and_chunks(t5: tuple[Any, Any]) -> None:
    prompt = "a red car house green blue a (red:1.5) car"  # six words to a chunk
    states = encode_prompts([prompt], *t5, weights=True, chunks=2)
    empty = encode_prompts([""], *t5)
    last = encode_prompts(["a red car"], *t5)
    last[:, 1] = empty[:, 1] + 1.5 * (last[:, 1] - empty[:, 1])
    torch.testing.assert_close(states[:, :7], encode_prompts(["a red car house green blue"], *t5))
    torch.testing.assert_close(states[:, 7:], last)


@torch.no_grad()
def test_latent_diffusion_s_bert_is_an_encoder_too(bert: tuple[Any, Any]) -> None:
    tokenizer = bert[0]
    tokenizer.model_max_length = 512
    config = LDMBertConfig(
        vocab_size=len(WORDS) + 1,
        max_position_embeddings=77,
        encoder_layers=2,
        encoder_ffn_dim=32,
        encoder_attention_heads=2,
        head_dim=8,
        d_model=16,
    )
    encoder = LDMBertModel(config).eval()
    prompts = ["a red car", ""]
    # As diffusers' LDMTextToImagePipeline does
    tokens = tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    assert torch.equal(encode_prompts(prompts, tokenizer, encoder), encoder(tokens.input_ids)[0])
    assert encode_prompts(["a (red:1.5) car " * 40], tokenizer, encoder, weights=True, chunks=2).shape == (1, 154, 16)


@torch.no_grad()
def test_padding_is_hidden_if_the_config_says_so(bert: tuple[Any, Any]) -> None:
    tokenizer, encoder = bert

    def words(length: int) -> torch.Tensor:
        return encode_prompts(["a red car"], tokenizer, encoder, max_length=length)[:, :5]

    assert (words(5) - words(6)).abs().max() > 1e-4
    encoder.config.use_attention_mask = True
    torch.testing.assert_close(words(5), words(6))


@torch.no_grad()
def test_what_was_cut_is_said(bert: tuple[Any, Any], caplog: pytest.LogCaptureFixture) -> None:
    tokenizer, encoder = bert
    with caplog.at_level(logging.WARNING):
        encode_prompts(["a red car"], tokenizer, encoder)
        assert not caplog.records
        cut = encode_prompts(["a red car house green blue"], tokenizer, encoder)
    assert "takes 6 tokens; this part of the prompt was cut: 'green blue'" in caplog.text
    torch.testing.assert_close(cut, encode_prompts(["a red car house"], tokenizer, encoder))


@torch.no_grad()
def test_what_was_cut_is_said_once_in_the_words_of_the_prompt(
    bert: tuple[Any, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            encode_prompts(["a red car house Green, There's Blue"], *bert)
    assert [record.getMessage().split("was cut: ")[1][:21] for record in caplog.records] == ['"Green, There\'s Blue"']


def test_length_comes_from_tokenizer_or_encoder(bert: tuple[Any, Any], t5: tuple[Any, Any]) -> None:
    tokenizer, encoder = bert
    tokenizer.model_max_length = int(1e30)
    assert max_tokens(tokenizer, encoder) == 6
    t5[0].model_max_length = int(1e30)
    with pytest.raises(ValueError, match=r"set tokenizer\.model_max_length"):
        max_tokens(*t5)


def test_only_strings_are_prompts() -> None:
    assert as_prompts("a") == ["a"]
    assert as_prompts(("a", "")) == ["a", ""]
    with pytest.raises(TypeError, match="caption must be a string or a list of strings, not float"):
        as_prompts(1.0, "caption")
    with pytest.raises(TypeError, match=r"prompt\[1\] must be a string, not int \(3\)"):
        as_prompts(["a", 3])


def test_clip_skip_is_for_clip(bert: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match="clip_skip needs a CLIP text encoder, not a BertModel"):
        encode_prompts(["a"], *bert, clip_skip=1)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["bert", "t5"])
@pytest.mark.parametrize("in_pipeline", [True, False])
def test_loads_from_folders(request: pytest.FixtureRequest, tmp_path: Path, kind: str, in_pipeline: bool) -> None:
    tokenizer, encoder = request.getfixturevalue(kind)
    encoder.half().save_pretrained(tmp_path / "text_encoder" if in_pipeline else tmp_path)
    tokenizer.save_pretrained(tmp_path / "tokenizer" if in_pipeline else tmp_path)
    loaded_tokenizer, loaded = load_text_encoder(tmp_path)
    assert type(loaded) is type(encoder)
    assert loaded.dtype == torch.float32
    assert getattr(loaded.config, "use_attention_mask", False) is not in_pipeline
    loaded.config.use_attention_mask = False
    states = encode_prompts(["a red car"], loaded_tokenizer, loaded)
    torch.testing.assert_close(states, encode_prompts(["a red car"], tokenizer, encoder.float()), atol=1e-5, rtol=1e-4)


def test_damaged_and_missing_encoders_are_named(bert: tuple[Any, Any], tmp_path: Path) -> None:
    bert[1].save_pretrained(tmp_path)
    bert[0].save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        load_text_encoder(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        load_text_encoder(tmp_path / "nowhere")


def test_encoders_without_words_or_with_code_are_refused(bert: tuple[Any, Any], tmp_path: Path) -> None:
    bert[1].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no tokenizer that knows any words"):
        load_text_encoder(tmp_path)
    bert[0].save_pretrained(tmp_path)
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModel": "own.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="contains custom code"):
        load_text_encoder(tmp_path)
    assert not (tmp_path / "ran").exists()
