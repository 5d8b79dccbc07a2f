"""Networks of released sizes with random weights, ours and diffusers' with the same ones, for `gpu.py`."""

from collections.abc import Callable
from typing import Any

import diffusers
import torch

from latentdiff import UNet2DConditionModel
from latentdiff.conditioning import Conditioning
from latentdiff.models import DiTTransformer2DModel, PixArtTransformer2DModel

Work = Callable[[], Any]
POOLED = 1280  # width of SDXL's pooled text states
SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": POOLED + 6 * 256,
}
REFINER = {
    **SDXL,
    "block_out_channels": (384, 768, 1536, 1536),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": 4,
    "attention_head_dim": (6, 12, 24, 24),
    "cross_attention_dim": 1280,
    "projection_class_embeddings_input_dim": POOLED + 5 * 256,
}
XL = {"num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 28, "out_channels": 8}
PIXART = {**XL, "sample_size": 128, "cross_attention_dim": 1152, "caption_channels": 4096}
NETWORKS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "SDXL, 1024x1024": (UNet2DConditionModel, diffusers.UNet2DConditionModel, SDXL),
    "SDXL's refiner, 1024x1024": (UNet2DConditionModel, diffusers.UNet2DConditionModel, REFINER),
    "DiT-XL/2, 256x256": (
        DiTTransformer2DModel,
        diffusers.DiTTransformer2DModel,
        {**XL, "sample_size": 32, "num_embeds_ada_norm": 1000},
    ),
    "PixArt-alpha, 1024x1024": (PixArtTransformer2DModel, diffusers.PixArtTransformer2DModel, PIXART),
}


def small(config: dict[str, Any]) -> dict[str, Any]:
    """A few weights in the same arrangement."""
    if "block_out_channels" not in config:
        return {**config, "sample_size": 8, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2} | (
            {"cross_attention_dim": 24, "caption_channels": 16} if "caption_channels" in config else {}
        )
    levels = len(config["block_out_channels"])
    changed = {"sample_size": 16, "block_out_channels": (16,) * levels, "attention_head_dim": 4, "norm_num_groups": 8}
    changed |= {"transformer_layers_per_block": 1, "cross_attention_dim": 32}
    return {**config, **changed}


class Networks:
    """Ours and diffusers' of one kind, which share their weights."""

    def __init__(self, name: str, device: torch.device, dtype: torch.dtype, tiny: bool) -> None:
        kind, other, config = NETWORKS[name]
        self.config = small(config) if tiny else config
        torch.manual_seed(0)
        with device:
            self.ours, self.theirs = kind(**self.config), other(**self.config)
        self.theirs.load_state_dict(self.ours.state_dict(), assign=True)
        for network in (self.ours, self.theirs):
            torch.nn.Module.to(network, dtype=dtype).eval().requires_grad_(False)  # diffusers' own warns
        self.theirs.load_state_dict(self.ours.state_dict(), assign=True)
        self.options: dict[str, Any] = {"device": device, "dtype": dtype}

    def steps(self, batch: int) -> dict[str, Work]:
        """One call of each for `batch` pictures with guidance, as its pipeline makes it in the loop."""
        config, side = self.config, self.config["sample_size"]
        latents = torch.randn(2 * batch, 4, side, side, **self.options)
        time = torch.tensor(500, device=self.options["device"])
        times = time.expand(2 * batch)  # diffusers' transformers take one for each
        if "addition_embed_type" in config:
            states = torch.randn(2 * batch, 77, config["cross_attention_dim"], **self.options)
            numbers = (config["projection_class_embeddings_input_dim"] - POOLED) // 256
            pooled = torch.randn(2 * batch, POOLED, **self.options)
            sizes = torch.full((2 * batch, numbers), 1024.0, **self.options)
            given = Conditioning(states, pooled=pooled, time_ids=sizes)
            theirs = {
                "encoder_hidden_states": states,
                "added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes},
                "timestep": time,
            }
        elif "caption_channels" in config:
            states = torch.randn(2 * batch, 120, config["caption_channels"], **self.options)
            given = Conditioning(states)
            none = {"resolution": None, "aspect_ratio": None}
            theirs = {"encoder_hidden_states": states, "timestep": times, "added_cond_kwargs": none}
        else:
            labels = torch.zeros(2 * batch, dtype=torch.long, device=self.options["device"])
            given, theirs = Conditioning(labels=labels), {"class_labels": labels, "timestep": times}
        ours, other = self.ours, self.theirs
        with torch.inference_mode():
            prepared = ours.prepare(given)
        return {
            "diffusers": lambda: other(latents, return_dict=False, **theirs)[0],
            "ours": lambda: ours.denoise(latents, ours.embed_time(time), prepared),
        }
