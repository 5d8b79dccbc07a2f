"""``Network``: what every model here is to diffusers."""

import logging
import os
from typing import Any

from diffusers import ModelMixin

from latentdiff.models.config import StrictConfig, downscale_factor
from latentdiff.models.loras import refuse_loras

logger = logging.getLogger(__name__)


class Network(ModelMixin, StrictConfig):
    """A diffusers model with a strict config, whose attention is PyTorch's ``scaled_dot_product_attention`` only."""

    @property
    def downscale_factor(self) -> int:
        """See `config.downscale_factor`."""
        return downscale_factor(self.config)

    @property
    def works_in_parts(self) -> bool:
        """Whether other methods than ``forward`` may be called by themselves.

        They may not after ``compile()``, which compiles ``forward`` only, nor under diffusers' group offloading, which
        loads weights in the course of a plain call only.
        """
        registry = getattr(self, "_diffusers_hook", None)
        in_groups = registry is not None and registry.get_hook("group_offloading") is not None
        return not in_groups and self._compiled_call_impl is None

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **options: Any) -> None:
        """As in diffusers.

        Raises:
            ValueError: there are LoRAs in the network, whose names no loader would understand.
        """
        refuse_loras({type(self).__name__: self}, "saved")
        super().save_pretrained(save_directory, *args, **options)

    def set_attention_backend(self, backend: str) -> None:
        """As in diffusers.

        Raises:
            ValueError: another backend than "native".
        """
        if backend != "native":
            raise ValueError(
                f"{type(self).__name__}: there is no attention backend {backend!r} but PyTorch's own, 'native'; within "
                f"torch.nn.attention.sdpa_kernel(...) you can choose among its kernels."
            )

    def set_use_memory_efficient_attention_xformers(self, valid: bool, attention_op: Any = None) -> None:
        if valid:
            logger.warning(
                "%s: attention is PyTorch's, which takes as little memory; xFormers is not used", type(self).__name__
            )
