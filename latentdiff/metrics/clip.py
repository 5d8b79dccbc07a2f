"""CLIP score: the similarity of pictures and their captions in a CLIP model."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from latentdiff.interchange.fingerprint import weights_digest
from latentdiff.interchange.folders import check_safetensors
from latentdiff.metrics.extractors import (
    Extractor,
    PooledVision,
    in_batches,
    loading,
    pooled,
    preprocessing,
    shown_source,
    transformers_model,
)
from latentdiff.text.load import check_vocabulary

OPEN_CLIP = "open_clip:"


class TextFeatures(Protocol):
    def __call__(self, captions: Sequence[str]) -> Tensor:
        """(B, D)"""


class ClipScore:
    """100 times the cosine between a picture's and its caption's CLIP embedding (Hessel et al. 2021, without its 2.5).

    Args:
        name: its name in a report.
        model: with both towers, for its digest.
        pictures: the image tower.
        texts: captions to embeddings, on the device of the image tower.
    """

    def __init__(self, name: str, model: nn.Module, pictures: Extractor, texts: TextFeatures) -> None:
        self.name, self.model, self.pictures, self.texts = name, model.eval().requires_grad_(False), pictures, texts
        self.digest = weights_digest(model.state_dict())

    def to(self, device: torch.device | str) -> "ClipScore":
        self.model.to(device)
        self.pictures.to(device)
        return self

    def scores(self, pictures: Sequence[Image.Image], captions: Sequence[str]) -> Tensor:
        """(B,) float32 from 0 to 100; a cosine below 0 counts as 0.

        Raises:
            ValueError: not one caption for each picture.
        """
        return 100 * self.cosines(pictures, captions).clamp(min=0)

    @torch.no_grad()
    def cosines(self, pictures: Sequence[Image.Image], captions: Sequence[str]) -> Tensor:
        """(B,) float32 from -1 to 1.

        Raises:
            ValueError: not one caption for each picture.
        """
        if len(pictures) != len(captions):
            raise ValueError(f"{len(pictures)} pictures and {len(captions)} captions cannot be compared one by one")
        seen = F.normalize(self.pictures(pictures), dim=-1)
        read = F.normalize(self.texts(captions).float().cpu(), dim=-1)
        return (seen * read).sum(-1)

    def mean(self, pairs: Iterable[tuple[Image.Image, str]], batch_size: int = 16) -> float:
        """The mean over pictures with captions.

        Raises:
            ValueError: there are none.
        """
        batches = in_batches(pairs, batch_size)
        found = [self.scores([picture for picture, _ in batch], [text for _, text in batch]) for batch in batches]
        if not found:
            raise ValueError("there are no pictures to score")
        return float(torch.cat(found).double().mean())

    def describe(self) -> dict[str, Any]:
        """The entry in a report."""
        return self.pictures.describe() | {"name": self.name, "weights_sha256": self.digest}


def load_clip(source: str) -> ClipScore:
    """A CLIP model: a transformers folder, ``owner/name`` on the hub, or ``open_clip:NAME/PRETRAINED``.

    PRETRAINED is a tag of open_clip or a safetensors file.

    Raises:
        FileNotFoundError: there is no such folder or file.
        ValueError: it is not a model of pictures and text, it is damaged or could not be fetched, or open_clip has none
            of that name.
    """
    if source.startswith(OPEN_CLIP):
        return open_clip_score(source.removeprefix(OPEN_CLIP))
    return transformers_score(source)


def transformers_score(source: str) -> ClipScore:
    """See `load_clip`."""
    from transformers import AutoTokenizer

    folder, model, _ = transformers_model(source, "a CLIP is open_clip:NAME/PRETRAINED")
    if not hasattr(model, "get_image_features") or not hasattr(model, "get_text_features"):
        raise ValueError(f"{source} holds a {type(model).__name__}; a CLIP score needs a model of pictures and text")
    with loading(source):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    check_vocabulary(tokenizer, source)
    limit = min(tokenizer.model_max_length, model.config.text_config.max_position_embeddings)
    size, mean, std = preprocessing(folder, model.config.vision_config)
    name = f"transformers {type(model).__name__} {shown_source(source)}"
    pictures = Extractor(name, PooledVision(model), size, mean, std)

    def texts(captions: Sequence[str]) -> Tensor:
        # Padded to the full length: SigLIP was trained so, and CLIP looks at the end token only.
        tokens = tokenizer(list(captions), padding="max_length", truncation=True, max_length=limit, return_tensors="pt")
        inputs = {key: value.to(pictures.device) for key, value in tokens.items() if key != "token_type_ids"}
        return pooled(model.get_text_features(**inputs))

    return ClipScore(name, model, pictures, texts)


def open_clip_score(source: str) -> ClipScore:
    """See `load_clip`; `source` is NAME/PRETRAINED."""
    import open_clip

    name, slash, pretrained = source.partition("/")
    if not slash or not pretrained:
        raise ValueError(f"open_clip:{source}: write open_clip:NAME/PRETRAINED, a model and a tag or safetensors file")
    if name not in open_clip.list_models():
        raise ValueError(f"open_clip has no model named {name!r}; open_clip.list_models() lists them")
    file = Path(pretrained).expanduser()
    is_tag = pretrained in open_clip.list_pretrained_tags_by_model(name)
    if not is_tag:
        if not file.is_file():
            raise FileNotFoundError(f"{pretrained}: open_clip has no such weights of {name}, and it is no file")
        if file.suffix != ".safetensors":
            raise ValueError(f"{pretrained}: pickled weights can run code and are not read; give a safetensors file")
        check_safetensors(file)
    with loading(OPEN_CLIP + source):
        model = open_clip.create_model(name, pretrained=pretrained if is_tag else str(file), weights_only=True)
        tokenizer = open_clip.get_tokenizer(name)
    look = open_clip.get_model_preprocess_cfg(model)
    size = look["size"] if isinstance(look["size"], int) else look["size"][0]
    pictures = Extractor(f"open_clip {name}", PooledVision(model), size, look["mean"], look["std"])

    def texts(captions: Sequence[str]) -> Tensor:
        return model.encode_text(tokenizer(list(captions)).to(pictures.device))

    label = f"open_clip {name} {pretrained if is_tag else file.name}"
    return ClipScore(label, model, pictures, texts)
