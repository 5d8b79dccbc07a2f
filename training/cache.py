"""Latents and text states are encoded once and kept: the denoiser's training then never runs the other networks."""

import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from latentdiff.models import AutoencoderKL, VQModel
from latentdiff.training.data import CaptionedPicture, read_pixels

logger = logging.getLogger(__name__)

Autoencoder = AutoencoderKL | VQModel


class LatentCache:
    """Scaled latents of every picture, as mean and standard deviation of the encoder's posterior.

    Args:
        moments: (N, F, 2, C, h, w) float16; F is 2 where mirrored pictures are kept too, else 1.
    """

    def __init__(self, moments: Tensor) -> None:
        self.moments = moments

    def sample(self, indices: Sequence[int], generator: torch.Generator) -> Tensor:
        """Latents of these pictures, mirrored by chance where the cache has both, drawn anew. (B, C, h, w) float32"""
        flips = torch.randint(self.moments.shape[1], (len(indices),), generator=generator)
        mean, std = self.moments[torch.tensor(indices), flips].float().unbind(1)  # (B, C, h, w) each
        return mean + std * torch.randn(mean.shape, generator=generator)


class TextCache:
    """Text states of every distinct caption.

    Args:
        states: (M, L, D) float16, row i for `captions[i]`.
    """

    def __init__(self, captions: Sequence[str], states: Tensor) -> None:
        self.rows = {caption: i for i, caption in enumerate(captions)}
        self.states = states

    def __getitem__(self, captions: Sequence[str]) -> Tensor:
        """Text states of these captions, (B, L, D) float32."""
        return self.states[torch.tensor([self.rows[caption] for caption in captions])].float()


@torch.no_grad()
def encode_latents(
    pictures: Sequence[CaptionedPicture], autoencoder: Autoencoder, resolution: int, flip: bool, batch_size: int = 32
) -> Tensor:
    """Moments of the scaled latents of every picture, (N, F, 2, C, h, w) float16; see `LatentCache`."""
    device = next(autoencoder.parameters()).device
    scale = float(autoencoder.config.scaling_factor)
    chunks = []
    for start in tqdm(range(0, len(pictures), batch_size), desc="encoding pictures", dynamic_ncols=True):
        pixels = torch.stack([read_pixels(p, resolution) for p in pictures[start : start + batch_size]])
        views = [pixels, pixels.flip(-1)] if flip else [pixels]
        chunks.append(torch.stack([_moments(autoencoder.encode(v.to(device)), scale).cpu() for v in views], dim=1))
    return torch.cat(chunks)


def _moments(encoded: Any, scale: float) -> Tensor:
    """Scaled mean and standard deviation of an encoder's output, (B, 2, C, h, w) float16."""
    if hasattr(encoded, "latent_dist"):
        mean, std = encoded.latent_dist.mean, encoded.latent_dist.std
    else:  # a codebook's latents have no spread
        mean = encoded.latents
        std = torch.zeros_like(mean)
    return (torch.stack([mean, std], dim=1) * scale).half()


def cached(file: Path, make: Callable[[], Tensor]) -> Tensor:
    """The tensor kept in `file`, made and written (whole or not at all) where it is not there yet."""
    if not file.is_file():
        tensor = make()
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".partial-{os.getpid()}-{file.name}")
        save_file({"tensor": tensor.contiguous()}, partial)
        os.replace(partial, file)
        return tensor
    logger.info("using %s", file)
    return load_file(file)["tensor"]


def latents_key(pictures: Sequence[CaptionedPicture], autoencoder: Autoencoder, resolution: int, flip: bool) -> str:
    """Names what the latents depend on: the pictures' contents, the encoder's weights and the transform."""
    digest = hashlib.sha256(f"{resolution} {flip} {autoencoder.config.scaling_factor}".encode())
    _add_weights(digest, autoencoder)
    for picture in pictures:
        path = Path(picture.name)
        digest.update(picture.name.encode())
        if path.is_file():
            digest.update(path.read_bytes())
        else:
            with picture.open() as image:
                digest.update(image.tobytes())
    return digest.hexdigest()[:32]


def text_key(captions: Sequence[str], text_encoder: nn.Module, max_length: int) -> str:
    """Names what the text states depend on: the captions, the encoder's weights and the length."""
    digest = hashlib.sha256(str(max_length).encode())
    _add_weights(digest, text_encoder)
    for caption in captions:
        digest.update(caption.encode() + b"\0")
    return digest.hexdigest()[:32]


def _add_weights(digest: "hashlib._Hash", model: nn.Module) -> None:
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
