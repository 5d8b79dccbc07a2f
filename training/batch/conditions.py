"""What a network is given of captions: text states from a cache or a frozen encoder, tokens, classes, or nothing."""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from latentdiff.conditioning import ClassConditioner, Conditioning
from latentdiff.interchange.fingerprint import weights_digest
from latentdiff.text import max_tokens
from latentdiff.text.encode import TextConditioner
from latentdiff.text.masked import MaskedTextConditioner, with_mask
from latentdiff.text.tokenizing import tokenizing
from latentdiff.text.words import expand_words
from latentdiff.training.batch.batch_types import Captions, ReadCaptions, Tokens
from latentdiff.training.batch.cache import DIGEST, TensorStore, digest, evaluating, finite, plain_config
from latentdiff.training.batch.filling import Batches, fill, is_filled
from latentdiff.training.batch.latents import PART, cache_folder, cache_labels
from latentdiff.training.batch.random_choices import CaptionChoice
from latentdiff.training.data import CaptionedPicture
from latentdiff.training.data.picture_table import first_captions, identity
from latentdiff.training.loop.run import TrainingRun
from latentdiff.training.settings import DiffusionSettings

logger = logging.getLogger(__name__)

STATES = 1  # to be raised when a `TextConditioner` gives other states for the same caption
LOOKED_AT = 200_000  # pictures whose captions may be too long, about
SHOWN = 60  # characters of a caption in a message


class TextCache:
    """Text states by caption, in a folder named after tokenizer and encoder, which are not kept.

    Args:
        labels: see `TensorStore`.
        manner: what makes states of captions.
    """

    def __init__(
        self,
        folder: Path,
        tokenizer: Any,
        text_encoder: Any,
        labels: Mapping[str, str] | None = None,
        manner: type[TextConditioner] = TextConditioner,
    ) -> None:
        self.manner, name = manner, text_digest(tokenizer, text_encoder)
        if manner is not TextConditioner:
            name = digest(name, manner.__name__)
        self.store = TensorStore(Path(folder) / name, labels)

    def __getitem__(self, caption: str) -> Tensor:
        """(L, D) float16

        Raises:
            KeyError: it was not encoded.
        """
        try:
            return self.store[caption_key(caption)]
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
        captions = list(captions)
        if accelerator.is_main_process:
            warn_of_long(captions, tokenizer, max_tokens(tokenizer, text_encoder))
        conditioner = self.manner(tokenizer, text_encoder, warn=False)

        def encode(texts: list[str]) -> Tensor:
            states = conditioner(texts, 1).states  # (B, L, D)
            assert states is not None
            return states

        with evaluating(text_encoder):
            self.encode(captions, encode, accelerator, batch_size)

    def encode(
        self, captions: Iterable[str], encode: Callable[[list[str]], Tensor], accelerator: Accelerator, batch_size: int
    ) -> None:
        """Fill with what `encode` makes of captions, a row of each."""
        by_key = {caption_key(caption): caption for caption in captions}

        def encoded(batches: Batches) -> Iterator[Mapping[str, Tensor]]:
            for keys in batches:
                texts = [by_key[key] for key in keys]
                states = finite(
                    encode(texts),
                    [repr(text[:SHOWN]) for text in texts],
                    torch.float16,
                    "is the text encoder sound? Without cache_text it need not be below",
                )
                yield dict(zip(keys, states, strict=True))

        fill(self.store, list(by_key), encoded, accelerator, batch_size=batch_size, things="captions")


def warn_of_long(captions: Sequence[str], tokenizer: Any, length: int) -> None:
    """Warn once of captions that are longer than the encoder reads."""
    room = length - tokenizer.num_special_tokens_to_add()
    # A token has at least a byte, so short captions need no second look.
    long = [text for text in expand_words(captions, tokenizer) if len(text.encode("utf-8", "replace")) > room]
    cut = []
    for start in range(0, len(long), 1024):
        some = long[start : start + 1024]
        with tokenizing(tokenizer):
            counts = map(len, tokenizer(some, truncation=False, verbose=False).input_ids)
        cut += [text for text, count in zip(some, counts, strict=True) if count > length]
    if cut:
        logger.warning(
            "%d captions are longer than the text encoder's %d tokens and are cut; the first begins with %r",
            len(cut),
            length,
            cut[0][:SHOWN],
        )


def caption_key(caption: str) -> str:
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
    return digest(digest(words), manner, weights_digest(text_encoder.state_dict())[:DIGEST], config, length)


def with_time_ids(condition: Any, told: Tensor) -> Any:
    """As SDXL is told of sizes."""
    return replace(condition, time_ids=told)


def with_sizes(condition: Conditioning, told: Tensor) -> Conditioning:
    """As PixArt is: height and width of what is seen of a picture, and their ratio."""
    height, width = told[:, 4], told[:, 5]
    return condition.replace(sizes=torch.stack([height, width, height / width], dim=1))


