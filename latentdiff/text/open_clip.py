"""open_clip's text towers as transformers' CLIP text encoders, so that a saved pipeline needs no open_clip.

open_clip's residual blocks and transformers' CLIP layers compute the same; only names differ, and open_clip keeps
the weights of query, key and value in one matrix.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from latentdiff.interchange.single_file.names import OPEN_CLIP, open_clip_place

START, END = "<|startoftext|>", "<|endoftext|>"


def load_open_clip_text_encoder(
    model_name: str, pretrained: str | None = None, *, skip_last_layers: int = 0, with_projection: bool = False
) -> tuple[Any, nn.Module]:
    """The text encoder of an open_clip model and its tokenizer, as transformers' classes.

    Args:
        model_name: as in ``open_clip.list_models()``, for instance ``"ViT-B-32"``.
        pretrained: a tag of open_clip or a safetensors file; None gives random weights.
        skip_last_layers, with_projection: as in `convert_text_tower`.

    Returns:
        A ``CLIPTokenizer``, and what `convert_text_tower` returns.

    Raises:
        ValueError: open_clip has no such model, its text tower or tokenizer has no equal in transformers, or
            `pretrained` is a file that is not in the safetensors format.
    """
    import open_clip

    if model_name not in open_clip.list_models():
        raise ValueError(f"open_clip has no model named {model_name!r}; open_clip.list_models() lists them")
    if pretrained is not None and Path(pretrained).is_file() and Path(pretrained).suffix != ".safetensors":
        raise ValueError(f"{pretrained}: pickled weights can run code and are not read; give a safetensors file")
    config = open_clip.get_model_config(model_name)["text_cfg"]
    if "hf_model_name" in config:
        raise ValueError(
            f"the text tower of {model_name} is transformers' {config['hf_model_name']}, which the conversion does not "
            f"take apart; load that one with load_text_encoder"
        )
    model = open_clip.create_model(model_name, pretrained=pretrained, weights_only=True)
    tokenizer = convert_tokenizer(open_clip.get_tokenizer(model_name))
    encoder = convert_text_tower(model, skip_last_layers=skip_last_layers, with_projection=with_projection)
    return tokenizer, encoder


def convert_text_tower(model: nn.Module, *, skip_last_layers: int = 0, with_projection: bool = False) -> nn.Module:
    """The text tower of an open_clip model as a ``CLIPTextModel``, in evaluation mode.

    Args:
        model: an open_clip ``CLIP``, a ``CustomTextCLIP`` or its ``TextTransformer``.
        skip_last_layers: leave this many layers out. Stable Diffusion 2 takes the states before the last layer: 1.
        with_projection: a ``CLIPTextModelWithProjection``, whose ``text_embeds`` are open_clip's ``encode_text``.

    Raises:
        ValueError: the tower has a part that transformers' CLIP has not, and which.
    """
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tower: Any = getattr(model, "text", model)
    check_tower(tower, with_projection)
    blocks = list(tower.transformer.resblocks)
    if not 0 <= skip_last_layers < len(blocks):
        raise ValueError(f"skip_last_layers must lie in [0, {len(blocks) - 1}] for this tower, not {skip_last_layers}")
    vocab_size, width = tower.token_embedding.weight.shape
    config = CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=blocks[0].mlp.c_fc.out_features,
        num_hidden_layers=len(blocks) - skip_last_layers,
        num_attention_heads=blocks[0].attn.num_heads,
        max_position_embeddings=len(tower.positional_embedding),
        hidden_act=activation(blocks[0].mlp.gelu),
        layer_norm_eps=tower.ln_final.eps,
        projection_dim=tower.text_projection.shape[1] if with_projection else width,
        bos_token_id=vocab_size - 2,
        eos_token_id=vocab_size - 1,
        pad_token_id=0,
    )
    encoder = (CLIPTextModelWithProjection if with_projection else CLIPTextModel)(config)
    body = getattr(encoder, "text_model", encoder)
    body.load_state_dict(body_weights(tower, body.state_dict()))
    if with_projection:
        encoder.text_projection.weight.data.copy_(tower.text_projection.T)
    return encoder.to(tower.token_embedding.weight.dtype).eval()


def body_weights(tower: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """A tower's weights under these names of transformers' ``CLIPTextModel``."""
    given, weights = tower.state_dict(), {}
    for name in names:
        place, part = open_clip_place(name, {})
        joined = given[place.removeprefix(OPEN_CLIP)]
        weights[name] = joined if part is None else joined.chunk(3)[part]
    return weights


def activation(module: nn.Module) -> str:
    """transformers' name of an activation.

    Raises:
        ValueError: it has none.
    """
    if isinstance(module, nn.GELU):
        return "gelu" if module.approximate == "none" else "gelu_pytorch_tanh"
    if type(module).__name__ == "QuickGELU":
        return "quick_gelu"
    raise ValueError(f"this text tower cannot be a CLIPTextModel: its activation is {type(module).__name__}")


def check_tower(tower: Any, with_projection: bool) -> None:
    """Raises ValueError, naming the part, for a tower that transformers' CLIP cannot be."""
    for part in ("token_embedding", "positional_embedding", "transformer", "ln_final"):
        if not hasattr(tower, part):
            raise ValueError(f"this text tower cannot be a CLIPTextModel: a {type(tower).__name__} has no {part}")
    odd = list(odd_parts(tower))
    pooling = getattr(tower, "text_pool_type", None) or getattr(tower, "pool_type", None)
    if with_projection and pooling != "argmax":
        odd.append(f"it pools by {pooling!r}, not at the end token, which has the highest id")
    if with_projection and not isinstance(getattr(tower, "text_projection", None), nn.Parameter):
        odd.append("its projection is missing or has a bias")
    if odd:
        raise ValueError(f"this text tower cannot be a CLIPTextModel: {'; '.join(odd)}")


