"""A CLIP of pictures and text with random weights, small enough for a test."""

from pathlib import Path

from tiny import clip_parts
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextConfig, CLIPVisionConfig

MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]


def save_clip(folder: Path) -> Path:
    """Write a transformers folder: pictures of 16 pixels, embeddings of 8 dimensions."""
    parts = clip_parts()
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    text = CLIPTextConfig(**{**parts["text_encoder"].config.to_dict(), "projection_dim": 8})
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    parts["tokenizer"].save_pretrained(folder)
    CLIPImageProcessor(image_mean=MEAN, image_std=STD, size=16, crop_size=16).save_pretrained(folder)
    return folder
