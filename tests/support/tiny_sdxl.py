"""An SDXL pipeline of diffusers with random weights, small enough to draw and train in a test."""

from typing import Any

import diffusers
import torch
from tiny import VAE, clip_parts
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2),
    "cross_attention_dim": 16 + 24,
    "norm_num_groups": 8,
    "attention_head_dim": 2,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 20 + 6 * 8,
}


def tiny_sdxl(seed: int = 4) -> diffusers.StableDiffusionXLPipeline:
    """Its encoders are 16 and 24 wide, and the pooled embedding 20."""
    torch.manual_seed(seed)
    first, second = clip_parts(), clip_parts()
    config = CLIPTextConfig(
        **{**first["text_encoder"].config.to_dict(), "hidden_size": 24, "projection_dim": 20, "hidden_act": "gelu"}
    )
    return diffusers.StableDiffusionXLPipeline(
        vae=diffusers.AutoencoderKL(**VAE),
        **first,
        text_encoder_2=CLIPTextModelWithProjection(config),
        tokenizer_2=second["tokenizer"],
        unet=diffusers.UNet2DConditionModel(**UNET),
        scheduler=diffusers.EulerDiscreteScheduler(),
        add_watermarker=False,
    )


def tiny_refiner(base: diffusers.StableDiffusionXLPipeline) -> diffusers.StableDiffusionXLImg2ImgPipeline:
    """What goes on with the latents of `base`: with its autoencoder, and its second text encoder alone."""
    torch.manual_seed(5)
    unet = {**UNET, "cross_attention_dim": 24, "projection_class_embeddings_input_dim": 20 + 5 * 8}
    return diffusers.StableDiffusionXLImg2ImgPipeline(
        vae=base.vae,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=base.text_encoder_2,
        tokenizer_2=base.tokenizer_2,
        unet=diffusers.UNet2DConditionModel(**unet),
        scheduler=diffusers.EulerDiscreteScheduler(),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )
