"""A denoiser as an extension: an MLP over patches (MLP-Mixer, Tolstikhin et al. 2021) that reads time and text."""

from types import SimpleNamespace
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

from latentdiff.codec import Codec
from latentdiff.diffusion import Process
from latentdiff.extensions import register_network
from latentdiff.training.settings import DenoiserSettings
from latentdiff.training.starting_networks import Conditions, register_denoiser


@register_network
class PatchMixer(ModelMixin, ConfigMixin):
    """Latents (B, C, h, w) of one size, in patches of 4 x 4."""

    downscale_factor = 4  # what the sides of latents must be multiples of
    works_in_parts = False  # sampling calls it as a whole at every step

    @register_to_config
    def __init__(
        self, sample_size: int = 8, in_channels: int = 4, out_channels: int = 4, width: int = 32, text_width: int = 16
    ) -> None:
        super().__init__()
        patches = (sample_size // self.downscale_factor) ** 2
        self.patches = nn.Conv2d(in_channels, width, self.downscale_factor, self.downscale_factor)
        self.condition = nn.Linear(text_width + 32, width)
        self.mix = nn.Sequential(nn.Linear(patches, patches), nn.GELU(), nn.Linear(patches, patches))
        self.think = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.pixels = nn.ConvTranspose2d(width, out_channels, self.downscale_factor, self.downscale_factor)

    def forward(self, sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, return_dict: bool = True) -> Any:
        side = self.config.sample_size
        if sample.shape[-2:] != (side, side):
            raise ValueError(f"this denoiser takes latents of {side} x {side}, not {tuple(sample.shape[-2:])}")
        times = torch.as_tensor(timestep, device=sample.device).reshape(-1).expand(len(sample))
        time = get_timestep_embedding(times, 32).to(sample)  # (B, 32)
        x = self.patches(sample)  # (B, D, h, w)
        x = x + self.condition(torch.cat([time, encoder_hidden_states.mean(1)], dim=1))[:, :, None, None]
        x = x + self.mix(x.flatten(2)).view_as(x)
        x = x + self.think(x.movedim(1, -1)).movedim(-1, 1)
        x = self.pixels(x)
        return SimpleNamespace(sample=x) if return_dict else (x,)


def build_mixer(
    settings: DenoiserSettings, codec: Codec, process: Process, conditions: Conditions, width: int = 32
) -> PatchMixer:
    """What ``denoiser=mixer`` makes; ``denoiser_options={width: 64}`` sets the width."""
    if conditions.text_width is None:
        raise ValueError("denoiser=mixer is for condition=text")
    channels = codec.channels
    side = settings.resolution // codec.factor
    return PatchMixer(side, channels, process.prediction_channels(channels), width, conditions.text_width)


register_denoiser("mixer", build_mixer)
