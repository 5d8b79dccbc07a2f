"""The text states of captions."""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from latentdiff.text import encode_prompts, max_tokens
from latentdiff.text.words import expand_words
from latentdiff.training.cache.digests import digest, digest_of_weights, plain_config
from latentdiff.training.cache.filling import Batches, evaluating, fill, finite
from latentdiff.training.cache.store import TensorStore

logger = logging.getLogger(__name__)

STATES = 1  # to be raised when `encode_prompts` gives other states for the same caption
SHOWN = 60  # characters of a caption in a message


class TextCache:
    """Text states by caption, in a folder named after tokenizer and encoder, which are not kept."""

    def __init__(self, folder: Path, tokenizer: Any, text_encoder: Any) -> None:
        self.store = TensorStore(Path(folder) / text_digest(tokenizer, text_encoder))

    def __getitem__(self, caption: str) -> Tensor:
        """(L, D) float16

        Raises:
            KeyError: it was not encoded.
        """
        try:
            return self.store[key_of(caption)]
        except KeyError:
            raise KeyError(f"caption was not encoded: {caption[:SHOWN]!r}") from None

    def fill(
        self,
        captions: Iterable[str],
        tokenizer: Any,
        text_encoder: Any,
        accelerator: Accelerator,
        batch_size: int = 32,
    ) -> None:
        """Encode what is missing, each process its share; goes on where an interrupted one stopped.

        Args:
            captions: the same, in the same order, in each process.
            tokenizer, text_encoder: those that the cache was made for; the encoder on the device that encodes.

        Raises:
            ValueError: the states of a caption are not finite; it is named.
            OSError: the disk is full.
        """
        by_key = {key_of(caption): caption for caption in captions}

        def encoded(batches: Batches) -> Iterator[Mapping[str, Tensor]]:
            for keys in batches:
                texts = [by_key[key] for key in keys]
                states = finite(
                    encode_prompts(texts, tokenizer, text_encoder, warn=False),  # (B, L, D)
                    [repr(text[:SHOWN]) for text in texts],
                    torch.float16,
                    "is the text encoder sound? Without cache_text it need not be below",
                )
                yield dict(zip(keys, states, strict=True))

        if accelerator.is_main_process:
            warn_of_long(list(by_key.values()), tokenizer, max_tokens(tokenizer, text_encoder))
        with evaluating(text_encoder):
            fill(self.store, list(by_key), encoded, accelerator, batch_size=batch_size, things="captions")


def warn_of_long(captions: Sequence[str], tokenizer: Any, length: int) -> None:
    """Warn once of captions that are longer than the encoder reads."""
    room = length - tokenizer.num_special_tokens_to_add()
    # A token has at least a byte, so short captions need no second look.
    long = [text for text in expand_words(captions, tokenizer) if len(text.encode("utf-8", "replace")) > room]
    cut = []
    for start in range(0, len(long), 1024):
        some = long[start : start + 1024]
        counts = map(len, tokenizer(some, truncation=False, verbose=False).input_ids)
        cut += [text for text, count in zip(some, counts, strict=True) if count > length]
    if cut:
        logger.warning(
            "%d captions are longer than the text encoder's %d tokens and are cut; the first begins with %r",
            len(cut),
            length,
            cut[0][:SHOWN],
        )


def key_of(caption: str) -> str:
    return digest(STATES, caption)


def text_digest(tokenizer: Any, text_encoder: Any) -> str:
    """A digest of what text states depend on: the tokenizer, the encoder's weights and config, and the length."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    if backend is not None:  # settings of the last call, which come and go
        words = {key: value for key, value in words.items() if key not in ("truncation", "padding")}
    manner = (tokenizer.special_tokens_map, tokenizer.padding_side, tokenizer.truncation_side)
    config = plain_config(text_encoder.config, "dtype", "torch_dtype", "transformers_version", "architectures")
    length = max_tokens(tokenizer, text_encoder)
    return digest(digest(words), manner, digest_of_weights(text_encoder.state_dict()), config, length)
