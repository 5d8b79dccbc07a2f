"""Words of several vectors, as textual inversion makes them: ``<cup>`` stands for the tokens ``<cup> <cup>_1 ...``."""

import re
from collections.abc import Sequence
from typing import Any


def tokens_of(word: str, count: int) -> list[str]:
    """The tokens behind a word of `count` vectors, by diffusers' naming."""
    return [word, *(f"{word}_{i}" for i in range(1, count))]


def long_words(tokenizer: Any) -> dict[str, list[str]]:
    """The words of several vectors that a tokenizer knows, with all of their tokens."""
    added = getattr(tokenizer, "added_tokens_encoder", {})
    counts = {
        word: next(i for i in range(1, len(added) + 1) if f"{word}_{i}" not in added)
        for word in added
        if f"{word}_1" in added
    }
    return {word: tokens_of(word, count) for word, count in counts.items()}


def later_tokens(tokenizer: Any) -> set[int]:
    """The ids of all tokens that stand in a word of several vectors, but for its first."""
    added = getattr(tokenizer, "added_tokens_encoder", {})
    return {added[token] for tokens in long_words(tokenizer).values() for token in tokens[1:]}


def expand_words(prompts: Sequence[str], tokenizer: Any) -> list[str]:
    """`prompts` with each word of several vectors written as all of its tokens, once.

    What diffusers' ``maybe_convert_prompt`` does; a prompt that is expanded already stays as it is.
    """
    for word, tokens in long_words(tokenizer).items():
        whole = " ".join(tokens)
        pattern = re.compile(f"{re.escape(whole)}|{re.escape(word)}(?!_[0-9])")
        prompts = [pattern.sub(lambda _: whole, prompt) for prompt in prompts]  # noqa: B023 (used at once)
    return list(prompts)
