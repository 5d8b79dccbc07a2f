"""Words that no caption has: which are held out, which captions are paired, and that an encoder learns them."""

import random
import re
from pathlib import Path

import pytest
import torch
from tiny import tiny_pipeline

from latentdiff.training.recipes.emoji import phrases
from latentdiff.training.recipes.emoji.burst.clock import Log
from latentdiff.training.recipes.emoji.captions import Concept, read_concepts
from latentdiff.training.recipes.emoji.held_out import colour_held_out
from latentdiff.training.recipes.emoji.synonym_pairs import Pairs, Swap, is_form, is_validation, read_synonyms
from latentdiff.training.recipes.emoji.synonyms import Encoder, Lesson, Settings, between, main, teach

UNSEEN = [name for concept in read_concepts().values() for name in concept.unseen]
SETTINGS = Settings(learning=1, pairs=100, batch=8, rate=1e-2, warmup=5, praise=0, colours=0)
CONCEPTS = {name: concept for concept in read_concepts().values() for name in concept.names}


@pytest.mark.parametrize(
    ("word", "held", "form"),
    [
        ("kittens", "kitten", True),
        ("a small kitten", "kitten", True),
        ("motor-bike", "motorbike", True),
        ("ponies", "pony", True),
        ("doorways", "doorway", True),
        ("~trainer", "~trainers", True),
        ("homely", "home", False),
        ("kit", "kitten", False),
        ("shape", "ape", False),
    ],
)
def test_forms_of_held_out_words(word: str, held: str, form: bool) -> None:
    assert is_form(word, held) is form


def test_the_recipes_words_are_many_and_none_is_held_out() -> None:
    synonyms = read_synonyms({name.removeprefix("~") for name in CONCEPTS}, UNSEEN)
    words = [word for others in synonyms.values() for word in others]
    assert len(set(words)) > 2000
    assert not [word for word in words if any(is_form(word, held) for held in UNSEEN)]
    assert 0.04 < sum(map(is_validation, words)) / len(words) < 0.12


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("car sedan", "line 2: expected 'NAME: WORD, WORD, ...'"),
        ("car: sedan,", "line 2: expected"),
        ("carr: sedan", "line 2: no caption uses 'carr'"),
        ("car: sedan, old automobiles", "line 2: 'old automobiles' is 'automobile', which is held out"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "words.txt"
    file.write_text(f"# words\n{line}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(message)):
        read_synonyms({"car"}, ["automobile"], file)


def test_pairs_differ_in_the_word_alone_and_say_nothing_held_out() -> None:
    pairs = Pairs([Swap("terrier", "dog"), Swap("~slacks", "~jeans")], {"red": ("crimson",)}, CONCEPTS)
    rng = random.Random(0)
    for _ in range(300):
        read, meant = pairs.word(rng)
        assert ("terrier" in read) == (re.search(r"\bdogs?\b", meant) is not None)
        assert re.sub(r"\b(terriers?|slacks)\b", "X", read) == re.sub(r"\b(dogs?|jeans)\b", "X", meant, count=1)
        for colour in ("red", "blue", "green"):
            assert not (f"{colour} dog" in meant and colour_held_out(colour, CONCEPTS["dog"].hexcode))
    for read, meant in {pairs.tint(rng) for _ in range(200)}:
        assert read == meant or read.replace("crimson", "red") == meant
    same = [pairs.same(rng) for _ in range(50)]
    assert all(read == meant for read, meant in same)
    assert len(set(same)) > 45
    said = " ".join(pairs.same(rng)[0] for _ in range(600))
    for style in phrases.STYLES.values():  # what is never said is forgotten
        assert all(word in said for word in (*style.before, *style.after))


def test_an_encoder_learns_a_word_and_keeps_what_it_knows(tmp_path: Path) -> None:
    pipeline = tiny_pipeline()
    pipeline.text_encoder.get_input_embeddings().weight.data.mul_(30)  # so that words differ
    concepts = {name: Concept(code, 1.0, "-", (name,)) for name, code in (("cup", "1"), ("blue", "2"))}
    encoder = Encoder(pipeline.tokenizer, pipeline.text_encoder, SETTINGS.learning)
    lesson = Lesson({"cup": ("thing",)}, concepts, [], encoder, SETTINGS)
    for swaps in (lesson.swaps, lesson.pairs.swaps, lesson.kept):
        swaps[:] = [Swap("thing", "cup")]
    before = {text: encoder.states([text], 12).detach() for text in ("a thing", "a cup", "blue")}
    embeddings = pipeline.text_encoder.get_input_embeddings().weight.clone()
    teach(pipeline, lesson, Log(tmp_path / "log.jsonl", "synonyms"), minutes=10, updates=60)
    apart = (before["a thing"] - before["a cup"]).square().mean()
    with torch.no_grad():
        after = {text: encoder.states([text], 12) for text in before}
    assert (after["a thing"] - before["a cup"]).square().mean() < 0.5 * apart
    for text in ("a cup", "blue"):
        assert (after[text] - before[text]).square().mean() < 0.2 * apart
    assert torch.equal(pipeline.text_encoder.get_input_embeddings().weight, embeddings)


def test_weights_between_old_and_new() -> None:
    old, new = ({"w": torch.full((2,), value), "n": torch.tensor(number)} for value, number in ((1.0, 3), (2.0, 4)))
    found = between(old, new, 0.7)
    torch.testing.assert_close(found["w"], torch.full((2,), 1.7))
    assert found["n"] == 4


def test_the_command_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"synonyms: .*bundle"):
        main(["emoji", str(tmp_path / "out"), "--bundle", str(tmp_path / "bundle.xz")])
    assert not (tmp_path / "out").exists()
