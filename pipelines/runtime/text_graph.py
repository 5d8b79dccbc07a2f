"""A pipeline's text encoder as a graph, with its tokenizer in a file: for drawing without torch."""

import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from latentdiff.interchange.atomic import json_text
from latentdiff.pipelines.runtime.graphs import write_graph
from latentdiff.pipelines.runtime.places import TOKENS_SAY
from latentdiff.pipelines.storage.onnx import TOKENS, Part, plain
from latentdiff.text.encode import max_tokens
from latentdiff.text.words import long_words

logger = logging.getLogger(__name__)


class StatesGraph(nn.Module):
    """``input_ids`` (B, L), and ``attention_mask`` (B, L) where padding is hidden, int64 -> states (B, L, D)."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.encoder(input_ids, attention_mask=attention_mask)[0]


def write_text(pipeline: Any, runtime: str, folder: Path) -> None:
    """Write ``text_encoder`` into a folder of graphs, in float32, if it can be: without it torch encodes prompts.

    Only Stable Diffusion's kind of model is drawn without torch.
    """
    encoder: Any = getattr(pipeline, "text_encoder", None)
    tokenizer: Any = getattr(pipeline, "tokenizer", None)
    others = any(pipeline.components.get(name) is not None for name in ("text_encoder_2", "transformer"))
    if encoder is None or not is_plain(tokenizer) or others:
        return
    target = folder / "text_encoder"
    try:
        length, masked = max_tokens(tokenizer, encoder), bool(getattr(encoder.config, "use_attention_mask", False))
        ids = torch.randint(encoder.config.vocab_size, (2, length))
        mask = (torch.arange(length) < torch.tensor([[length], [length // 2]])).long()
        inputs = {"input_ids": ids, **({"attention_mask": mask} if masked else {})}
        part = Part(StatesGraph(plain(encoder)), inputs, dict.fromkeys(inputs, TOKENS), ["states"], {})
        write_graph(runtime, "text encoder", part, target, half=False)
    except Exception as error:  # of many classes, of any text encoder there is; pictures are drawn without this graph
        logger.info("Prompts are encoded by torch: %s", error)
        shutil.rmtree(target, ignore_errors=True)
        return
    reader = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    reader.no_padding()
    reader.no_truncation()
    said = {"length": length, "padding": tokenizer.pad_token_id, "masked": masked, "tokenizer": reader.to_str()}
    (target / TOKENS_SAY).write_text(json_text(said), encoding="utf-8")


def is_plain(tokenizer: Any) -> bool:
    """Whether a tokenizer is all in its file: fast, padding at the end, without words of several tokens."""
    return (
        getattr(tokenizer, "is_fast", False)
        and tokenizer.padding_side == "right"
        and tokenizer.pad_token_id is not None
        and not long_words(tokenizer)
    )
