"""Words of several vectors: found where the tokenizer finds them, whole, and forgotten without a trace."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import draw, tiny_pipeline

from latentdiff import TextToImagePipeline
from latentdiff.text.words import expand_words

KINDS = ["clip", "bert"]


def vectors(count: int) -> torch.Tensor:
    return torch.randn(count, 16, generator=torch.Generator().manual_seed(count))


def new_tokens(prompt: str, tokenizer: Any) -> list[str]:
    added = {number: token.content for number, token in tokenizer.added_tokens_decoder.items() if not token.special}
    return [added[number] for number in tokenizer(prompt).input_ids if number in added]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", [1, -1])
def test_the_longest_of_words_that_begin_alike(kind: str, order: int) -> None:
    pipeline = tiny_pipeline(kind)
    words = {"easyneg": vectors(3), "easynegv2": vectors(4), "neg": vectors(2)}
    pipeline.load_textual_inversion([{word: words[word]} for word in list(words)[::order]])
    expected = {
        "easynegv2": "easynegv2 easynegv2_1 easynegv2_2 easynegv2_3",
        "easyneg, neg": "easyneg easyneg_1 easyneg_2, neg neg_1",
        "easyneg easynegv2": "easyneg easyneg_1 easyneg_2 easynegv2 easynegv2_1 easynegv2_2 easynegv2_3",
        "easyneg easyneg_1 neg": "easyneg easyneg_1 easyneg_2 neg neg_1",
    }
    for prompt, whole in expected.items():
        assert expand_words([prompt], pipeline.tokenizer) == [whole]
        assert expand_words([whole], pipeline.tokenizer) == [whole]
        assert new_tokens(whole, pipeline.tokenizer) == whole.replace(",", "").split()


@pytest.mark.parametrize("kind", KINDS)
def test_capital_letters_count_as_for_the_tokenizer(kind: str) -> None:
    pipeline = tiny_pipeline(kind)
    pipeline.load_textual_inversion({"MyWord": vectors(3)})
    for prompt in ("a MyWord", "a myword", "a MYWORD", "a myword MyWord_1"):
        whole = expand_words([prompt], pipeline.tokenizer)[0]
        assert new_tokens(whole, pipeline.tokenizer) == ["MyWord", "MyWord_1", "MyWord_2"]
    torch.testing.assert_close(draw(pipeline, "a myword"), draw(pipeline, "a MyWord"), atol=0, rtol=0)


def test_accents_count_as_for_the_tokenizer() -> None:
    pipeline = tiny_pipeline("bert")  # which leaves accents out
    pipeline.load_textual_inversion({"<café>": vectors(2)})
    assert expand_words(["a <cafe>"], pipeline.tokenizer) == ["a <cafe> <café>_1"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_word_that_the_tokenizer_takes_for_another_is_refused(kind: str) -> None:
    pipeline = tiny_pipeline(kind)
    pipeline.load_textual_inversion({"MyWord": vectors(2)})
    with pytest.raises(ValueError, match="'myword' is known already, as 'MyWord'"):
        pipeline.load_textual_inversion({"myword": vectors(1)})
    assert "myword" not in pipeline.tokenizer.get_vocab()


@pytest.mark.parametrize("kind", KINDS)
def test_a_forgotten_word_leaves_nothing_behind(tmp_path: Path, kind: str) -> None:
    pipeline = tiny_pipeline(kind)
    tokens, before = len(pipeline.tokenizer), draw(pipeline, "a <cup>")
    for _ in range(2):
        pipeline.load_textual_inversion({"<cup>": vectors(3)})
        assert (draw(pipeline, "a <cup>") - before).abs().max() > 1e-4
        pipeline.unload_textual_inversion("<cup>")
        assert len(pipeline.tokenizer) == tokens == pipeline.text_encoder.config.vocab_size
        torch.testing.assert_close(draw(pipeline, "a <cup>"), before, atol=1e-5, rtol=0)
    pipeline.save_pretrained(tmp_path / "model")
    again = TextToImagePipeline.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(draw(again, "a <cup>"), before, atol=1e-5, rtol=0)


def test_one_of_several_words_is_forgotten(tmp_path: Path) -> None:
    pipeline = tiny_pipeline("clip")
    pipeline.load_textual_inversion([{"<cup>": vectors(3)}, {"<mug>": vectors(2)}])
    expected = draw(pipeline, "a <mug>")
    with pytest.raises(ValueError, match=r"no word '<jar>' to forget; loaded are <cup>, <cup>_1"):
        pipeline.unload_textual_inversion(["<cup>", "<jar>"])
    pipeline.unload_textual_inversion("<cup>")
    torch.testing.assert_close(draw(pipeline, "a <mug>"), expected, atol=1e-5, rtol=0)
    pipeline.save_pretrained(tmp_path / "model")
    again = TextToImagePipeline.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(draw(again, "a <mug>"), expected, atol=1e-5, rtol=0)


def test_what_is_no_word_of_several_vectors_stays() -> None:
    pipeline: Any = tiny_pipeline("clip")
    assert expand_words(("a cup", ""), pipeline.tokenizer) == ["a cup", ""]
    pipeline.load_textual_inversion({"<cup>": vectors(1)})
    assert expand_words(["a <cup>", ""], pipeline.tokenizer) == ["a <cup>", ""]


@pytest.mark.parametrize("kind", KINDS)
def test_words_act_as_whole_words_only(kind: str) -> None:
    pipeline = tiny_pipeline(kind)
    tokenizer = pipeline.tokenizer
    inside = "a conqatenate, qats or unqat_ at catqat"
    before = tokenizer(inside).input_ids
    pipeline.load_textual_inversion([{"qat": vectors(2)}, {"<cup>": vectors(2)}])
    assert tokenizer(inside).input_ids == before
    assert expand_words([inside], tokenizer) == [inside]
    for prompt in ("a qat", "qat, red", "(qat)", "red-qat.", "qat"):
        assert new_tokens(expand_words([prompt], tokenizer)[0], tokenizer) == ["qat", "qat_1"]
    assert new_tokens(expand_words(["two<cup>s"], tokenizer)[0], tokenizer) == ["<cup>", "<cup>_1"]


class Slow:
    """A tokenizer that does not say where its tokens are."""

    is_fast = False

    def __init__(self, tokenizer: Any) -> None:
        self.added_tokens_encoder, self.added_tokens_decoder = (
            tokenizer.added_tokens_encoder,
            tokenizer.added_tokens_decoder,
        )


def test_so_they_do_with_tokenizers_of_python() -> None:
    pipeline = tiny_pipeline("clip")
    pipeline.load_textual_inversion([{"qat": vectors(2)}])
    prompts = ["a conqatenate", "a qat, qats"]
    assert expand_words(prompts, Slow(pipeline.tokenizer)) == ["a conqatenate", "a qat qat_1, qats"]


@pytest.mark.parametrize("way", ["plain", "chunks", "training"])
def test_a_tokenizer_is_saved_as_it_was_loaded(tmp_path: Path, way: str) -> None:
    from latentdiff.training.batch.conditions import read_tokens

    for beginning in ("plain", "padded"):
        pipeline = tiny_pipeline("bert")
        if beginning == "padded":
            pipeline.tokenizer.backend_tokenizer.enable_padding(length=7)
            pipeline.tokenizer.backend_tokenizer.enable_truncation(7)
        pipeline.tokenizer.save_pretrained(tmp_path / beginning / "before")
        if way == "training":
            read_tokens(pipeline.tokenizer, 5, True, str, ["red cup", "red " * 20])
        else:
            draw(pipeline, "red " * 20, long_prompts="chunk" if way == "chunks" else "cut")
        pipeline.tokenizer.save_pretrained(tmp_path / beginning / "after")
        texts = [(tmp_path / beginning / name / "tokenizer.json").read_text() for name in ("before", "after")]
        assert texts[0] == texts[1]
