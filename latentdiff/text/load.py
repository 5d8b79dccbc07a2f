"""Loading a text encoder with its tokenizer, from a folder, a packaged model, the hub or open_clip."""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from latentdiff.interchange.folders import check_links, check_model_files, find_model, load_whole
from latentdiff.interchange.user_files import faults_named
from latentdiff.text.encode import UNLIMITED, max_tokens

logger = logging.getLogger(__name__)

OPEN_CLIP = "open_clip:"

# The class that is only the text encoder, for models that are more than that.
ENCODER_CLASSES = {
    "clip": "CLIPTextModel",
    "clip_text_model": "CLIPTextModel",
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
}


def load_text_encoder(source: str | Path, dtype: torch.dtype = torch.float32) -> tuple[Any, nn.Module]:
    """A tokenizer and a text encoder, in evaluation mode.

    Args:
        source: a pipeline folder or a packaged model (its ``text_encoder`` and ``tokenizer``), a folder that
            transformers saved, the id of either on the hub, or ``open_clip:NAME`` or ``open_clip:NAME/PRETRAINED``.
        dtype: of the weights.

    Encoders other than CLIP's that come from outside a pipeline get ``use_attention_mask`` in their config, so that
    padding is hidden from them, here and in diffusers.

    Raises:
        FileNotFoundError, OSError: there is no such model, or it is not in safetensors files.
        ValueError: a file is damaged, the model needs code of its own, its tokenizer knows no words, or the encoder
            does not say how many tokens it takes.
    """
    if str(source).startswith(OPEN_CLIP):
        from latentdiff.text.open_clip import load_open_clip_text_encoder

        name, _, pretrained = str(source).removeprefix(OPEN_CLIP).partition("/")
        tokenizer, text_encoder = load_open_clip_text_encoder(name, pretrained or None)
        return tokenizer, text_encoder.to(dtype)

    folder = find_model(source)
    place = str(source) if folder is None else str(folder)
    in_pipeline = on_hub_in_pipeline(place) if folder is None else (folder / "text_encoder").is_dir()
    if folder is not None:
        parts = [folder / "text_encoder", folder / "tokenizer"] if in_pipeline else [folder]
        check_links(folder, [*parts, *(path for part in parts for path in part.glob("*"))])
        for part in parts:
            check_model_files(part)

    from transformers import AutoTokenizer

    subfolder = "tokenizer" if in_pipeline else ""
    with faults_named(place, foreign=True):
        tokenizer = AutoTokenizer.from_pretrained(place, subfolder=subfolder, trust_remote_code=False)
        text_encoder = load_encoder(place, "text_encoder" if in_pipeline else "", dtype)
        check_vocabulary(tokenizer, f"{place}/{subfolder}" if subfolder else place, text_encoder)
        if not in_pipeline and text_encoder.config.model_type not in ("clip", "clip_text_model"):
            text_encoder.config.use_attention_mask = True
        if tokenizer.model_max_length >= UNLIMITED:
            tokenizer.model_max_length = max_tokens(tokenizer, text_encoder)
    return tokenizer, text_encoder.eval()


def check_vocabulary(tokenizer: Any, place: str, text_encoder: Any = None) -> None:
    """Raises ValueError for a tokenizer without words, as transformers makes one of a folder without its files.

    Words that were added to it, such as those of textual inversion, are in its config and do not count. Nor may the
    number of tokens that it takes be something else. A folder without the tokenizer's config, and a tokenizer that
    knows far fewer words than its encoder, are warned of: prompts may be read otherwise than in training.
    """
    if Path(place).is_dir() and not (Path(place) / "tokenizer_config.json").exists():
        logger.warning(
            "%s has no tokenizer_config.json; how prompts become tokens is guessed. Copy the file there", place
        )
    rows = 0 if text_encoder is None else text_encoder.get_input_embeddings().weight.shape[0]
    if len(tokenizer) < 0.9 * rows:
        logger.warning("%s knows %d tokens, and its text encoder %d: words may be missing", place, len(tokenizer), rows)
    length = tokenizer.model_max_length
    if isinstance(length, bool) or not isinstance(length, int | float) or length < 1:
        raise ValueError(f"{place}: its model_max_length is {str(length)[:100]!r}; it should be a number of tokens")
    added = {*tokenizer.all_special_tokens, *getattr(tokenizer, "added_tokens_encoder", {})}
    if len(tokenizer) - len(added) <= len(added) and set(tokenizer.get_vocab()) - added <= {"▁"}:
        raise ValueError(
            f"{place} has no tokenizer that knows any words; copy its files there (tokenizer.json, or vocab.txt, or "
            f"vocab.json and merges.txt)"
        )


def load_encoder(place: str, subfolder: str, dtype: torch.dtype) -> Any:
    """The text encoder alone, of whatever kind the config in `place` says."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(place, subfolder=subfolder, trust_remote_code=False)
    class_name = ENCODER_CLASSES.get(config.model_type, "AutoModel")
    encoder_class = getattr(transformers, class_name)
    return load_whole(encoder_class, place, subfolder=subfolder, dtype=dtype)


def on_hub_in_pipeline(model_id: str) -> bool:
    """Whether a model on the hub is a pipeline with a ``text_encoder`` folder."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        hf_hub_download(model_id, "text_encoder/config.json")
    except (EntryNotFoundError, LocalEntryNotFoundError):
        return False
    return True
