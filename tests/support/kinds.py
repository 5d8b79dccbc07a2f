"""Models of each kind that single files hold, with random weights, wide enough for shapes alone to tell the config."""

from typing import Any

import diffusers
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from latentdiff import (
    AutoencoderKL,
    InpaintPipeline,
    SuperResolutionPipeline,
    TextToImagePipeline,
    UNet2DConditionModel,
)

WIDE = {  # wide enough for 64 channels a head and 32 groups, so that shapes alone tell the config
    "sample_size": 8,
    "block_out_channels": [64, 128, 128],
    "layers_per_block": 2,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "cross_attention_dim": 16,
    "attention_head_dim": 8,
}
KINDS: dict[str, dict[str, Any]] = {
    "sd1": WIDE,
    "sd2": WIDE | {"use_linear_projection": True, "attention_head_dim": [1, 2, 2]},
    "inpainting": WIDE | {"in_channels": 9},
    "upscaler": WIDE
    | {
        "in_channels": 7,
        "use_linear_projection": True,
        "num_class_embeds": 20,
        "only_cross_attention": [False, True, False],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    },
    "uneven": WIDE | {"layers_per_block": [1, 2, 3], "transformer_layers_per_block": [1, 2, 1]},
}
VAE = {
    "block_out_channels": [32, 64],
    "layers_per_block": 2,
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "latent_channels": 4,
    "scaling_factor": 0.18215,
}


def text_parts(clip: dict[str, Any], act: str = "quick_gelu") -> dict[str, Any]:
    torch.manual_seed(5)
    config = {**clip["text_encoder"].config.to_dict(), "hidden_act": act}
    return {**clip, "text_encoder": CLIPTextModel(CLIPTextConfig(**config)).eval()}


def make_model(kind: str, clip: dict[str, Any]) -> Any:
    """A pipeline; `clip` has its tokenizer and says how wide its text encoder is."""
    torch.manual_seed(3)
    unet, vae = UNet2DConditionModel(**KINDS[kind]).eval(), AutoencoderKL(**VAE).eval()
    parts = text_parts(clip, "gelu" if kind in ("sd2", "upscaler") else "quick_gelu")
    scheduler = diffusers.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)
    if kind == "upscaler":
        noising = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
        pipeline: Any = SuperResolutionPipeline(vae, unet=unet, scheduler=scheduler, low_res_scheduler=noising, **parts)
    else:
        which = InpaintPipeline if kind == "inpainting" else TextToImagePipeline
        pipeline = which(vae, unet=unet, scheduler=scheduler, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def weights(pipeline: Any) -> dict[str, torch.Tensor]:
    """Of all networks."""
    return {
        f"{part}.{key}": tensor
        for part in ("unet", "vae", "text_encoder")
        for key, tensor in getattr(pipeline, part).state_dict().items()
    }


def same(ours: Any, theirs: Any) -> None:
    """Whether two sets of weights are equal, bit by bit."""
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert torch.equal(tensor, theirs[key]), key
