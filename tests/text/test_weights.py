"""Weights in prompts, and prompts in chunks."""

import logging
import sys
from typing import Any

import open_clip
import pytest
import torch
from tiny import bert_parts, clip_parts
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from tokenizers.pre_tokenizers import Metaspace
from tokenizers.processors import TemplateProcessing
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from latentdiff.text.encode import cut_of, encode_prompts
from latentdiff.text.open_clip import convert_tokenizer
from latentdiff.text.tokens import Piece, count_chunks, parse_weights, tokenize
from latentdiff.text.words import as_written, expand_words

PARSED = {
    "a red car": [("a red car", 1.0)],
    "": [],
    "a (red:1.3) car": [("a ", 1.0), ("red", 1.3), (" car", 1.0)],
    "(red)": [("red", 1.1)],
    "((red))": [("red", 1.21)],
    "[red]": [("red", 1 / 1.1)],
    "(a (red:2) car:0.5)": [("a ", 0.5), ("red", 1.0), (" car", 0.5)],
    "(red: .5 )": [("red", 0.5)],
    "(red:-1)": [("red", -1.0)],
    r"a \(red\) car": [("a (red) car", 1.0)],
    r"(a \[b\] \\ c:2)": [("a [b] \\ c", 2.0)],
    "at 12:30 (noon: the hour)": [("at 12:30 ", 1.0), ("noon: the hour", 1.1)],
    "[(red:2)]": [("red", 2 / 1.1)],
}


