"""Captions as token numbers, and their states: a text encoder cut to the tokens that a recipe's captions have."""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

TOKENS_FILE = "kept_tokens.json"


def cut_text_encoder(source: Path, words: Iterable[str], output: Path) -> int:
    """Write `output/tokenizer` whole and `output/text_encoder` with the embeddings of the tokens of `words` only.

    A word's tokens do not depend on the words around it, so captions made of these words have exactly the states that
    the whole encoder gives. Half precision. Returns how many tokens are kept.
    """
    from transformers import BertModel, BertTokenizer

    tokenizer = BertTokenizer.from_pretrained(source / "tokenizer")
    model = BertModel.from_pretrained(source / "text_encoder", add_pooling_layer=False)
    ids = tokenizer(sorted(set(words)), add_special_tokens=True)["input_ids"]
    kept = sorted({token for row in ids for token in row} | set(tokenizer.all_special_ids))
    rows = model.get_input_embeddings().weight.detach()[torch.tensor(kept)].clone()
    model.set_input_embeddings(torch.nn.Embedding.from_pretrained(rows, freeze=False, padding_idx=0))
    model.config.vocab_size = len(kept)
    tokenizer.save_pretrained(output / "tokenizer")
    model.half().save_pretrained(output / "text_encoder")
    (output / TOKENS_FILE).write_text(json.dumps(kept), encoding="utf-8")
    return len(kept)


class CutTokenizer:
    """Captions to rows of the cut embedding, (N, L) uint16, padded with row 0.

    Raises:
        ValueError: from a call, when a caption has a token that was cut away; `knows` tells beforehand.
    """

    def __init__(self, folder: Path, length: int) -> None:
        from transformers import BertTokenizer

        self.tokenizer = BertTokenizer.from_pretrained(folder / "tokenizer")
        self.length = length
        kept = json.loads((folder / TOKENS_FILE).read_text(encoding="utf-8"))
        self.row = {token: row for row, token in enumerate(kept)}
        if self.row.get(self.tokenizer.pad_token_id) != 0:
            raise ValueError(f"{folder / TOKENS_FILE}: the padding token must be the first")

    def knows(self, caption: str) -> bool:
        return all(token in self.row for token in self.tokenizer(caption)["input_ids"])

    def __call__(self, captions: list[str]) -> NDArray[np.uint16]:
        ids = self.tokenizer(captions, padding="max_length", max_length=self.length, truncation=True)["input_ids"]
        try:
            return np.array([[self.row[token] for token in line] for line in ids], dtype=np.uint16)
        except KeyError as error:
            missing = self.tokenizer.convert_ids_to_tokens(error.args[0])
            raise ValueError(f"the token {missing!r} of {captions} was not packed") from None


@torch.no_grad()
def text_states(folder: Path, rows: Tensor, device: torch.device, batch: int = 8192) -> Tensor:
    """Rows of the cut embedding (N, L) -> states (N, L, D), float16, on `device`; padding is hidden."""
    from transformers import BertModel

    model = BertModel.from_pretrained(folder / "text_encoder", add_pooling_layer=False).float()
    model = model.to(device).eval()
    states = torch.empty(*rows.shape, model.config.hidden_size, dtype=torch.float16, device=device)
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch].to(device).long()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            output = model(part, attention_mask=(part != 0).long()).last_hidden_state
        states[start : start + batch] = output.half()
    return states
