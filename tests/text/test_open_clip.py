"""open_clip's text towers and tokenizer against their conversions, with random weights."""

from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.tokenizer import SimpleTokenizer
from transformers import AutoTokenizer, CLIPTextModel

from latentdiff.text import convert_text_tower, encode_prompts, load_open_clip_text_encoder, load_text_encoder
from latentdiff.text.open_clip import convert_tokenizer

VISION = {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 3}

PROMPTS = [
    "a red car",
    "A Photo of  the\n\tEiffel   Tower!!",
    "",
    "!",
    "it's 1,024 dogs' dinner -- they'd say: \"don't\" #5 (50%)",
    "<|endoftext|> and <b>tags</b>",
    "crème brûlée, ÀÉÎÕÜ, straße, ñandú",
    "赤い車 красная машина αυτοκίνητο سيارة",
    "😀 emoji 🚗💨 and 👩‍🚀",
    "under_score-and-hyphen a/b\\c @home",
    "a very long prompt of many words " * 20,
]


def tiny(custom: bool, quick_gelu: bool = False, **text: Any) -> Any:
    model = (CustomTextCLIP if custom else CLIP)(24, VISION, {**TEXT, **text}, quick_gelu=quick_gelu).eval()
    for parameter in model.parameters():  # biases and norms too, which start as zeros and ones
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return SimpleTokenizer()(PROMPTS)


@torch.no_grad()
@pytest.mark.parametrize("custom", [False, True])
@pytest.mark.parametrize("quick_gelu", [False, True])
def test_converted_towers_compute_the_same(custom: bool, quick_gelu: bool, tokens: torch.Tensor) -> None:
    model = tiny(custom, quick_gelu)
    tower = getattr(model, "text", model)
    x = tower.token_embedding(tokens) + tower.positional_embedding
    expected = tower.ln_final(tower.transformer(x, attn_mask=tower.attn_mask))
    converted = convert_text_tower(model)
    torch.testing.assert_close(converted(tokens).last_hidden_state, expected, atol=1e-4, rtol=1e-4)
    projected = convert_text_tower(model, with_projection=True)
    torch.testing.assert_close(projected(tokens).text_embeds, model.encode_text(tokens), atol=1e-4, rtol=1e-4)
    other = convert_text_tower(tiny(custom, not quick_gelu))
    assert other.config.hidden_act != converted.config.hidden_act


@torch.no_grad()
def test_the_layer_before_the_last(tokens: torch.Tensor) -> None:
    """What Stable Diffusion 2 takes of ViT-H-14."""
    model = tiny(custom=False)
    x = model.token_embedding(tokens) + model.positional_embedding
    for block in model.transformer.resblocks[:-1]:
        x = block(x, attn_mask=model.attn_mask)
    converted = convert_text_tower(model, skip_last_layers=1)
    assert converted.config.num_hidden_layers == 2
    torch.testing.assert_close(converted(tokens).last_hidden_state, model.ln_final(x), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="skip_last_layers"):
        convert_text_tower(model, skip_last_layers=3)


@torch.no_grad()
def test_saved_conversions_need_no_open_clip(tmp_path: Path, tokens: torch.Tensor) -> None:
    converted = convert_text_tower(tiny(custom=True))
    converted.save_pretrained(tmp_path)
    convert_tokenizer(SimpleTokenizer()).save_pretrained(tmp_path)
    tokenizer, encoder = load_text_encoder(tmp_path)
    assert type(encoder) is CLIPTextModel
    assert not getattr(encoder.config, "use_attention_mask", False)
    expected = converted(tokens).last_hidden_state
    torch.testing.assert_close(encode_prompts(PROMPTS, tokenizer, encoder), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("reloaded", [False, True])
def test_token_ids_are_the_same(reloaded: bool, tokens: torch.Tensor, tmp_path: Path) -> None:
    tokenizer = convert_tokenizer(SimpleTokenizer())
    if reloaded:
        tokenizer.save_pretrained(tmp_path)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer(PROMPTS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    for prompt, own, theirs in zip(PROMPTS, ids, tokens, strict=True):
        assert own.tolist() == theirs.tolist(), prompt


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({"no_causal_mask": True}, "no causal mask"),
        ({"embed_cls": True}, "class token"),
        ({"ls_init_value": 0.1}, "scales its layers' outputs"),
        ({"block_type": "custom"}, "CustomResidualAttentionBlock"),
    ],
)
def test_towers_that_clip_cannot_be_are_refused(text: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert_text_tower(tiny(custom=True, **text))


@pytest.mark.parametrize(
    ("text", "message"), [({"pool_type": "last"}, "pools by 'last'"), ({"proj_bias": True}, "projection")]
)
def test_heads_that_clip_cannot_have_are_refused(text: dict[str, Any], message: str) -> None:
    model = tiny(custom=True, **text)
    convert_text_tower(model)  # the states are the same all the same
    with pytest.raises(ValueError, match=message):
        convert_text_tower(model, with_projection=True)


def test_names_and_files_that_are_not_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no model named 'ViT-Z'"):
        load_open_clip_text_encoder("ViT-Z")
    with pytest.raises(ValueError, match="xlm-roberta-base"):
        load_open_clip_text_encoder("xlm-roberta-base-ViT-B-32")
    (tmp_path / "weights.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="pickled weights"):
        load_open_clip_text_encoder("ViT-B-32", str(tmp_path / "weights.pt"))
    with pytest.raises(ValueError, match="cannot be a CLIPTokenizer"):
        convert_tokenizer(object())


@torch.no_grad()
@pytest.mark.slow
def test_a_named_model_is_converted_as_a_whole() -> None:
    torch.manual_seed(0)
    tokenizer, encoder = load_text_encoder("open_clip:ViT-B-32")
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-32").eval()
    tokens = open_clip.get_tokenizer("ViT-B-32")(PROMPTS)
    x = model.token_embedding(tokens) + model.positional_embedding
    expected = model.ln_final(model.transformer(x, attn_mask=model.attn_mask))
    torch.testing.assert_close(encode_prompts(PROMPTS, tokenizer, encoder), expected, atol=1e-4, rtol=1e-4)