@dataclass(frozen=True)
class ConditionSource:
    """What a network is given of captions.

    Args:
        read: for the workers of a data loader; a tuple of captions to a batch.
        encoder: makes conditions of the `Captions` that were read, in the training process.
        idle: networks that training does not need, as a cache takes their place.
        tells_sizes: whether the network is given the sizes of pictures too, see `View.told`.
        tell: adds them, (B, 6), to `Conditioning` or `Tokens`.
    """

    read: Callable[[tuple[str, ...]], ReadCaptions]
    encoder: TextConditioner | None = None
    idle: tuple[nn.Module, ...] = ()
    tells_sizes: bool = False
    tell: Callable[[Any, Tensor], Any] = with_time_ids

    @torch.no_grad()
    def condition(self, captions: ReadCaptions, device: torch.device) -> Conditioning | Tokens:
        """What the network is given, on `device`: float32, tokens or labels."""
        if isinstance(captions, Captions):
            assert self.encoder is not None
            captions = self.encoder(captions.texts)
        if isinstance(captions, Tokens):
            return captions.to(device)
        return captions.to(device, non_blocking=True).to(dtype=torch.float32)


def read_states(cache: TextCache, captions: Sequence[str]) -> Conditioning:
    """Text states (B, L, D) float16 from a cache, with the mask of those that hide padding."""
    found = Conditioning(states=torch.stack([cache[caption] for caption in captions]))
    return with_mask(found) if issubclass(cache.manner, MaskedTextConditioner) else found


def read_tokens(
    tokenizer: Any, length: int, uses_mask: bool, prepare: Callable[[str], str], captions: Sequence[str]
) -> Tokens:
    """`length` tokens of each prepared caption."""
    prepared = [prepare(caption) for caption in captions]
    with tokenizing(tokenizer):
        encoded = tokenizer(prepared, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return Tokens(encoded.input_ids, encoded.attention_mask if uses_mask else None)


def token_source(tokenizer: Any, text_encoder: Any, prepare: Callable[[str], str]) -> ConditionSource:
    """Tokens, for a text encoder that is trained.

    Args:
        text_encoder: says how many tokens it takes, and whether it uses an attention mask.
        prepare: what is done to a caption before.
    """
    uses_mask = bool(getattr(text_encoder.config, "use_attention_mask", False))
    return ConditionSource(partial(read_tokens, tokenizer, max_tokens(tokenizer, text_encoder), uses_mask, prepare))


def class_source(
    classes: Sequence[str], pictures: Sequence[CaptionedPicture], none: int | None = None
) -> ConditionSource:
    """Numbers of classes, in the order of their names; none: see `ClassConditioner`.

    Raises:
        ValueError: a picture, which must be held out, is of none of them.
    """
    numbers = {name: number for number, name in enumerate(classes)}
    for picture in () if first_captions(pictures) <= numbers.keys() else pictures:
        if picture.captions[0] not in numbers:
            raise ValueError(
                f"{picture.name}: a held-out picture of {picture.captions[0]!r}, of which no training picture is; "
                f"remove it"
            )
    return ConditionSource(ClassConditioner(numbers, none))


def text_source(
    run: TrainingRun,
    settings: DiffusionSettings,
    tokenizer: Any,
    text_encoder: Any,
    pictures: Sequence[CaptionedPicture],
    manner: type[TextConditioner] = TextConditioner,
) -> ConditionSource:
    """The source for a frozen text encoder that the settings ask for; a cache is filled with all captions.

    `manner` makes states of captions. Warns once of captions that are too long. The encoder is back on the CPU
    afterwards where it is not needed, so that a GPU's memory is the denoiser's.
    """
    if not settings.cache_text:
        look_for_long(run, pictures, tokenizer, text_encoder)
        return ConditionSource(Captions, manner(tokenizer, text_encoder.to(run.device), warn=False))
    text_encoder.to(run.device)
    labels = cache_labels(settings, "text_encoder", "model")
    cache = TextCache(cache_folder(run, settings) / "text", tokenizer, text_encoder, labels, manner)
    fill = partial(cache.fill, tokenizer=tokenizer, text_encoder=text_encoder, accelerator=run.accelerator)
    fill_captions(cache.store, fill, settings, pictures, run.accelerator)
    return ConditionSource(partial(read_states, cache), idle=(text_encoder.to("cpu"),))


def fill_captions(
    store: TensorStore,
    fill: Callable[[list[str]], None],
    settings: DiffusionSettings,
    pictures: Sequence[CaptionedPicture],
    accelerator: Accelerator,
) -> None:
    """Encode all captions of pictures by `fill`, part by part; not if a run before has noted that it has done so."""
    known, choice = identity(pictures), CaptionChoice(settings)
    what = known and digest("captions", STATES, known, choice.shuffle, choice.keep, choice.variants)
    if is_filled(store, what, accelerator, "captions"):
        return
    left = iter(pictures)
    while some := list(islice(left, PART)):
        fill(captions_of(settings, some))
    if what and accelerator.is_main_process:
        store.note(what)


def captions_of(settings: DiffusionSettings, pictures: Iterable[CaptionedPicture]) -> list[str]:
    """All captions that training may ask for."""
    choice, captions = CaptionChoice(settings), {""}
    for picture in pictures:
        captions |= {*choice.all(picture.captions), picture.captions[0]}
    return sorted(captions)


def look_for_long(run: TrainingRun, pictures: Sequence[CaptionedPicture], tokenizer: Any, text_encoder: Any) -> None:
    """Warn once if some of the pictures' captions are too long."""
    if run.accelerator.is_main_process:
        some = pictures[:: max(1, len(pictures) // LOOKED_AT)]
        own = {caption for picture in some for caption in picture.captions}
        warn_of_long(sorted(own), tokenizer, max_tokens(tokenizer, text_encoder))