@pytest.mark.parametrize("prompt", PARSED, ids=repr)
def test_brackets_become_weights(prompt: str) -> None:
    found = parse_weights(prompt)
    assert [piece.text for piece in found] == [text for text, _ in PARSED[prompt]]
    assert [piece.weight for piece in found] == pytest.approx([weight for _, weight in PARSED[prompt]])


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a (red car", r"the '\(' at character 3 of the prompt .* has no partner; write \\\( if"),
        ("a red) car", r"the '\)' at character 6"),
        ("(a [red) car]", r"the '\)' at character 8"),
        ("red:1.3)", r"the '\)' at character 8"),
        ("[red:1.3)", r"the '\)' at character 9"),
    ],
)
def test_brackets_without_partners_are_refused(prompt: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_weights(prompt)


def test_long_and_deep_prompts_are_read() -> None:
    assert parse_weights("([" * 500 + "red" + "])" * 500)[0].text == "red"
    for text in ("a" * 100_000, "a:" + "1" * 100_000):
        assert parse_weights(text) == [Piece(text, 1.0)]
    assert sys.getrecursionlimit() < 100_000


@pytest.mark.parametrize("prompt", ["(" * 80 + "red" + ")" * 80, "(red:1001)", "(red:" + "9" * 400 + ")"])
def test_weights_without_measure_are_refused(prompt: str) -> None:
    with pytest.raises(ValueError, match=r"the weight of 'red' is .*; weights lie between -1000 and 1000"):
        parse_weights(prompt)


@pytest.fixture(params=["clip", "bert"])
def parts(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    torch.manual_seed(0)
    found = clip_parts() if request.param == "clip" else bert_parts()
    return found["tokenizer"], found["text_encoder"]


def encode(parts: tuple[Any, Any], *prompts: str, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return encode_prompts(list(prompts), *parts, **options)


def test_a_prompt_without_brackets_is_the_same_with_weights_on(parts: tuple[Any, Any]) -> None:
    for prompt in ("a red cup", "", "x yz"):
        assert torch.equal(encode(parts, prompt, weights=True), encode(parts, prompt))


def test_tokens_are_those_of_the_prompt_without_brackets(parts: tuple[Any, Any]) -> None:
    for prompt, plain in {"a (red:1.3) c[u]p": "a red cup", "((a)) ([blue]:2)": "a blue"}.items():
        found = tokenize([prompt], parts[0], 12, weights=True)
        wanted = parts[0](plain, padding="max_length", max_length=12, return_tensors="pt")
        assert torch.equal(found.input_ids, wanted.input_ids)
        assert torch.equal(found.attention_mask, wanted.attention_mask)


def test_weights_move_states_from_those_of_the_empty_prompt(parts: tuple[Any, Any]) -> None:
    tokenizer = parts[0]
    plain, empty = encode(parts, "a cup"), encode(parts, "")
    ids = tokenizer("a cup").input_ids
    weighed = encode(parts, "a (cup:1.5)", weights=True)
    factor = torch.ones(12)
    factor[2 : len(ids) - 1] = 1.5  # start and "a" before, the end after
    torch.testing.assert_close(weighed, empty + factor[:, None] * (plain - empty))
    assert torch.equal(weighed[:, :2], plain[:, :2])
    nothing = encode(parts, "(a cup:0)", weights=True)
    torch.testing.assert_close(nothing[:, 1 : len(ids) - 1], empty[:, 1 : len(ids) - 1])


def test_weights_act_on_the_layer_that_clip_skip_takes() -> None:
    found = clip_parts()
    parts = found["tokenizer"], found["text_encoder"]
    plain, empty = encode(parts, "a cup", clip_skip=1), encode(parts, "", clip_skip=1)
    factor = torch.tensor([1.0, 1.0, 0.5, 0.5, 0.5, *[1.0] * 7])
    wanted = empty + factor[:, None] * (plain - empty)
    torch.testing.assert_close(encode(parts, "a (cup:0.5)", weights=True, clip_skip=1), wanted)
    several = encode(parts, "a (cup:0.5)", weights=True, clip_skip=1, chunks=2)
    torch.testing.assert_close(several, torch.cat([wanted, empty], dim=1))


def test_what_fits_has_one_chunk_and_the_same_states(parts: tuple[Any, Any]) -> None:
    assert count_chunks(["a red cup", ""], parts[0], 12) == 1
    several = encode(parts, "a cup", chunks=2)
    assert several.shape == (1, 24, 16)
    assert torch.equal(several[:, :12], encode(parts, "a cup"))
    torch.testing.assert_close(several[:, 12:], encode(parts, ""))


def test_chunks_are_prompts_of_their_own(parts: tuple[Any, Any]) -> None:
    prompt = "ab cd ef gh ij kl mn op qr st"
    count = count_chunks([prompt], parts[0], 12)
    states = encode(parts, prompt, "cup", chunks=count, warn=False)
    assert states.shape == (2, 12 * count, 16)
    tokens = tokenize([prompt], parts[0], 12, chunks=count)
    special = set(parts[0].all_special_ids)
    texts = [
        parts[0].decode([i for i, kept in zip(row.tolist(), mask.tolist(), strict=True) if kept and i not in special])
        for row, mask in zip(tokens.input_ids, tokens.attention_mask, strict=True)
    ]
    assert "".join("".join(texts).split()) == prompt.replace(" ", "")
    for i, text in enumerate(texts):
        torch.testing.assert_close(states[:1, 12 * i : 12 * (i + 1)], encode(parts, text, warn=False))


def test_chunks_end_at_a_comma_or_between_words() -> None:
    tokenizer = clip_parts()["tokenizer"]  # a token for each letter; a comma is an unknown one
    rows = tokenize(["abc def, gh ij klm"], tokenizer, 12, chunks=3)
    counts = rows.attention_mask.sum(1).tolist()
    assert counts == [2 + 7, 2 + 7, 2]  # "abc def," and "gh ij klm", and nothing more
    assert tokenize(["abcdefghijklmnop"], tokenizer, 12, chunks=2).attention_mask.sum(1).tolist() == [12, 8]


def test_weights_hold_in_every_chunk(parts: tuple[Any, Any]) -> None:
    rows = tokenize(["ab cd ef (gh ij kl:1.5) mn (op:0.5)"], parts[0], 12, weights=True, chunks=3)
    flat = [float(w) for w in rows.weights.flatten()]
    assert flat.count(1.5) == 6
    assert flat.count(0.5) == 2


def test_what_is_cut_is_said(parts: tuple[Any, Any], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "latentdiff.text.encode"):
        encode(parts, "abcde fghij klm nop", weights=True)
        assert "this part of the prompt was cut: 'klm nop' (long_prompts='chunk' keeps it)" in caplog.text
        caplog.clear()
        encode(parts, "abcde fghij klm nop", chunks=2)
        assert not caplog.records


def test_words_of_several_vectors_work_in_weights() -> None:
    tokenizer = clip_parts()["tokenizer"]
    tokenizer.add_tokens(["<thing>", "<thing>_1"])
    numbers = tokenizer.convert_tokens_to_ids(["<thing>", "<thing>_1"])
    rows = tokenize(["a (<thing>:1.4)"], tokenizer, 12, weights=True)
    places = [rows.input_ids[0].tolist().index(number) for number in numbers]
    assert places == [2, 3]
    assert rows.weights[0, places].tolist() == pytest.approx([1.4, 1.4])


def test_what_was_cut_has_words_of_several_vectors_as_they_were_written() -> None:
    tokenizer = clip_parts(6)["tokenizer"]
    tokenizer.add_tokens(["<thing>", "<thing>_1", "<thing>_2"])
    prompt = expand_words(["ab <thing> cd"], tokenizer)[0]
    assert prompt != "ab <thing> cd"
    assert as_written(cut_of(prompt, tokenizer, 6), tokenizer) == "<thing> cd"
    assert as_written(prompt, tokenizer) == "ab <thing> cd"


def test_words_of_several_vectors_stay_in_one_chunk() -> None:
    tokenizer = clip_parts(6)["tokenizer"]
    tokenizer.add_tokens(["<thing>", "<thing>_1", "<thing>_2"])
    numbers = tokenizer.convert_tokens_to_ids(["<thing>", "<thing>_1", "<thing>_2"])
    rows = tokenize(["ab <thing> cd"], tokenizer, 6, chunks=3).input_ids
    assert rows[1, 1:4].tolist() == numbers


def test_letters_of_several_tokens_stay_in_one_chunk() -> None:
    tokenizer = convert_tokenizer(open_clip.get_tokenizer("ViT-B-32"))
    assert len(tokenizer("🫠", add_special_tokens=False).input_ids) == 3
    rows = chunked("a 🫠 cat", tokenizer, 5)
    assert [tokenizer.decode(row[1 : row.index(49407)]).strip() for row in rows] == ["a", "🫠", "cat"]


def chunked(prompt: str, tokenizer: Any, length: int) -> list[list[int]]:
    count = count_chunks([prompt], tokenizer, length)
    return tokenize([prompt], tokenizer, length, chunks=count).input_ids.tolist()


def test_a_space_before_a_word_may_belong_to_its_token() -> None:
    words = ["<pad>", "</s>", "<unk>", "▁a", "▁red", "▁car", ",", "▁", "s"]
    backend = Tokenizer(Unigram([(word, -1.0) for word in words], unk_id=2))
    backend.pre_tokenizer = Metaspace()
    backend.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")
    rows = tokenize(["a (red:1.5) (s:2), a car "], tokenizer, 10, weights=True)
    tokens = tokenizer.convert_ids_to_tokens(rows.input_ids[0])
    assert tokens == ["▁a", "▁red", "▁", "s", ",", "▁a", "▁car", "▁", "</s>", "<pad>"]
    assert rows.weights[0].tolist() == [1, 1.5, 2, 2, 1, 1, 1, 1, 1, 1]
    split = [tokenizer.convert_ids_to_tokens(row) for row in chunked("a red s car a", tokenizer, 4)]
    assert split == [["▁a", "▁red", "</s>", "<pad>"], ["▁", "s", "▁car", "</s>"], ["▁a", "</s>", "<pad>", "<pad>"]]


def test_too_short_encoders_and_slow_tokenizers_are_refused() -> None:
    with pytest.raises(ValueError, match="a ByT5Tokenizer does not say where in a prompt its tokens are"):
        tokenize(["a"], ByT5Tokenizer(), 12, weights=True)
    tokenizer = clip_parts()["tokenizer"]
    with pytest.raises(ValueError, match="2 tokens are too few"):
        tokenize(["a"], tokenizer, 2)
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="has no padding token"):
        tokenize(["a"], tokenizer, 12)
