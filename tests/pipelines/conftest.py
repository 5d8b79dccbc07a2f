"""Tiny pipelines with random weights, ours and diffusers' with the same."""

import inspect
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from program import run_program
from transformers import BertConfig, BertModel, BertTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from latentdiff import AutoencoderKL, TextToImagePipeline, UNet2DConditionModel

UNET = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 16,
    "norm_num_groups": 8,
    "attention_head_dim": 2,
}
VAE = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "latent_channels": 4,
    "scaling_factor": 0.5,
}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "green", "blue", "car", "house", "cat", "in", "the", "sun"]


def clip_parts(length: int = 12) -> dict[str, Any]:
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=length)
    config = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=length,
        bos_token_id=len(tokens) - 2,
        eos_token_id=len(tokens) - 1,
        pad_token_id=len(tokens) - 1,
    )
    return {"tokenizer": tokenizer, "text_encoder": CLIPTextModel(config).eval()}


def bert_parts(length: int = 12, use_attention_mask: bool = True) -> dict[str, Any]:
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}, model_max_length=length)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=length,
        use_attention_mask=use_attention_mask,
    )
    return {"tokenizer": tokenizer, "text_encoder": BertModel(config).eval()}


@pytest.fixture(scope="session")
def clip() -> dict[str, Any]:
    torch.manual_seed(1)
    return clip_parts()


@pytest.fixture(scope="session")
def bert() -> dict[str, Any]:
    torch.manual_seed(2)
    return bert_parts()


@pytest.fixture(scope="session")
def networks() -> tuple[dict[str, Any], dict[str, Any]]:
    """Our networks, and diffusers' with the same weights."""
    torch.manual_seed(3)
    theirs = {"unet": diffusers.UNet2DConditionModel(**UNET).eval(), "vae": diffusers.AutoencoderKL(**VAE).eval()}
    ours = {"unet": UNet2DConditionModel(**UNET).eval(), "vae": AutoencoderKL(**VAE).eval()}
    for name, network in ours.items():
        network.load_state_dict(theirs[name].state_dict())
    return ours, theirs


@pytest.fixture
def pair(clip: dict[str, Any], networks: tuple[dict[str, Any], dict[str, Any]]) -> Callable[..., tuple[Any, Any]]:
    """Makes our pipeline and diffusers', alike but for the networks' code."""

    def make(scheduler: Any = None, text: dict[str, Any] | None = None) -> tuple[Any, Any]:
        scheduler = scheduler or diffusers.DDIMScheduler(clip_sample=False, steps_offset=1)
        ours, theirs = networks
        text = text or clip
        copy = type(scheduler).from_config(scheduler.config)
        none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # diffusers brings old scheduler configs up to date
            reference = diffusers.StableDiffusionPipeline(**theirs, **text, scheduler=copy, **none)
        own = TextToImagePipeline(**ours, **text, scheduler=scheduler)
        for pipeline in (own, reference):
            pipeline.set_progress_bar_config(disable=True)
        return own, reference

    return make


@pytest.fixture
def twins(clip: dict[str, Any]) -> Callable[..., tuple[Any, Any]]:
    """Makes a pipeline of ours and one of diffusers' with the same weights, of any two classes."""

    def make(ours: type, theirs: type, scheduler: Any = None, unet: Any = None, vae: Any = None, **parts: Any) -> Any:
        scheduler = scheduler or diffusers.DDIMScheduler(clip_sample=False, steps_offset=1)
        torch.manual_seed(3)
        reference = {
            "unet": diffusers.UNet2DConditionModel(**{**UNET, **(unet or {})}).eval(),
            "vae": diffusers.AutoencoderKL(**{**VAE, **(vae or {})}).eval(),
        }
        own: dict[str, Any] = {
            "unet": UNet2DConditionModel(**{**UNET, **(unet or {})}).eval(),
            "vae": AutoencoderKL(**{**VAE, **(vae or {})}).eval(),
        }
        for name, network in own.items():
            network.load_state_dict(reference[name].state_dict())
        parts = {"safety_checker": None, **parts} if "image_encoder" in parts else {**clip, **parts}
        copy = type(scheduler).from_config(scheduler.config)
        optional = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        known = inspect.signature(theirs.__init__).parameters
        more = {name: value for name, value in optional.items() if name in known and name not in parts}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # diffusers brings old scheduler configs up to date
            pipelines = ours(**own, **parts, scheduler=scheduler), theirs(**reference, **parts, **more, scheduler=copy)
        for pipeline in pipelines:
            pipeline.set_progress_bar_config(disable=True)
        return pipelines

    return make


@pytest.fixture
def pipeline(pair: Callable[..., tuple[Any, Any]]) -> Any:
    return pair()[0]


@pytest.fixture
def folder(pipeline: Any, tmp_path: Path) -> Path:
    """A saved pipeline."""
    pipeline.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def latents() -> torch.Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs a command in an empty folder; returns its exit status."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LATENTDIFF_DEBUG", "0")

    return partial(run_program, monkeypatch)
