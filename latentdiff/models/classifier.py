"""``NoisyClassifier``: the class of a noisy picture, by a UNet's way down and a pool.

ADM (Dhariwal & Nichol 2021), Sec. 4 and App. H. Its gradient with respect to the noisy picture guides a sampler.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import ModelMixin  # noqa: F401  diffusers' loader of pipelines looks for it beside the class
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from latentdiff.models.layers import merge_heads, norm_silu, split_heads, to_tokens
from latentdiff.models.single_file_networks import ReleasedNetwork
from latentdiff.models.time_embedding import TimeConditioned
from latentdiff.models.unet_blocks import UNetBuilder
from latentdiff.models.unet_config import plain_levels


class AttentionPool(nn.Module):
    """Attention of one token to all places: (B, C, H, W) -> (B, D). CLIP (Radford et al. 2021), Sec. 2.4."""

    def __init__(self, places: int, channels: int, heads: int, out_features: int) -> None:
        super().__init__()
        self.heads = heads
        self.position = nn.Parameter(torch.randn(1 + places, channels) / channels**0.5)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.Linear(channels, out_features)

    def forward(self, x: Tensor) -> Tensor:
        tokens = to_tokens(x)  # (B, HW, C)
        tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1) + self.position
        q = split_heads(self.to_q(tokens[:, :1]), self.heads)  # (B, N, 1, C/N)
        k, v = (split_heads(layer(tokens), self.heads) for layer in (self.to_k, self.to_v))
        return self.to_out(merge_heads(F.scaled_dot_product_attention(q, k, v))[:, 0])


class NoisyClassifier(ReleasedNetwork, TimeConditioned):
    """Logits of ``num_classes`` classes for noisy pixels or latents.

    The config is `UNet2DModel`'s as far as it concerns the way down and the middle. diffusers has no such class.

    Args:
        sample_size: height and width of the input; a pool of attention works at no other.
        pool: ``"attention"``, or ``"adaptive"``, the mean over all places.

    Raises:
        ValueError: a key is unknown or asks for what is not supported.
    """

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {"mid_block_type": ("UNetMidBlock2D",), "add_attention": (True,)}
    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        sample_size: int | Sequence[int] = 32,
        in_channels: int = 3,
        num_classes: int = 1000,
        time_embedding_dim: int | None = None,
        freq_shift: int = 0,
        flip_sin_to_cos: bool = True,
        down_block_types: Sequence[str] = ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        block_out_channels: Sequence[int] = (128, 256, 384),
        layers_per_block: int = 2,
        downsample_padding: int = 1,
        downsample_type: str = "resnet",
        dropout: float = 0.0,
        act_fn: str = "silu",
        attention_head_dim: int | Sequence[int] | None = 64,
        norm_num_groups: int = 32,
        attn_norm_num_groups: int | None = 32,
        norm_eps: float = 1e-5,
        resnet_time_scale_shift: str = "scale_shift",
        pool: str = "attention",
        **others: Any,
    ) -> None:
        super().__init__()
        self.accept_neutral(others)
        self.per_level("num_classes")
        self.check_choice("pool", ("attention", "adaptive"))
        levels, last = plain_levels(self), block_out_channels[-1]
        self.conv_in = nn.Conv2d(in_channels, block_out_channels[0], 3, padding=1)
        builder = UNetBuilder(self.config, levels, time_dim=self.build_time())
        self.down_blocks = builder.down_blocks()
        self.mid_block = builder.mid_block()
        self.conv_norm_out = nn.GroupNorm(norm_num_groups, last, norm_eps)
        if pool == "attention":
            sides = (sample_size, sample_size) if isinstance(sample_size, int) else tuple(sample_size)
            factor = self.downscale_factor
            self.check_multiple("sample_size", sides, factor, "the factor of its levels")
            places = (sides[0] // factor) * (sides[1] // factor)
            if levels.heads[-1] * levels.head_widths[-1] != last:
                self.refuse("attention_head_dim", attention_head_dim, f"does not divide the pool's {last} channels.")
            self.head: nn.Module = AttentionPool(places, last, levels.heads[-1], num_classes)
        else:
            self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, num_classes))

    def forward(self, sample: Tensor, timestep: Tensor | float) -> Tensor:
        """Noisy pixels or latents (B, C, H, W), timestep (one, or (B,)) -> logits (B, num_classes).

        Raises:
            ValueError: the sample has other channels, or another size where the pool has one.
        """
        self._check(sample)
        time = F.silu(self.embed_time(timestep, sample.device, sample.dtype))
        x = self.conv_in(sample)
        for block in self.down_blocks:
            x, _ = block(x, time)
        x = self.mid_block(x, time)
        return self.head(norm_silu(self.conv_norm_out, x))

    def log_probability_gradient(self, sample: Tensor, timestep: Tensor | float, class_labels: Tensor) -> Tensor:
        """The gradient of log p(class | sample) with respect to the sample, (B, C, H, W). ADM, Sec. 4.1, Alg. 1.

        class_labels: (B,) long.
        """
        with torch.enable_grad():
            sample = sample.detach().requires_grad_()
            chosen = F.log_softmax(self(sample, timestep).float(), dim=-1).gather(1, class_labels[:, None])
            return torch.autograd.grad(chosen.sum(), sample)[0]

    def _check(self, sample: Tensor) -> None:
        channels, size = self.config.in_channels, self.config.sample_size
        if sample.ndim != 4 or sample.shape[1] != channels:
            raise ValueError(f"NoisyClassifier: it takes (B, {channels}, H, W), and this is {tuple(sample.shape)}")
        sides = (size, size) if isinstance(size, int) else tuple(size)
        if self.config.pool == "attention" and tuple(sample.shape[2:]) != sides:
            raise ValueError(
                f"NoisyClassifier: it takes {sides[1]}x{sides[0]} and this is {sample.shape[3]}x{sample.shape[2]}; one "
                f"with pool='adaptive' takes any size"
            )
