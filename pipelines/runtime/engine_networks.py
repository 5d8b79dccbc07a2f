"""Networks that a runtime runs, with the methods by which pipelines call those of torch."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import numpy as np
import torch
from diffusers import ConfigMixin, ModelMixin
from torch import Tensor

from latentdiff.models.network import downscale_factor
from latentdiff.pipelines.runtime.choice import Runtime
from latentdiff.pipelines.runtime.engines import Engine


class RuntimeNetwork(ModelMixin, ConfigMixin):
    """A network whose graphs lie in files. It has no weights that torch could see, and takes and gives float32.

    Args:
        runtime: what runs it.
        folder: of the graphs, see `prepared`.
        part: the subfolder with the config.
    """

    config_name = "config.json"

    def __init__(self, runtime: Runtime, folder: Path, part: str) -> None:
        super().__init__()
        self.runtime, self.folder = runtime, folder
        config = json.loads((folder / part / "config.json").read_text(encoding="utf-8"))
        self.register_to_config(**{key: value for key, value in config.items() if not key.startswith("_")})
        self.engines: dict[str, Engine] = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            raise AttributeError(
                f"{type(self).__name__} has no {name}: its network is run by {self.__dict__['runtime'].kind.title}; "
                f"load the pipeline without runtime= for that"
            ) from None

    @property
    def dtype(self) -> torch.dtype:
        """Of what goes in and out."""
        return torch.float32

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def to(self, *args: Any, **options: Any) -> Self:
        """Raises ValueError for another device than the CPU, or another dtype than that of what goes in and out."""
        device, dtype, *_ = torch._C._nn._parse_to(*args, **options)
        if device is not None and device.type != "cpu":
            raise ValueError(f"the runtime {self.runtime.name} computes on the processor, and not on {device}")
        if dtype not in (None, torch.float32):
            raise ValueError(f"the precision of a runtime is chosen when it is loaded: from_pretrained(dtype={dtype})")
        return self

    def save_pretrained(self, *args: Any, **options: Any) -> None:
        """Raises ValueError: the weights are in another form."""
        raise ValueError(refusal(self, "saved"))

    def run(self, part: str, **tensors: Tensor) -> list[Tensor]:
        """What the graph in a subfolder gives for these tensors, each brought to the type that it takes."""
        given = {name: array_of(tensor) for name, tensor in tensors.items()}
        return [torch.from_numpy(np.asarray(one, dtype=np.float32)) for one in self.engine(part)(given)]

    def engine(self, part: str) -> Engine:
        """Of the graph in a subfolder; opened when it is first used."""
        if part not in self.engines:
            kind, runtime = self.runtime.kind, self.runtime
            options = (runtime.precision_of(part), torch.get_num_threads(), runtime.shape is not None)
            self.engines[part] = kind.open(self.folder / part / kind.file, *options)
        return self.engines[part]


class RuntimeUNet(RuntimeNetwork):
    """The denoiser. It is called as a whole: what depends on the prompt only is a small part of it."""

    def __init__(self, runtime: Runtime, folder: Path, factor: int = 1) -> None:
        """factor: pixels per latent, of the autoencoder."""
        super().__init__(runtime, folder, "unet")
        self.factor = factor

    @property
    def downscale_factor(self) -> int:
        return downscale_factor(self.config)

    def forward(
        self, sample: Tensor, timestep: Tensor | float, return_dict: bool = True, **conditions: Any
    ) -> tuple[Tensor] | SimpleNamespace:
        """As that of the network in torch: (B, C, h, w), one timestep, conditions by name -> (B, C', h, w).

        Raises:
            ValueError: a condition that the graph has no input for, or lacks; a shape that it was not made for.
        """
        self._check_shape(sample)
        conditions |= conditions.pop("added_cond_kwargs", None) or {}
        given: dict[str, Any] = {name: value for name, value in conditions.items() if value is not None}
        if "encoder_attention_mask" in given:
            given["encoder_attention_mask"] = given["encoder_attention_mask"].float()
        if "class_labels" in given:
            given["class_labels"] = given["class_labels"].to(self._label_dtype())
        times = torch.as_tensor(timestep, dtype=torch.float32).reshape(-1)
        if len(times) > 1 and (times != times[0]).any():
            raise ValueError("a runtime's denoiser takes one timestep for the whole batch")
        predicted = self.run("unet", sample=sample, timestep=times[:1], **given)[0].to(sample.device)
        return SimpleNamespace(sample=predicted) if return_dict else (predicted,)

    def _label_dtype(self) -> torch.dtype:
        return torch.int64 if self.config.get("class_embed_type") is None else torch.float32

    def _check_shape(self, sample: Tensor) -> None:
        shape = self.runtime.shape
        if shape is None:
            return
        count, *sides = shape
        given = [side * self.factor for side in sample.shape[-2:]]
        if given != sides or len(sample) not in (count, 2 * count):  # guided, both sides are one batch
            raise ValueError(
                f"this pipeline was loaded for {count} pictures of {sides[1]} x {sides[0]} pixels (width x height) a "
                f"call, and is asked for {given[1]} x {given[0]} and a batch of {len(sample)}; load it with another "
                f"runtime_shape, or without"
            )


class RuntimeAutoencoder(RuntimeNetwork):
    """The autoencoder. Its latents are in the scale of ONNX's layout, as its config says."""

    def __init__(self, runtime: Runtime, folder: Path) -> None:
        super().__init__(runtime, folder, "vae_decoder")

    def decode(self, z: Tensor, return_dict: bool = True, **ignored: None) -> tuple[Tensor] | SimpleNamespace:
        """(B, C, h, w) -> (B, 3, H, W)."""
        pixels = self.run("vae_decoder", latent_sample=z)[0].to(z.device)
        return SimpleNamespace(sample=pixels) if return_dict else (pixels,)

    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        """(B, 3, H, W) -> ``latent_dist`` with ``mean`` and ``std``, or ``latents``; (B, C, h, w)."""
        mean, *parameters = (one.to(x.device) for one in self.run("vae_encoder", sample=x))
        if not parameters:
            encoded = SimpleNamespace(latents=mean)
        else:
            std = (parameters[0].chunk(2, dim=1)[1] / 2).exp()
            encoded = SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, std=std))
        return encoded if return_dict else tuple(vars(encoded).values())


def array_of(tensor: Tensor) -> np.ndarray:
    """In main memory; numbers of floating point as float32."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


def refusal(network: RuntimeNetwork, what: str) -> str:
    """Why something cannot be done, and what to do."""
    return (
        f"a pipeline that {network.runtime.kind.title} runs cannot be {what}: load it without runtime= for that, save "
        f"it with save_pretrained(), and load what was saved with runtime={network.runtime.name!r}"
    )


def refuse_runtimes(networks: Any, what: str) -> None:
    """Raises ValueError if one of the networks, by their names, is run by a runtime: it cannot be `what`."""
    for network in networks.values():
        if isinstance(network, RuntimeNetwork):
            raise ValueError(refusal(network, what))
