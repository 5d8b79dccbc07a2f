"""``UNet2DModel``: the denoiser without text of DDPM, Improved DDPM and ADM, with diffusers' names, keys and weights.

DDPM (Ho et al. 2020), App. B; Improved DDPM (Nichol & Dhariwal 2021); ADM (Dhariwal & Nichol 2021), Sec. 3: attention
at several resolutions, heads of fixed width, adaptive group normalisation (``resnet_time_scale_shift="scale_shift"``),
resnet blocks that halve and double (``"resnet"``), class embeddings.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import ModelMixin  # noqa: F401  diffusers' loader of pipelines looks for it beside the class
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from latentdiff.conditioning import Conditioning
from latentdiff.models.single_file_networks import ReleasedNetwork
from latentdiff.models.transformer import TextContext
from latentdiff.models.unet import UNet
from latentdiff.models.unet_config import plain_levels


class UNet2DModel(ReleasedNetwork, UNet):
    """Predicts noise (or v, or the picture), and maybe variances, from pixels or latents, a timestep and a class.

    The config is that of diffusers' class, and ``attention_head_dim`` is what it says, the width of a head (None: one
    head). Beyond diffusers' it may be a list, one for each level: heads of a fixed number, as Improved DDPM has them.
    ``downsample_type`` and ``upsample_type`` concern the blocks with attention; those without are named for theirs,
    ``DownBlock2D`` or ``ResnetDownsampleBlock2D``. With ``time_embedding_type="fourier"`` timesteps are noise levels,
    and the result is divided by them (score SDE, Song et al. 2021); with ``"learned"`` each of ``num_train_timesteps``
    has an embedding.

    Raises:
        ValueError: a key is unknown or asks for what is not supported.
    """

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "center_input_sample": (False,),
        "mid_block_scale_factor": (1,),
    }
    of_noise_levels = True
    _no_split_modules: ClassVar[list[str]] = ["ResnetBlock2D", "GridAttention", "UpBlock"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | Sequence[int] | None = None,
        in_channels: int = 3,
        out_channels: int = 3,
        time_embedding_dim: int | None = None,
        freq_shift: int = 0,
        flip_sin_to_cos: bool = True,
        down_block_types: Sequence[str] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        mid_block_type: str | None = "UNetMidBlock2D",
        up_block_types: Sequence[str] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        block_out_channels: Sequence[int] = (224, 448, 672, 896),
        layers_per_block: int = 2,
        downsample_padding: int = 1,
        downsample_type: str = "conv",
        upsample_type: str = "conv",
        dropout: float = 0.0,
        act_fn: str = "silu",
        attention_head_dim: int | Sequence[int] | None = 8,
        norm_num_groups: int = 32,
        attn_norm_num_groups: int | None = None,
        norm_eps: float = 1e-5,
        resnet_time_scale_shift: str = "default",
        add_attention: bool = True,
        class_embed_type: str | None = None,
        num_class_embeds: int | None = None,
        num_train_timesteps: int | None = None,
        time_embedding_type: str = "positional",
        **others: Any,
    ) -> None:
        super().__init__()
        self.accept_neutral(others)
        self.build(plain_levels(self))

    @property
    def works_in_parts(self) -> bool:
        """As every network's; but not where the result is divided by the timestep, which `denoise` does not know."""
        return super().works_in_parts and self.config.time_embedding_type != "fourier"

    def prepare(self, conditioning: Conditioning) -> TextContext:
        """Nothing: class labels are `embed_time`'s.

        Raises:
            ValueError: there are conditions that a UNet without text does not take.
        """
        unknown = [name for name, _ in conditioning.items() if name not in ("labels", "channels")]
        if unknown:
            raise ValueError(f"UNet2DModel: it takes no {', no '.join(unknown)}, but was given")
        return TextContext(())

    def prepared_by(self) -> list[nn.Module]:
        """See `network.Denoiser`."""
        return []

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[Tensor]:
        """Noisy pixels or latents (B, C, H, W), timestep (one, or (B,)), labels (B,) -> ``.sample`` (B, C', H, W).

        Raises:
            ValueError: labels are given and the UNet has no class embeddings, or the other way round.
        """
        levels = torch.as_tensor(timestep, device=sample.device).reshape(-1, 1, 1, 1)
        sample = self.denoise(sample, self.embed_time(timestep, sample.device, sample.dtype, class_labels))
        if self.config.time_embedding_type == "fourier":
            sample = (sample / levels).to(sample.dtype)
        return UNet2DOutput(sample=sample) if return_dict else (sample,)
