"""A BLIP with random weights, which captions pictures of 32 pixels."""

from pathlib import Path

import torch

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "a", "red", "cup"]


def save_blip(folder: Path) -> Path:
    from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor

    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": 5, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    text = {**size, **ids, "vocab_size": len(WORDS), "encoder_hidden_size": 16, "max_position_embeddings": 99}
    vision = {**size, "image_size": 32, "patch_size": 16}
    torch.manual_seed(0)
    blip = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    tokenizer = BertTokenizer(vocab={token: i for i, token in enumerate(WORDS)})
    blip.save_pretrained(folder)
    BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    return folder
