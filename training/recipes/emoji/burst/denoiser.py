"""The denoiser of one short run: v-prediction on latents that lie on the device with the states of their captions."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor

from latentdiff.diffusion.gaussian import GaussianDiffusion
from latentdiff.models import UNet2DConditionModel

from .clock import Clock, Log, apply_update, autocast, averaged, load_half, optimizer, save_half
from .sampling import Levels, Network
from .settings import BurstSettings


@dataclass
class Captions:
    """Text states of all captions of a pool.

    Attributes:
        states: (M, L, D) float16; the last row is that of no prompt.
        first: (N,) long, where each picture's captions begin; they follow one another.
        counts: (N,) long.
    """

    states: Tensor
    first: Tensor
    counts: Tensor

    def draw(self, pictures: Tensor, dropout: float, generator: torch.Generator | None = None) -> Tensor:
        """A caption of each picture (B,), the first most often, or none in the share `dropout`: (B, L, D)."""
        uniform = torch.rand(3, len(pictures), device=pictures.device, generator=generator)
        counts = self.counts[pictures]
        other = (uniform[0] * counts).long().clamp(max=counts - 1)
        row = self.first[pictures] + torch.where(uniform[1] < 0.35, 0, other)
        return self.states[torch.where(uniform[2] < dropout, len(self.states) - 1, row)]

    @property
    def empty(self) -> Tensor:
        return self.states[-1:]


def process_of(settings: BurstSettings) -> GaussianDiffusion:
    return GaussianDiffusion.from_scheduler_config(settings.scheduler_config())


def build(settings: BurstSettings, text_width: int, device: torch.device) -> UNet2DConditionModel:
    """A new UNet whose last layer, and last layer of every residual and attention block, begin at zero (ADM)."""
    torch.manual_seed(settings.seed)
    unet = UNet2DConditionModel(**settings.unet_config(text_width))
    torch.nn.init.zeros_(unet.conv_out.weight)
    for name, parameter in unet.named_parameters():
        if name.endswith(("conv2.weight", "proj_out.weight")):
            torch.nn.init.zeros_(parameter)
    return unet.to(device, memory_format=torch.channels_last)


def load(settings: BurstSettings, text_width: int, folders: list[Path], device: torch.device, name: str) -> Any:
    unet = UNet2DConditionModel(**settings.unet_config(text_width))
    unet.load_state_dict(load_half(folders, name))
    return unet.to(device, memory_format=torch.channels_last)


def as_network(unet: Any, compiled: bool) -> Network:
    """The UNet as a function of tensors, one graph of it if compiled."""
    forward = torch.compile(unet.forward, fullgraph=True, dynamic=False) if compiled else unet.forward

    def network(noisy: Tensor, timesteps: Tensor, states: Tensor) -> Tensor:
        with autocast(noisy.device):
            prediction: Tensor = forward(noisy, timesteps, states.float(), return_dict=False)[0]
        return prediction

    return network


def warm_up(unet: Any, settings: BurstSettings, text_width: int, device: torch.device, compiled: bool) -> Network:
    """The UNet as a function, compiled for what training runs if that can be done; the weights stay as they are."""
    batch, side = settings.unet_batch, settings.latent_size
    noisy = torch.randn(batch, settings.latent_channels, side, side, device=device)
    states = torch.randn(batch, settings.tokens, text_width, device=device, dtype=torch.float16)
    timesteps = torch.randint(0, 1000, (batch,), device=device)
    network = as_network(unet, compiled)
    try:
        network(_channels_last(noisy), timesteps, states).square().mean().backward()
    except Exception as error:  # compilers fail in many ways, and a run that cannot be repeated goes on without
        if not compiled:
            raise
        print(f"not compiled: {type(error).__name__}: {str(error)[:500]}", flush=True)
        network = as_network(unet, False)
    unet.zero_grad(set_to_none=True)
    return network


def train(
    unet: Any,
    network: Network,
    latents: Tensor,
    captions: Captions,
    settings: BurstSettings,
    seconds: float,
    output: Path,
    save_every: float = 120.0,
) -> None:
    """Train on latents (N, C, h, w) of deviation 1; the averaged weights go to `output/unet-*.safetensors`.

    The loss is the squared error of v weighted by min(SNR, gamma) / (SNR + 1) (Min-SNR, Hang et al. 2023). At the end
    `unet` has the averaged weights.
    """
    device = latents.device
    levels = Levels(process_of(settings), device)
    log = Log(output / "log.jsonl", "denoiser")
    adam = optimizer(unet, settings.unet_rate, settings.weight_decay)
    average = EMAModel(unet.parameters(), 0.999, foreach=True)
    clock = Clock(seconds, settings.unet_rate, warmup=300, fall=0.5)
    snr = (levels.alpha / levels.sigma.clamp(min=1e-8)).square()
    weights = snr.clamp(max=settings.min_snr_gamma) / (snr + 1)
    saved, running = 0.0, torch.zeros((), device=device)
    while not clock.over:
        index = torch.randint(0, len(latents), (settings.unet_batch,), device=device)
        states = captions.draw(index, settings.caption_dropout)
        clean, noise = latents[index].float(), torch.randn(index.shape + latents.shape[1:], device=device)
        timesteps = torch.randint(0, 1000, index.shape, device=device)
        alpha, sigma = levels(timesteps)
        velocity = network(_channels_last(alpha * clean + sigma * noise), timesteps, states).float()
        error = (velocity - (alpha * noise - sigma * clean)).square().mean((1, 2, 3))
        loss = (weights[timesteps] * error).mean()
        apply_update(loss, unet, adam, clock)
        average.step(unet.parameters())
        running = torch.lerp(running, error.detach().mean(), 0.01)
        if clock.updates % 200 == 0:
            log(updates=clock.updates, samples=clock.updates * settings.unet_batch, error=float(running))
        if clock.share * seconds - saved > save_every:
            saved = clock.share * seconds
            with averaged(unet, average):
                save_half(unet.state_dict(), output, "unet")
    average.copy_to(unet.parameters())
    log(updates=clock.updates, samples=clock.updates * settings.unet_batch, error=float(running))
    save_half(unet.state_dict(), output, "unet")


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)
