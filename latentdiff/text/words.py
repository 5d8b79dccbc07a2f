"""Words of several vectors, as textual inversion makes them: ``<cup>`` stands for the tokens ``<cup> <cup>_1 ...``."""

import re
from collections.abc import Sequence
from typing import Any


def tokens_of(word: str, count: int) -> list[str]:
    """The tokens behind a word of `count` vectors, by diffusers' naming."""
    return [word, *(f"{word}_{i}" for i in range(1, count))]


def expand_words(prompts: Sequence[str], tokenizer: Any) -> list[str]:
    """`prompts` with each word of several vectors written as all of its tokens, once.

    What diffusers' ``maybe_convert_prompt`` does; a prompt that is expanded already stays as it is.
    """
    added = getattr(tokenizer, "added_tokens_encoder", {})
    for word in [word for word in added if f"{word}_1" in added]:
        count = next(i for i in range(1, len(added) + 1) if f"{word}_{i}" not in added)
        whole = " ".join(tokens_of(word, count))
        pattern = re.compile(f"{re.escape(whole)}|{re.escape(word)}(?!_[0-9])")
        prompts = [pattern.sub(lambda _: whole, prompt) for prompt in prompts]  # noqa: B023 (used at once)
    return list(prompts)
