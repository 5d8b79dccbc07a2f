"""The autoencoder of one short run: L1, perceptual distance and a little KL, with latents that halve as pictures do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file
from torch import Tensor

from latentdiff.models import AutoencoderKL
from latentdiff.training.objectives.perceptual import PerceptualLoss, efficientnet

from .clock import Clock, Log, apply_update, autocast, load_half, optimizer, save_half
from .pool import Pool
from .settings import BurstSettings

CHECKED = 256  # pictures of the pool that are measured and never trained on

Distance = Callable[[Tensor, Tensor], Tensor]


def train(
    pool: Pool, settings: BurstSettings, seconds: float, device: torch.device, output: Path, perceptual: Distance | None
) -> AutoencoderKL:
    """Train for so many seconds on what the pool has by then; writes `output/vae-*.safetensors`."""
    torch.manual_seed(settings.seed)
    model = AutoencoderKL(**settings.autoencoder_config()).to(device, memory_format=torch.channels_last)
    log = Log(output / "log.jsonl", "autoencoder")
    adam = optimizer(model, settings.autoencoder_rate)
    pool.wait(min(1.0, max(0.02, 2 * CHECKED / len(pool.ready))))
    average = EMAModel(model.parameters(), 0.999, foreach=True)
    clock = Clock(seconds, settings.autoencoder_rate)
    numbers = np.random.default_rng(settings.seed)
    ready = np.empty(0, dtype=np.int64)
    while not clock.over:
        if clock.updates % 100 == 0:
            ready = np.flatnonzero(pool.ready[CHECKED:]) + CHECKED
        pixels = pixels_of(pool, numbers.choice(ready, settings.autoencoder_batch), device)
        with autocast(device):
            loss, parts = objective(model, pixels, settings, perceptual, numbers.random() < settings.equivariance)
        apply_update(loss, model, adam, clock)
        average.step(model.parameters())
        if clock.updates % 100 == 0:
            log(updates=clock.updates, samples=clock.updates * settings.autoencoder_batch, **floats(parts))
    average.copy_to(model.parameters())
    log(updates=clock.updates, samples=clock.updates * settings.autoencoder_batch, psnr=psnr(model, pool, device))
    save_half(model.state_dict(), output, "vae")
    return model.eval()


def load(settings: BurstSettings, folders: list[Path], device: torch.device) -> AutoencoderKL:
    """The autoencoder that `train` wrote into the first of these folders that has one."""
    model = AutoencoderKL(**settings.autoencoder_config())
    model.load_state_dict(load_half(folders, "vae"))
    return model.to(device, memory_format=torch.channels_last).eval()


def objective(
    model: Any, pixels: Tensor, settings: BurstSettings, perceptual: Distance | None, halve: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss for pixels (B, 3, H, W) in [-1, 1], and its parts.

    halve: decode the latents at half their size to the picture at half its size, so that coarse latents mean coarse
        pictures; denoisers learn such latents more easily (EQ-VAE, Kouzelis et al. 2025).
    """
    mean, log_variance = model.encode_moments(pixels).float().chunk(2, dim=1)  # (B, C, h, w)
    log_variance = log_variance.clamp(-20, 10)
    latents = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
    if halve:
        latents, pixels = F.avg_pool2d(latents, 2), F.avg_pool2d(pixels, 2)
    decoded = model.decode_latents(latents).float()
    # Auto-Encoding Variational Bayes (Kingma & Welling 2014), App. B, a mean over places and channels
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    parts = {"l1": (decoded - pixels).abs().mean(), "kl": kl}
    loss = parts["l1"] + settings.kl_weight * kl
    if perceptual is not None:
        parts["perceptual"] = perceptual(decoded, pixels)
        loss = loss + settings.perceptual_weight * parts["perceptual"]
    return loss, parts


@torch.no_grad()
def encode_pool(model: Any, pool: Pool, device: torch.device, batch: int = 512) -> Tensor:
    """The means of every picture's latents, (N, C, h, w) float16, on the CPU; their deviation is not 1."""
    pool.wait(1.0)
    parts = []
    for start in range(0, len(pool.ready), batch):
        index = np.arange(start, min(start + batch, len(pool.ready)))
        with autocast(device):
            moments = model.encode_moments(pixels_of(pool, index, device))
        parts.append(moments.float().chunk(2, dim=1)[0].half().cpu())
    return torch.cat(parts)


@torch.no_grad()
def decode(model: Any, latents: Tensor, device: torch.device) -> Tensor:
    """Latents (B, C, h, w), not scaled, to pictures (B, H, W, 3) uint8."""
    with autocast(device):
        pixels = model.decode_latents(latents)
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu()


def pixels_of(pool: Pool, index: np.ndarray, device: torch.device) -> Tensor:
    """Pictures of the pool as (B, 3, H, W) in [-1, 1]."""
    chosen = torch.from_numpy(pool.pictures[index])
    if device.type == "cuda":
        chosen = chosen.pin_memory().to(device, non_blocking=True)
    pixels = chosen.permute(0, 3, 1, 2).float() / 127.5 - 1
    return pixels.contiguous(memory_format=torch.channels_last)


def psnr(model: Any, pool: Pool, device: torch.device) -> float:
    """Mean PSNR in dB of the pictures that are kept apart."""
    return mean_psnr(model, pixels_of(pool, np.flatnonzero(pool.ready[:CHECKED]), device))


@torch.no_grad()
def mean_psnr(model: Any, pixels: Tensor, batch: int = 64) -> float:
    """Mean PSNR in dB of pixels (B, 3, H, W) reconstructed from the means of their latents."""
    found = []
    for part in pixels.split(batch):
        decoded = model.decode_latents(model.encode_moments(part).chunk(2, dim=1)[0]).clamp(-1, 1)
        found.append(-10 * ((decoded - part) / 2).square().mean((1, 2, 3)).clamp(min=1e-10).log10())
    return float(torch.cat(found).mean())


def floats(parts: dict[str, Tensor]) -> dict[str, float]:
    return {name: float(value.detach()) for name, value in parts.items()}


def packed_perceptual(features: Path) -> PerceptualLoss:
    """The distance by the stages of EfficientNet-lite0 that `pack.pack_features` wrote."""
    loss = PerceptualLoss(efficientnet(load_file(features)))
    loss.network.to(memory_format=torch.channels_last)
    return loss
