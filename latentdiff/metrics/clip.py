"""CLIP score: how well pictures fit their captions, by a CLIP model."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from latentdiff.metrics.extractors import (
    Extractor,
    PooledVision,
    find_transformers_model,
    pooled,
    preprocessing,
    shown_source,
    weights_digest,
)
from latentdiff.metrics.resize import RESIZE

OPEN_CLIP = "open_clip:"


class TextFeatures(Protocol):
    def __call__(self, captions: Sequence[str]) -> Tensor:
        """(B, D)"""


class ClipScore:
    """100 times the cosine between a picture's and its caption's CLIP embedding (Hessel et al. 2021, without its 2.5).

    Args:
        name: what to call it in a report.
        model: of both towers, for its digest.
        pictures: the picture's tower.
        texts: captions to embeddings, on the pictures' device.
    """

    def __init__(self, name: str, model: nn.Module, pictures: Extractor, texts: TextFeatures) -> None:
        self.name, self.model, self.pictures, self.texts = name, model.eval().requires_grad_(False), pictures, texts
        self.digest = weights_digest(model.state_dict())

    def to(self, device: torch.device | str) -> "ClipScore":
        self.model.to(device)
        self.pictures.to(device)
        return self

    @torch.no_grad()
    def scores(self, pictures: Sequence[Image.Image], captions: Sequence[str]) -> Tensor:
        """(B,) float32 from 0 to 100; a cosine below 0 counts as 0.

        Raises:
            ValueError: not one caption for each picture.
        """
        if len(pictures) != len(captions):
            raise ValueError(f"{len(pictures)} pictures and {len(captions)} captions cannot be compared one by one")
        seen = F.normalize(self.pictures(pictures), dim=-1)
        read = F.normalize(self.texts(captions).float().cpu(), dim=-1)
        return 100 * (seen * read).sum(-1).clamp(min=0)

    def mean(self, pairs: Iterable[tuple[Image.Image, str]], batch_size: int = 16) -> float:
        """The mean over pictures with captions.

        Raises:
            ValueError: there are none.
        """
        found: list[Tensor] = []
        batch: list[tuple[Image.Image, str]] = []
        for pair in pairs:
            batch.append(pair)
            if len(batch) == batch_size:
                found.append(self._scores_of(batch))
                batch = []
        if batch:
            found.append(self._scores_of(batch))
        if not found:
            raise ValueError("there are no pictures to score")
        return float(torch.cat(found).double().mean())

    def _scores_of(self, batch: Sequence[tuple[Image.Image, str]]) -> Tensor:
        return self.scores([picture for picture, _ in batch], [caption for _, caption in batch])

    def describe(self) -> dict[str, Any]:
        """What a report says about it."""
        size = self.pictures.size
        return {"name": self.name, "weights_sha256": self.digest, "resize": f"{RESIZE}, to {size}x{size}"}


def load_clip(source: str) -> ClipScore:
    """A CLIP model: a transformers folder, ``owner/name`` on the hub, or ``open_clip:NAME/PRETRAINED``.

    PRETRAINED is a tag of open_clip or a safetensors file.

    Raises:
        FileNotFoundError: there is no such folder or file.
        ValueError: it is not a model of pictures and text, or open_clip has none of that name.
    """
    if source.startswith(OPEN_CLIP):
        return open_clip_score(source.removeprefix(OPEN_CLIP))
    return transformers_score(source)


def transformers_score(source: str) -> ClipScore:
    from transformers import AutoModel, AutoTokenizer

    folder = find_transformers_model(source, "a CLIP is open_clip:NAME/PRETRAINED")
    model, info = AutoModel.from_pretrained(folder, use_safetensors=True, output_loading_info=True)
    if not hasattr(model, "get_image_features") or not hasattr(model, "get_text_features"):
        raise ValueError(f"{source} holds a {type(model).__name__}; a CLIP score needs a model of pictures and text")
    missing = sorted(info["missing_keys"])
    if missing:  # they would have random values
        raise ValueError(
            f"{source}: the weights do not fit config.json; {len(missing)} are missing, such as {missing[0]}"
        )
    tokenizer = AutoTokenizer.from_pretrained(folder)
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
    if pretrained not in open_clip.list_pretrained_tags_by_model(name):
        if not file.is_file():
            raise FileNotFoundError(f"{pretrained}: open_clip has no such weights of {name}, and it is no file")
        if file.suffix != ".safetensors":
            raise ValueError(f"{pretrained}: pickled weights can run code and are not read; give a safetensors file")
    try:
        model = open_clip.create_model(name, pretrained=str(file) if file.is_file() else pretrained, weights_only=True)
    except RuntimeError as error:  # no network, or weights of another model
        reason = " ".join(str(error).split())
        raise ValueError(f"open_clip:{source}: the weights could not be loaded: {reason[:300]}") from error
    tokenizer = open_clip.get_tokenizer(name)
    look = open_clip.get_model_preprocess_cfg(model)
    size = look["size"] if isinstance(look["size"], int) else look["size"][0]
    pictures = Extractor(f"open_clip {name}", ImageTower(model), size, look["mean"], look["std"])

    def texts(captions: Sequence[str]) -> Tensor:
        return model.encode_text(tokenizer(list(captions)).to(pictures.device))

    label = f"open_clip {name} {file.name if file.is_file() else pretrained}"
    return ClipScore(label, model, pictures, texts)


class ImageTower(nn.Module):
    """The picture's embedding of an open_clip model."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model.encode_image(pixels)