def odd_parts(tower: Any) -> list[str]:
    """What of a tower's blocks and embeddings transformers' CLIP does not have."""
    block = tower.transformer.resblocks[0]
    if type(block).__name__ != "ResidualAttentionBlock":
        return [f"its blocks are {type(block).__name__}s"]
    odd = []
    if getattr(tower, "attn_mask", None) is None:
        odd.append("it has no causal mask")
    if getattr(tower, "cls_emb", None) is not None:
        odd.append("it has a class token")
    if not isinstance(block.ls_1, nn.Identity):
        odd.append("it scales its layers' outputs")
    if not isinstance(tower.ln_final, nn.LayerNorm):
        odd.append(f"its normalisation is {type(tower.ln_final).__name__}")
    return odd


def convert_tokenizer(tokenizer: Any) -> Any:
    """open_clip's byte-pair tokenizer as a ``CLIPTokenizer`` with the same ids, padding (0) included.

    Not converted: open_clip first mends mojibake, straightens curly quotes and resolves HTML entities (ftfy).

    Raises:
        ValueError: another kind of tokenizer, or one that does not lower-case.
    """
    from open_clip import tokenizer as own
    from transformers import CLIPTokenizer

    if not isinstance(tokenizer, own.SimpleTokenizer) or tokenizer.vocab_size != 49408:
        raise ValueError(f"a {type(tokenizer).__name__} cannot be a CLIPTokenizer")
    if tokenizer.encode("A") != tokenizer.encode("a"):
        raise ValueError("a case-sensitive tokenizer cannot be a CLIPTokenizer")
    renamed = {"<start_of_text>": START, "<end_of_text>": END}
    vocab = {renamed.get(token, token): number for token, number in tokenizer.encoder.items()}
    merges = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.__getitem__)
    return CLIPTokenizer(
        vocab=vocab,
        merges=merges,
        pad_token="!",  # the token with id 0, which open_clip pads with
        split_special_tokens=True,  # so that an exclamation mark in a prompt is not taken for padding
        model_max_length=tokenizer.context_length,
    )
