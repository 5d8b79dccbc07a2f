"""A quantity of every timestep, looked up by timestep: float64, copied once to each device and dtype it is used in."""

import torch
from torch import Tensor


class Table:
    """T numbers, (T,) float64 on the CPU."""

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self._copies: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def __len__(self) -> int:
        return len(self.values)

    def on(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """(T,), the same tensor at every call."""
        if torch.compiler.is_compiling():  # a compiled graph keeps nothing outside itself
            return self.values.to(device, dtype)
        if (device, dtype) not in self._copies:
            with torch.inference_mode(False):  # so that what is made here can be used in training later
                self._copies[device, dtype] = self.values.to(device, dtype)
        return self._copies[device, dtype]

    def at(self, timesteps: Tensor, like: Tensor) -> Tensor:
        """The entries at timesteps (B,), as (B, 1, ...) in the dtype and on the device of `like` (B, ...)."""
        return self.on(like.device, like.dtype)[timesteps].view(-1, *[1] * (like.ndim - 1))

    def __getstate__(self) -> dict[str, Tensor]:
        return {"values": self.values}

    def __setstate__(self, state: dict[str, Tensor]) -> None:
        self.values, self._copies = state["values"], {}
