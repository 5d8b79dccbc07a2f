"""Pipelines and settings small enough to train in a test, with random weights."""

from pathlib import Path
from typing import Any

import diffusers
import torch
from transformers import BertConfig, BertModel, BertTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from latentdiff import AutoencoderKL, TextToImagePipeline, UNet2DConditionModel, VQModel
from latentdiff.training.settings import AutoencoderSettings

LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]
WORDS = ["thing", "red", "green", "blue", "yellow", "purple", "orange", "cup"]
UNET = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 16,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
}
VAE = {
    "block_out_channels": (8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "latent_channels": 4,
    "scaling_factor": 0.5,
}
SMALL = {"resolution": 16, "batch_size": 2, "warmup_steps": 1, "checkpoint_every": 2, "sample_every": 4}
AUTOENCODER = {**SMALL, "block_out_channels": (8, 16), "norm_num_groups": 4}
DENOISER = {
    **SMALL,
    "block_out_channels": (8, 16),
    "attention_levels": (False, True),
    "attention_head_dim": 8,
    "norm_num_groups": 4,
    "sample_steps": 2,
}


def autoencoder_settings(data: Path, output: Path, **changes: object) -> AutoencoderSettings:
    """Settings for an autoencoder of a few weights."""
    return AutoencoderSettings.load(None, {**AUTOENCODER, "data": str(data), "output": str(output), **changes})


def clip_parts(length: int = 12) -> dict[str, Any]:
    """A CLIP text encoder and a tokenizer that knows letters only."""
    tokens = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    config = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=length,
        bos_token_id=len(tokens) - 2,
        eos_token_id=len(tokens) - 1,
        pad_token_id=len(tokens) - 1,
    )
    tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=length)
    return {"tokenizer": tokenizer, "text_encoder": CLIPTextModel(config).eval()}


def bert_parts(length: int = 12) -> dict[str, Any]:
    """A BERT, whose padding is masked, with a tokenizer that knows letters and a few words."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS), *WORDS]
    config = BertConfig(
        vocab_size=len(tokens),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=length,
        use_attention_mask=True,
    )
    tokenizer = BertTokenizer(vocab={token: i for i, token in enumerate(tokens)}, model_max_length=length)
    return {"tokenizer": tokenizer, "text_encoder": BertModel(config).eval()}


def tiny_pipeline(text: str = "bert", autoencoder: str = "kl", **unet: Any) -> TextToImagePipeline:
    """A pipeline that draws 16 pixels; text: "bert" or "clip"; autoencoder: "kl" or "vq"."""
    torch.manual_seed(7)
    vae = AutoencoderKL(**VAE) if autoencoder == "kl" else VQModel(**VAE, num_vq_embeddings=16)
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        clip_sample=False,
        steps_offset=1,
    )
    parts = bert_parts() if text == "bert" else clip_parts()
    pipeline = TextToImagePipeline(vae, unet=UNet2DConditionModel(**{**UNET, **unet}), scheduler=scheduler, **parts)
    pipeline.register_defaults(num_inference_steps=2, guidance_scale=3.0)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: Any, prompt: str = "a red thing", **options: Any) -> torch.Tensor:
    """(1, 3, 16, 16) in [0, 1], from fixed noise; for diffusers' pipelines as well."""
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    options = {"num_inference_steps": 3, "guidance_scale": 3.0, **options}
    return pipeline(prompt, latents=noise, output_type="pt", **options).images
