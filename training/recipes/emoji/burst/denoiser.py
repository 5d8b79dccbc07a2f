"""The denoiser of one short run: v-prediction on latents that lie on the device with the states of their captions."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor

from latentdiff.diffusion.gaussian import GaussianDiffusion
from latentdiff.models import UNet2DConditionModel

from .clock import Clock, Log, autocast, averaged, descend, load_half, optimizer, repeated, save_half
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
        laid_out = noisy.contiguous(memory_format=torch.channels_last)  # always the same, for one compilation
        with autocast(noisy.device):
            prediction: Tensor = forward(laid_out, timesteps, states.float(), return_dict=False)[0]
        return prediction

    return network


def warm_up(
    unet: Any, settings: BurstSettings, batch: int, text_width: int, device: torch.device, compiled: bool
) -> Network:
    """The UNet as a function, compiled for what training runs if that can be done; the weights stay as they are.

    A UNet without gradients is compiled for drawing.
    """
    side = settings.latent_size
    noisy = torch.randn(batch, settings.latent_channels, side, side, device=device)
    states = torch.randn(batch, settings.tokens, text_width, device=device, dtype=torch.float16)
    timesteps = torch.randint(0, 1000, (batch,), device=device)
    learns = next(unet.parameters()).requires_grad
    network = as_network(unet, compiled)
    try:
        with torch.set_grad_enabled(learns):
            prediction = network(noisy, timesteps, states)
        if learns:
            prediction.square().mean().backward()
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
    log_file: Path,
    save_every: float = 120.0,
) -> None:
    """Train on latents (N, C, h, w) of deviation 1; the averaged weights go to `output/unet-*.safetensors`.

    The loss is the squared error of v by `noise_weights`. At the end `unet` has the averaged weights.
    """
    device, batch = latents.device, settings.unet_batch
    levels, log = Levels(process_of(settings), device), Log(log_file, "denoiser")
    adam = optimizer(unet, settings.unet_rate, settings.weight_decay)
    average = EMAModel(unet.parameters(), 0.999, foreach=True)
    clock = Clock(seconds, settings.unet_rate, warmup=300, fall=0.5)
    weights = noise_weights(levels, settings)
    noisy = torch.zeros(batch, *latents.shape[1:], device=device)
    states = torch.zeros(batch, *captions.states.shape[1:], device=device, dtype=captions.states.dtype)
    wanted, timesteps = torch.zeros_like(noisy), torch.zeros(batch, device=device, dtype=torch.long)
    running = torch.zeros((), device=device)

    def choose() -> None:
        index = torch.randint(0, len(latents), (batch,), device=device)
        states.copy_(captions.draw(index, settings.caption_dropout))
        clean, noise = latents[index].float(), torch.randn(noisy.shape, device=device)
        timesteps.random_(0, len(weights))
        alpha, sigma = levels(timesteps)
        noisy.copy_(alpha * clean + sigma * noise)
        wanted.copy_(alpha * noise - sigma * clean)

    def update() -> None:
        error = (network(noisy, timesteps, states).float() - wanted).square().mean((1, 2, 3))
        descend((weights[timesteps] * error).mean(), unet, adam)
        running.lerp_(error.detach().mean(), 0.01)

    choose()
    clock.begin_update(adam)
    go_on, saved = repeated(update, device), 0.0
    while not clock.over:
        choose()
        clock.begin_update(adam)
        go_on()
        average.step(unet.parameters())
        if clock.updates % 10 == 0:
            error = float(running)  # waits for the device, or the clock would run far behind it
            if clock.updates % 200 == 0:
                log(updates=clock.updates, samples=clock.updates * batch, error=error)
        if clock.share * seconds - saved > save_every:
            saved = clock.share * seconds
            with averaged(unet, average):
                save_half(unet.state_dict(), output, "unet")
    average.copy_to(unet.parameters())
    log(updates=clock.updates, samples=clock.updates * batch, error=float(running))
    save_half(unet.state_dict(), output, "unet")


def noise_weights(levels: Levels, settings: BurstSettings) -> Tensor:
    """How much the error of v counts at each timestep, (T,): min(SNR^(1/4), 1, gamma / SNR), or `least_weight`.

    Almost no noise shows details alone, and pure noise nothing of the picture; but what stands where, and which word
    belongs to which place, is settled where SNR is 0.003 to 0.3. Min-SNR's weight for v, min(SNR, gamma) / (SNR + 1)
    (Hang et al. 2023), is 0.003 to 0.24 there, and 0 where drawing begins.
    """
    snr = (levels.alpha[:-1] / levels.sigma[:-1].clamp(min=1e-8)).square()
    weights = torch.minimum(snr.pow(0.25).clamp(max=1), settings.snr_gamma / snr.clamp(min=1e-8))
    return weights.clamp(min=settings.least_weight)
