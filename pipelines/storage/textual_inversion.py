"""Textual inversion in pipelines: diffusers' mix-in, with checks before anything is changed."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from diffusers.loaders import TextualInversionLoaderMixin
from torch import Tensor

from latentdiff.interchange.adapter_files import name_of
from latentdiff.interchange.embeddings import find_embeddings
from latentdiff.interchange.user_files import faults_named
from latentdiff.models.loras import whole_network
from latentdiff.text.tokenizing import tokenizing
from latentdiff.text.words import add_words, long_words, taught_words


class WholeWords:
    """A tokenizer to diffusers' loader, whose new tokens are whole words."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __len__(self) -> int:
        return len(self.tokenizer)

    def add_tokens(self, tokens: str | list[str]) -> None:
        add_words(self.tokenizer, [tokens] if isinstance(tokens, str) else tokens)


class TextualInversionPipeline(TextualInversionLoaderMixin):
    """Words that are loaded into the tokenizer and the text encoder, and forgotten again."""

    text_encoder: Any
    tokenizer: Any

    def load_textual_inversion(
        self,
        pretrained_model_name_or_path: Any,
        token: str | list[str] | None = None,
        tokenizer: Any = None,
        text_encoder: Any = None,
        *,
        weight_name: str | None = None,
        allow_pickle: bool = False,
        **hub: Any,
    ) -> None:
        """Teach the pipeline new words from embeddings, such as `latentdiff finetune` makes.

        Args:
            pretrained_model_name_or_path: a file in diffusers' or A1111's format, a folder, an ``owner/name`` on the
                hub, a tensor or tensors {word: (n, D) or (D,)}; or a list of these.
            token: the word, or one for each; by default what the file says, or else its name.
            tokenizer, text_encoder: by default the pipeline's.
            weight_name: of the file in the folder or on the hub.
            allow_pickle: read ``.pt`` and ``.bin`` files as well, tensors only; nothing in them is run.
            hub: as for `load_lora_weights`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is of another kind, is damaged or of another width; the word is known already.
        """
        tokenizer = self.tokenizer if tokenizer is None else tokenizer
        text_encoder = whole_network(self.text_encoder if text_encoder is None else text_encoder)
        hub = {key: value for key, value in hub.items() if key != "use_safetensors"}
        words = find_embeddings(pretrained_model_name_or_path, token, weight_name, allow_pickle, hub)
        source = name_of(pretrained_model_name_or_path)
        for word, vectors in words:
            check_new_word(source, word, vectors, tokenizer, text_encoder)
        sources = [{word: vectors} for word, vectors in words]
        with faults_named(source), resized_plainly(text_encoder):
            whole: Any = WholeWords(tokenizer)
            super().load_textual_inversion(sources, [word for word, _ in words], whole, text_encoder)

    def unload_textual_inversion(self, tokens: Any = None, tokenizer: Any = None, text_encoder: Any = None) -> None:
        """Forget words that were loaded, each with all of its vectors; all words by default.

        Args:
            tokens: a word or several.
            tokenizer, text_encoder: by default the pipeline's.

        Raises:
            ValueError: a word was not loaded; or some of several, with a tokenizer in which diffusers would then number
                the rest wrongly.
        """
        tokenizer = self.tokenizer if tokenizer is None else tokenizer
        text_encoder = whole_network(self.text_encoder if text_encoder is None else text_encoder)
        decoder = tokenizer.added_tokens_decoder
        ordinary = [token.content for token in decoder.values() if not token.special]
        wanted = [tokens] if isinstance(tokens, str) else list(tokens or ordinary)
        for word in wanted:
            if word not in ordinary:
                raise ValueError(f"there is no word {word!r} to forget; loaded are {', '.join(ordinary) or 'none'}")
        further = long_words(tokenizer)
        wanted = list(dict.fromkeys(token for word in wanted for token in further.get(word, [word])))
        special = [number for number, token in decoder.items() if token.special]
        if not wanted:
            return
        if set(wanted) != set(ordinary) and max(special, default=-1) + 1 != len(tokenizer) - len(ordinary):
            raise ValueError(f"a {type(tokenizer).__name__} can only forget all new words at once: {ordinary}")
        super().unload_textual_inversion(wanted, tokenizer, text_encoder)
        text_encoder.config.vocab_size = len(text_encoder.get_input_embeddings().weight)  # else it cannot be loaded


@contextmanager
def resized_plainly(text_encoder: Any) -> Iterator[None]:
    """Within, new rows of the table are not drawn like the old ones: that takes seconds, and they are written over."""
    text_encoder.resize_token_embeddings = partial(text_encoder.resize_token_embeddings, mean_resizing=False)
    try:
        yield
    finally:
        del text_encoder.resize_token_embeddings


def vectors_of(word: str, tokenizer: Any, text_encoder: Any) -> Tensor:
    """The vectors (n, D) of a word that was taught."""
    ids = tokenizer.convert_tokens_to_ids(taught_words(tokenizer)[word])
    table: Tensor = whole_network(text_encoder).get_input_embeddings().weight
    return table[ids].detach().clone()


def check_new_word(source: str, word: str, vectors: Tensor, tokenizer: Any, text_encoder: Any) -> None:
    """Raises ValueError for a word that the tokenizer knows already, and for vectors of another width."""
    with tokenizing(tokenizer):
        ids = tokenizer(word, add_special_tokens=False).input_ids
    token = tokenizer.added_tokens_decoder.get(ids[0]) if len(ids) == 1 else None
    if token is not None and not token.special:
        known = f"{source}: the word {word!r} is known already, as {token.content!r}"
        raise ValueError(f"{known}; give it another name with token=, or unload_textual_inversion() that first")
    width = text_encoder.get_input_embeddings().weight.shape[1]
    if vectors.shape[-1] != width:
        raise ValueError(
            f"{source}: the embedding {word!r} has the shape {tuple(vectors.shape)}; this text encoder's are "
            f"{width} wide, so it is for another model"
        )
