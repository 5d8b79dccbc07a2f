"""A pytest plugin for diffusers' own tests: puts this package's classes where the tests import diffusers'.

Loaded by `run.py` with ``-p``; the environment variable ``CONFORMANCE`` says whose classes to test, "theirs" or "ours".
In both runs the tests' tokenizer and text encoder, which are on the hub, are made here, as both run without a network.
"""

import os
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import diffusers
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5Tokenizer,
)

PIPELINES = {
    "StableDiffusionPipeline": "TextToImagePipeline",
    "StableDiffusionImg2ImgPipeline": "ImageToImagePipeline",
    "StableDiffusionInpaintPipeline": "InpaintPipeline",
    "StableDiffusionUpscalePipeline": "SuperResolutionPipeline",
    "StableDiffusionImageVariationPipeline": "ImageVariationPipeline",
    "StableDiffusionXLPipeline": "SDXLTextToImagePipeline",
    "StableDiffusionXLImg2ImgPipeline": "SDXLImageToImagePipeline",
    "StableDiffusionXLInpaintPipeline": "SDXLInpaintPipeline",
    "DiTPipeline": "DiTPipeline",
    "PixArtAlphaPipeline": "PixArtTextToImagePipeline",
}
NETWORKS = ("AutoencoderKL", "UNet2DConditionModel", "VQModel", "DiTTransformer2DModel", "PixArtTransformer2DModel")
TINY_CLIPS = ("hf-internal-testing/tiny-random-clip", "peft-internal-testing/tiny-clip-text-2")
"""What the tests ask the hub for: a CLIP text encoder 32 wide with 1000 tokens, and its tokenizer."""
TINY_T5S = ("hf-internal-testing/tiny-random-t5",)
"""And a T5 as wide, of which the tests take the config and the tokenizer."""


def make_tokenizer() -> Any:
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    tokens = ["<|startoftext|>", "!!", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    tokens += [f"unused{i}" for i in range(1000 - len(tokens))]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77)


def make_text_encoder(cls: Any = CLIPTextModel) -> Any:
    config = CLIPTextConfig(
        vocab_size=1000,
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=5,
        num_attention_heads=4,
        projection_dim=32,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return cls(config).eval()


def make_t5_tokenizer() -> Any:
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *(chr(code) for code in range(ord("!"), ord("~") + 1))]
    return T5Tokenizer(vocab=[(piece, 0.0 if i < 3 else -1.0) for i, piece in enumerate(pieces)], extra_ids=0)


def make_t5_config() -> Any:
    return T5Config(vocab_size=1103, d_model=32, d_kv=8, d_ff=37, num_layers=5, num_heads=4, dropout_rate=0.0)


def stand_in(cls: Any, make: Callable[[], Any], names: tuple[str, ...] = TINY_CLIPS) -> None:
    """Let ``cls.from_pretrained`` give `make`'s for these names."""
    load = cls.from_pretrained.__func__

    @wraps(load)
    def from_pretrained(cls: type, name: Any, *args: Any, **options: Any) -> Any:
        return make() if name in names else load(cls, name, *args, **options)

    cls.from_pretrained = classmethod(from_pretrained)


def with_weights_of(theirs: type, build: Any) -> Any:
    """An ``__init__`` of our class that ends with the random weights that diffusers' class would have.

    The tests compare with numbers that belong to these weights.
    """

    @wraps(build)
    def __init__(self: Any, *args: Any, **config: Any) -> None:  # noqa: N807
        state = torch.get_rng_state()
        build(self, *args, **config)
        if any(parameter.is_meta for parameter in self.parameters()):
            return
        torch.set_rng_state(state)
        self.load_state_dict(theirs(*args, **config).state_dict())

    return __init__


def substitute() -> None:
    from latentdiff import models, pipelines

    for theirs, ours in PIPELINES.items():
        setattr(diffusers, theirs, getattr(pipelines, ours))
    for name in NETWORKS:
        own, original = getattr(models, name), getattr(diffusers, name)
        own.set_default_attn_processor = lambda self: None  # ours has no other attention
        own.__init__ = with_weights_of(original, own.__init__)
        setattr(diffusers, name, own)


stand_in(transformers.CLIPTokenizer, make_tokenizer)
stand_in(transformers.CLIPTextModel, make_text_encoder)
stand_in(CLIPTextModelWithProjection, partial(make_text_encoder, CLIPTextModelWithProjection))
stand_in(AutoConfig, make_t5_config, TINY_T5S)
stand_in(AutoTokenizer, make_t5_tokenizer, TINY_T5S)
if os.environ.get("CONFORMANCE") == "ours":
    substitute()
