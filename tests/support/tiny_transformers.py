"""Folders of diffusers' DiT and PixArt pipelines, with a few random weights."""

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from tiny import VAE, bert_parts
from transformers import T5Config, T5EncoderModel

SMALL = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "sample_size": 8, "out_channels": 8}


def parts(text: str) -> dict[str, Any]:
    found = bert_parts()
    if text == "t5":
        words = len(found["tokenizer"])
        config = T5Config(vocab_size=words, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, pad_token_id=0)
        found["text_encoder"] = T5EncoderModel(config).eval()
    return found


def randomized(network: Any) -> Any:
    for parameter in network.parameters():  # by default half of a transformer's are too small to show
        torch.nn.init.normal_(parameter, std=0.15)
    return network.eval()


def dit_folder(folder: Path, **config: Any) -> Path:
    """With names as ImageNet's have them."""
    torch.manual_seed(4)
    transformer = randomized(diffusers.DiTTransformer2DModel(**{**SMALL, **config}, num_embeds_ada_norm=1000))
    pipeline = diffusers.DiTPipeline(transformer, diffusers.AutoencoderKL(**VAE), diffusers.DDIMScheduler())
    pipeline.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["id2label"] = {str(i): f"thing {i}, item {i}" for i in range(1000)}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def pixart_folder(folder: Path, text: str = "t5", **config: Any) -> Path:
    torch.manual_seed(5)
    transformer = diffusers.PixArtTransformer2DModel(**{**SMALL, **config}, cross_attention_dim=24, caption_channels=16)
    pipeline = diffusers.PixArtAlphaPipeline(
        **parts(text),
        vae=diffusers.AutoencoderKL(**VAE),
        transformer=randomized(transformer),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )
    pipeline.save_pretrained(folder)
    return folder
