"""Words of several vectors, as textual inversion makes them: ``<cup>`` stands for the tokens ``<cup> <cup>_1 ...``."""

import re
from collections.abc import Sequence
from typing import Any


def tokens_of(word: str, count: int) -> list[str]:
    """The tokens behind a word of `count` vectors, by diffusers' naming."""
    return [word, *(f"{word}_{i}" for i in range(1, count))]


def add_words(tokenizer: Any, tokens: Sequence[str]) -> None:
    """New tokens, which are found as whole words only: ``cat`` does not act in ``concatenate``.

    What begins and ends with a sign, such as ``<cup>``, is found next to letters too.
    """
    from transformers import AddedToken

    for token in tokens:
        word = re.sub(r"_\d+$", "", token)  # see `tokens_of`
        alone = re.search(r"^\w|\w$", word) is not None
        tokenizer.add_tokens([AddedToken(token, single_word=alone, normalized=True, special=False)])


def long_words(tokenizer: Any) -> dict[str, list[str]]:
    """The words of several vectors that a tokenizer knows, with all of their tokens."""
    added = getattr(tokenizer, "added_tokens_encoder", {})
    counts = {
        word: next(i for i in range(1, len(added) + 1) if f"{word}_{i}" not in added)
        for word in added
        if f"{word}_1" in added
    }
    return {word: tokens_of(word, count) for word, count in counts.items()}


def taught_words(tokenizer: Any) -> dict[str, list[str]]:
    """The words that were added to a tokenizer, with all of their tokens."""
    long = long_words(tokenizer)
    later = {token for tokens in long.values() for token in tokens[1:]}
    ordinary = [token.content for token in tokenizer.added_tokens_decoder.values() if not token.special]
    return {word: long.get(word, [word]) for word in ordinary if word not in later}


def later_tokens(tokenizer: Any) -> set[int]:
    """The ids of all tokens that stand in a word of several vectors, but for its first."""
    added = getattr(tokenizer, "added_tokens_encoder", {})
    return {added[token] for tokens in long_words(tokenizer).values() for token in tokens[1:]}


def expand_words(prompts: Sequence[str], tokenizer: Any) -> list[str]:
    """`prompts` with each word of several vectors followed by the rest of its tokens, once.

    A word stands where the tokenizer finds its first token: of words that begin alike the longest counts, and capital
    letters count if they do for the tokenizer. A prompt that is expanded already stays as it is.
    """
    words = long_words(tokenizer)
    return [expand(prompt, words, tokenizer) for prompt in prompts] if words else list(prompts)


def expand(prompt: str, words: dict[str, list[str]], tokenizer: Any) -> str:
    found = added_tokens_in(prompt, tokenizer)
    parts, place = [], 0
    for i, (token, end) in enumerate(found):
        later = words.get(token or "", [])[1:]
        there = 0  # how many of them follow already
        while there < len(later) and i + there + 1 < len(found) and found[i + there + 1][0] == later[there]:
            there += 1
        end = found[i + there][1]
        if later[there:]:
            parts += [prompt[place:end], " ", " ".join(later[there:])]
            place = end
    return "".join([*parts, prompt[place:]])


def as_written(prompt: str, tokenizer: Any) -> str:
    """A prompt, or the end of one, without the tokens that `expand_words` has put into it."""
    for word, (first, *later) in long_words(tokenizer).items():
        others = "|".join(re.escape(token) for token in sorted(later, key=len, reverse=True))
        run = rf"(?:{re.escape(first)}\s+)?(?:{others})(?:\s+(?:{others}))*"
        prompt = re.sub(run, word.replace("\\", r"\\"), prompt)
    return prompt


def added_tokens_in(prompt: str, tokenizer: Any) -> list[tuple[str | None, int]]:
    """The tokens in a prompt in their order, each with the place where it ends; None for what is not an added token."""
    added = tokenizer.added_tokens_encoder
    if getattr(tokenizer, "is_fast", False):
        names = {number: token for token, number in added.items()}
        encoded = tokenizer(
            prompt, add_special_tokens=False, return_offsets_mapping=True, truncation=False, verbose=False
        )
        return [
            (names.get(number), end) for number, (_, end) in zip(encoded.input_ids, encoded.offset_mapping, strict=True)
        ]
    alone = {token.content for token in tokenizer.added_tokens_decoder.values() if token.single_word}
    patterns = {token: rf"(?<!\w){re.escape(token)}(?!\w)" if token in alone else re.escape(token) for token in added}
    longest_first = "|".join(patterns[token] for token in sorted(added, key=len, reverse=True))
    cases = re.IGNORECASE if getattr(tokenizer, "do_lower_case", False) else re.NOFLAG
    of_lower = {token.lower(): token for token in added} if cases else {token: token for token in added}
    matches = re.finditer(rf"({longest_first})|\S", prompt, cases)
    return [(of_lower.get(match[0].lower() if cases else match[0]), match.end()) for match in matches]
