"""How much of a GPU's memory drawing and fine-tuning take, computed from the networks' shapes; no GPU is needed.

    python benchmarks/gpu_memory.py

What is counted: weights in float32 with their copies in bfloat16, as autocast makes them, gradients, Adam's two means,
and what the UNet keeps of a forward pass in bfloat16 for the backward one, by running it on the device "meta". What is
not: CUDA itself (about half a GiB), the buffers of single operations, what is computed again under checkpointing, what
the allocator leaves unused, and averaged weights (ema_decay: 4 bytes a weight). Text encoder and autoencoder are not on
the GPU in training: what they give is cached.

A second table has what drawing needs besides the weights: the most bytes of tensors alive at once, in float16, in a
guided step of the UNet and in decoding, likewise found on the device "meta". Convolutions' own buffers are not counted.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from latentdiff import AutoencoderKL, UNet2DConditionModel
from latentdiff.interchange.folders import packaged_model

SD1 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SD2 = {
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}
MODELS: dict[str, tuple[Any, int, float, float]] = {
    # config of the UNet, tokens, and parameters in millions of text encoder and autoencoder
    "Stable Diffusion 1, 512x512": (SD1, 77, 123.1, 83.7),
    "Stable Diffusion 2, 768x768": (SD2, 77, 340.4, 83.7),
    "the packaged model, 128x128": (packaged_model() / "unet", 32, 22.6, 0.0),
}
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "sample_size": 512,
}
BATCHES = (1, 4)
GIB = 2**30


class Attention(torch.autograd.Function):
    """What fused attention keeps: its inputs and its output."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out)
        return out


@contextlib.contextmanager
def kept() -> Iterator[list[int]]:
    """Bytes that are kept for a backward pass within, each storage once."""
    sizes: list[int] = []
    seen: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if not isinstance(tensor, nn.Parameter) and storage._cdata not in seen:
            seen[storage._cdata] = storage
            sizes.append(storage.nbytes())
        return tensor

    usual = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = lambda q, k, v, *rest, **more: Attention.apply(q, k, v)
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            yield sizes
    finally:
        F.scaled_dot_product_attention = usual


def make_unet(config: Any) -> UNet2DConditionModel:
    if isinstance(config, Path):
        config = UNet2DConditionModel.load_config(config)
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(config).train()


def activations(unet: UNet2DConditionModel, tokens: int, batch: int) -> int:
    """Bytes that a forward pass in bfloat16 keeps."""
    config = unet.config
    nn.Module.to(unet, dtype=torch.bfloat16)  # diffusers' own warns
    size = config.sample_size
    latents = torch.empty(
        batch, config.in_channels, size, size, device="meta", dtype=torch.bfloat16, requires_grad=True
    )
    states = torch.empty(batch, tokens, config.cross_attention_dim, device="meta", dtype=torch.bfloat16)
    with kept() as sizes:
        unet(latents, torch.empty(batch, device="meta"), encoder_hidden_states=states)
    return sum(sizes)


def row(name: str) -> str:
    config, tokens, text, vae = MODELS[name]
    unet = make_unet(config)
    total = sum(one.numel() for one in unet.parameters())
    draw = 2 * (total + 1e6 * (text + vae))
    found = [draw / GIB, 2 * draw / GIB]
    for lora, checkpointing in ((True, False), (True, True), (False, True)):
        for batch in BATCHES:
            unet = make_unet(config)
            trained = total
            if lora:
                unet.requires_grad_(False)
                unet.add_adapter(LoraConfig(r=16, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
                trained = sum(one.numel() for one in unet.parameters() if one.requires_grad)
            if checkpointing:
                unet.enable_gradient_checkpointing()
            weights = 4 * sum(one.numel() for one in unet.parameters())
            copies = weights / 2
            found.append((weights + copies + 3 * 4 * trained + activations(unet, tokens, batch)) / GIB)
    return f"| {name} | " + " | ".join(f"{value:.1f}" for value in found) + " |"


class Alive(TorchDispatchMode):
    """Bytes of the tensors made within that are alive, and the most there were."""

    now = most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given = {
            tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)
        }
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                size = tensor.untyped_storage().nbytes()
                self.now += size
                self.most = max(self.most, self.now)
                weakref.finalize(tensor.untyped_storage(), self.freed, size)
        return found

    def freed(self, size: int) -> None:
        self.now -= size


@torch.no_grad()
def peak(work: Callable[[], Any]) -> float:
    """GiB of tensors alive at once in `work`."""
    usual = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = lambda q, k, v, *rest, **more: q.new_empty(*q.shape[:-1], v.shape[-1])
    try:
        with Alive() as alive:
            work()
    finally:
        F.scaled_dot_product_attention = usual
    return alive.most / GIB


def drawing_row(batch: int) -> str:
    """Stable Diffusion 1 at 512x512: a guided step, and decoding whole, one by one, and in tiles."""
    half = {"device": "meta", "dtype": torch.float16}
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel(**SD1).eval(), AutoencoderKL(**VAE).eval()
    for network in (unet, vae):
        nn.Module.to(network, dtype=torch.float16)
    latents, states = torch.empty(batch, 4, 64, 64, **half), torch.empty(2 * batch, 77, 768, **half)
    time, text = unet.embed_time(torch.empty((), device="meta")), unet.encode_text(states)
    found = [peak(lambda: unet.denoise(torch.cat([latents] * 2), time, text))]
    for prepare in (lambda: None, vae.enable_slicing, vae.enable_tiling):
        prepare()
        found.append(peak(lambda: vae.decode(latents)))
    return f"| {batch} | " + " | ".join(f"{value:.2f}" for value in found) + " |"


if __name__ == "__main__":
    heads = ["model", "drawing, float16", "float32"]
    heads += [
        f"{what}, batch {batch}" for what in ("LoRA", "LoRA, checkpointing", "full, checkpointing") for batch in BATCHES
    ]
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    for model in MODELS:
        print(row(model))
    heads = ["pictures at once", "a guided step", "decoding", "with enable_slicing()", "and enable_tiling()"]
    print("\n| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    for pictures in (1, 4, 8):
        print(drawing_row(pictures))
