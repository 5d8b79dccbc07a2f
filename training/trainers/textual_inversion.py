"""Textual inversion (Gal et al. 2022): a new word whose embedding is learned, and nothing else."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentdiff.interchange.adapter_files import EMBEDDING_NAMES, save_whole
from latentdiff.interchange.embeddings import OF_TWO, WORD_KEY
from latentdiff.text.tokenizing import tokenizing
from latentdiff.text.words import add_words, expand_words, tokens_of
from latentdiff.training.data import CaptionedPicture
from latentdiff.training.settings import FinetuneSettings

logger = logging.getLogger(__name__)


class ExtendedEmbedding(nn.Module):
    """An embedding with rows of its own for a few tokens; the others are the given embedding's, and stay as they are.

    Args:
        embedding: not trained.
        first: the first of the new tokens, whose numbers are consecutive.
        rows: (n, D), where the new ones start.
    """

    def __init__(self, embedding: nn.Embedding, first: int, rows: Tensor) -> None:
        super().__init__()
        self.embedding, self.first = embedding.requires_grad_(False), first
        self.learned = nn.Parameter(rows.detach().float().clone())

    @property
    def weight(self) -> Tensor:
        return self.embedding.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, L) -> (B, L, D)."""
        index = input_ids - self.first
        new = (index >= 0) & (index < len(self.learned))  # (B, L)
        known = self.embedding(input_ids.masked_fill(new, 0))  # (B, L, D)
        learned = F.embedding(index.clamp(0, len(self.learned) - 1), self.learned)
        return torch.where(new[..., None], learned.to(known.dtype), known)


def add_word(settings: FinetuneSettings, tokenizer: Any, text_encoder: Any) -> ExtendedEmbedding:
    """Teach the tokenizer the new word, and give the text encoder an embedding for it that can be trained.

    Raises:
        ValueError: the word is known or not one word; the word to start from is not one token.
    """
    word, start = str(settings.placeholder_token), str(settings.initializer_token)
    tokens = tokens_of(word, settings.num_vectors)
    known = [token for token in tokens if token in tokenizer.get_vocab()]
    if known:
        raise ValueError(f"placeholder_token: the tokenizer knows {known[0]!r} already; choose another new word")
    start_id = single_token(start, tokenizer)
    add_words(tokenizer, tokens)
    ids = tokenizer.convert_tokens_to_ids(tokens)
    whole = tokenizer(" ".join(tokens), add_special_tokens=False).input_ids
    if word.split() != [word] or whole != ids or ids != list(range(ids[0], ids[0] + len(ids))):
        raise ValueError(f"placeholder_token: the tokenizer does not take {word!r} as one word; try '<my-word>'")
    text_encoder.requires_grad_(False)
    embedding = text_encoder.get_input_embeddings()
    rows = embedding.weight[start_id].expand(settings.num_vectors, -1)  # (n, D)
    extended = ExtendedEmbedding(embedding, ids[0], rows)
    text_encoder.set_input_embeddings(extended)
    return extended


def single_token(word: str, tokenizer: Any) -> int:
    """The number of the one token that `word` is."""
    ids = tokenizer(word, add_special_tokens=False).input_ids
    if len(ids) != 1:
        parts = ", ".join(repr(token) for token in tokenizer.convert_ids_to_tokens(ids)) or "nothing"
        raise ValueError(f"initializer_token: {word!r} is not one token but {len(ids)}: {parts}; choose a simpler word")
    if ids[0] == tokenizer.unk_token_id and word != tokenizer.unk_token:
        raise ValueError(f"initializer_token: the tokenizer does not know {word!r}; choose another word")
    return int(ids[0])


def check_captions(pictures: Sequence[CaptionedPicture], word: str, tokenizer: Any, length: int) -> None:
    """Whether every caption has the new word among the `length` tokens that the text encoder sees.

    Raises:
        ValueError: one has not, so nothing could be learned from it.
    """
    number = tokenizer.convert_tokens_to_ids(word)
    for picture in pictures:
        for caption in picture.captions:
            with tokenizing(tokenizer):
                tokens = tokenizer(caption, truncation=False, verbose=False).input_ids
                seen = tokenizer(caption, truncation=True, max_length=length).input_ids
            if number not in tokens:
                raise ValueError(
                    f"{picture.name}: its caption {caption!r} does not have the new word {word}, as a word of its own; "
                    f"write it into every caption, or leave captions out: then it is {word} for all"
                )
            if number not in seen:
                raise ValueError(
                    f"{picture.name}: its caption {caption!r} is longer than the {length} tokens of the text encoder, "
                    f"and the new word {word} is cut off; put it first"
                )


def settle(extended: ExtendedEmbedding, text_encoder: Any) -> None:
    """Put what was learned into an ordinary embedding of the text encoder, grown if need be."""
    text_encoder.set_input_embeddings(extended.embedding)
    first, rows = extended.first, extended.learned.detach()
    if first + len(rows) > extended.embedding.num_embeddings:
        text_encoder.resize_token_embeddings(first + len(rows), mean_resizing=False)
    weight = text_encoder.get_input_embeddings().weight
    with torch.no_grad():
        weight[first : first + len(rows)] = rows.to(weight)


def save_word(extended: Sequence[ExtendedEmbedding], word: str, folder: Path) -> Path:
    """Write ``learned_embeds.safetensors``, {word: (n, D)}, which diffusers' ``load_textual_inversion`` reads.

    Of SDXL's two text encoders {"clip_l": (n, D1), "clip_g": (n, D2)}, and the word in the header.
    """
    file = folder / EMBEDDING_NAMES[0]
    rows = [one.learned.detach().float() for one in extended]
    if len(rows) == 1:
        save_whole({word: rows[0]}, file, {"format": "pt"})
    else:
        save_whole(dict(zip(OF_TWO, rows, strict=True)), file, {"format": "pt", WORD_KEY: word})
    return file


class Expand:
    """A caption with words of several vectors written out; for a data loader's workers."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, caption: str) -> str:
        return expand_words([caption], self.tokenizer)[0]
