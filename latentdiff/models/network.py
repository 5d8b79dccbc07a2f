"""``Network``, what every model here is to diffusers, with a strict config; ``Denoiser``, what one is to a sampler.

Nothing in a config is silently ignored. diffusers' classes have keys that ours do not support. Such a key is accepted
at its neutral value, which has no effect, and is kept, so that both libraries read each other's config files. Any other
value is an error, and so is an unknown key.
"""

import difflib
import functools
import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self, TypeVar

import diffusers
import torch
from diffusers import ConfigMixin, ModelMixin
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from latentdiff.conditioning import Conditioning
from latentdiff.interchange.atomic import allow_as_usual
from latentdiff.interchange.folders import check_links, check_model_files
from latentdiff.interchange.user_files import check_regular_files, faults_named
from latentdiff.models.layers import Attention
from latentdiff.models.loras import refuse_loras

logger = logging.getLogger(__name__)

MAX_LAYERS = 1000
"""Of one kind on one level: a config with more would keep a machine busy for hours."""
WITH_SUMS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class AnyValue(tuple[Any, ...]):
    """Of a neutral key, its default: other values are without effect, too."""

    def __contains__(self, value: object) -> bool:
        return True


class StrictConfig(ConfigMixin):
    """``ConfigMixin`` for a class whose ``__init__`` takes its keys by name and the rest as ``**others``.

    ``neutral`` names such further keys with the values that are supported, the default first: of diffusers' keys those
    that have no effect. The checks raise ValueError with class, key and value.
    """

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    own: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Like ``neutral``, keys that diffusers' class does not know: they are in the config only where they differ from
    the first value, for diffusers warns of them."""
    ignore_for_config: ClassVar[list[str]] = ["others"]

    @staticmethod
    def _get_init_keys(input_class: type) -> set[str]:
        return ConfigMixin._get_init_keys(input_class) | {
            *getattr(input_class, "neutral", {}),
            *getattr(input_class, "own", {}),
        }

    @classmethod
    def extract_init_dict(
        cls, config_dict: Mapping[str, Any], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        written_by, family = config_dict.get("_class_name"), {base.__name__ for base in cls.__mro__}
        # ``ConfigMixin`` would silently drop the keys of another class.
        if isinstance(written_by, str) and written_by not in family and hasattr(diffusers, written_by):
            raise ValueError(f"This is the config of a {written_by}; {cls.__name__} cannot be built from it.")
        public = [key for key in {**config_dict, **kwargs} if not key.startswith("_") and key != "quantization_config"]
        cls._refuse_unknown(public)
        return super().extract_init_dict(config_dict, **kwargs)

    @classmethod
    def _refuse_unknown(cls, keys: Iterable[str]) -> None:
        known = sorted(cls._get_init_keys(cls) - {"self", "others"})
        for key in sorted(set(keys).difference(known)):
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"the known keys are {', '.join(known)}."
            raise ValueError(f"{cls.__name__}: unknown config key {key!r}; {hint}")

    def accept_neutral(self, others: Mapping[str, Any]) -> None:
        """Add the neutral keys to the config.

        Raises:
            ValueError: one of them has another value, or a key is unknown; or a value in the config makes no sense.
        """
        self._check_values()
        self._refuse_unknown(others)
        known = {**self.neutral, **self.own}
        for key, value in others.items():
            values = value if isinstance(value, (list, tuple)) else (value,)
            if any(v not in known[key] for v in values):
                neutral = repr(known[key][0])
                self.refuse(key, value, f"is not supported; leave {key} out or set it to {neutral}.")
        own = {key: others[key] for key, values in self.own.items() if others.get(key, values[0]) != values[0]}
        self.register_to_config(**{key: others.get(key, values[0]) for key, values in self.neutral.items()}, **own)

    def _check_values(self) -> None:
        """Refuse numbers that are not finite, a ``scaling_factor`` of 0, and a ``sample_size`` that is no size."""
        for key, value in self.config.items():
            numbers = value if isinstance(value, (list, tuple)) else (value,)
            if not all(math.isfinite(number) for number in numbers if isinstance(number, float)):
                self.refuse(key, value, "is not finite.")
        scale = self.config.get("scaling_factor", 1.0)
        if isinstance(scale, (bool, str, type(None))) or scale == 0:
            self.refuse("scaling_factor", scale, "is not supported; give a number other than 0.")
        size = self.config.get("sample_size")
        sides = size if isinstance(size, (list, tuple)) and len(size) == 2 else (size,)
        if size is not None and not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in sides):
            self.refuse("sample_size", size, "is not a size; give a whole number, or (height, width).")

    def refuse(self, key: str, value: Any, why: str) -> None:
        raise ValueError(f"{type(self).__name__}: {key}={value!r} {why}")

    def check_choice(self, key: str, choices: Sequence[Any], levels: int | None = None) -> None:
        """The value must be one of `choices`; with `levels`, a sequence of so many of them."""
        value = self.config[key]
        for v in value if levels is not None and isinstance(value, (list, tuple)) else (value,):
            if v not in choices:
                self.refuse(key, v, f"is not supported; use one of {', '.join(map(repr, choices))}.")
        if levels is not None and len(value) != levels:
            self.refuse(key, value, f"has {len(value)} entries for {levels} levels.")

    def check_multiple(self, key: str, values: Iterable[int], divisor: int, divisor_name: str) -> None:
        for value in values:
            if value % divisor:
                self.refuse(key, value, f"is not a multiple of {divisor_name}={divisor}.")

    def per_level(self, key: str, levels: int = 1, least: int = 1, given: Any = ...) -> tuple[int, ...]:
        """One number for all levels, or one for each: a tuple of ``levels`` whole numbers of ``least`` or more.

        given: the value, if it is a part of the key's only.
        """
        value = self.config[key] if given is ... else given
        values: tuple[Any, ...] = tuple(value) if isinstance(value, (list, tuple)) else (value,) * levels
        if len(values) != levels:
            self.refuse(key, value, f"has {len(values)} entries for {levels} levels.")
        if not all(isinstance(v, int) and not isinstance(v, bool) and v >= least for v in values):
            self.refuse(key, value, f"is not supported; give a whole number, {least} or more, or one for each level.")
        if ("layers" in key or "blocks" in key) and max(values, default=0) > MAX_LAYERS:
            self.refuse(key, value, f"is more than the limit of {MAX_LAYERS}, which no network comes near.")
        return values


def downscale_factor(config: Mapping[str, Any]) -> int:
    """By how much the last level of a network is smaller than its input: every level but the last halves.

    Of an autoencoder: pixels of a side to one latent. Of a UNet: what sides are multiples of where nothing is rounded.
    Of a transformer: the side of a patch.
    """
    if "patch_size" in config:
        return int(config["patch_size"])
    return int(2 ** (len(config["block_out_channels"]) - 1))


def times(folder: Path) -> dict[Path, int]:
    """The weight files in a folder, and when each was written."""
    return {file: file.lstat().st_mtime_ns for file in folder.glob("*.safetensors")}


class Network(ModelMixin, StrictConfig):
    """A diffusers model with a strict config, whose attention is PyTorch's ``scaled_dot_product_attention`` only."""

    @property
    def downscale_factor(self) -> int:
        """See the function of this name."""
        return downscale_factor(self.config)

    @property
    def works_in_parts(self) -> bool:
        """Whether other methods than ``forward`` may be called by themselves.

        They may not after ``compile()``, which compiles ``forward`` only, nor under diffusers' group offloading, which
        loads weights in the course of a plain call only.
        """
        return not offloaded_in_groups(self) and self._compiled_call_impl is None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **options: Any) -> Any:
        """As in diffusers.

        Raises:
            ValueError: a file is damaged, no regular file, or a link out of the folder (or its pipeline's);
                weights do not fit its config, or are not finite.
        """
        where = Path(pretrained_model_name_or_path, options.get("subfolder") or "")
        if where.is_dir():
            named = Path(pretrained_model_name_or_path)
            in_pipeline = (named.parent / "model_index.json").is_file()
            check_links(named.parent if in_pipeline else named, [where, *where.glob("*")])
            check_regular_files(where)
        with faults_named(where, foreign=True):
            try:
                found = super().from_pretrained(pretrained_model_name_or_path, **options)
            except Exception:
                if where.is_dir():
                    check_model_files(where)  # which says what is wrong with a file
                raise
        network = found[0] if isinstance(found, tuple) else found  # with output_loading_info
        check_finite(network, where)
        return found

    @functools.wraps(ModelMixin.save_pretrained, assigned=())  # pipelines look up which arguments it takes
    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **options: Any) -> None:
        """As in diffusers, but that others may read the files if they may read other new ones.

        Raises:
            ValueError: there are LoRAs in the network, whose names no loader would understand.
        """
        refuse_loras({type(self).__name__: self}, "saved")
        folder = Path(save_directory)
        before = times(folder)
        super().save_pretrained(save_directory, *args, **options)
        if folder.is_dir():  # over a file diffusers writes nothing, and logs it
            allow_as_usual(folder, [file for file, time in times(folder).items() if before.get(file) != time])

    def fuse_qkv_projections(self) -> None:
        """Let every attention compute queries, keys and values of one input by one product, as in diffusers.

        It takes copies of the weights: call it again when they have changed. Training does not use them.

        Raises:
            ValueError: there are LoRAs in the projections, or weights that are offloaded.
        """
        for attention in self._attentions():
            attention.fuse_projections()

    def unfuse_qkv_projections(self) -> None:
        """Undo `fuse_qkv_projections`."""
        for attention in self._attentions():
            attention.fuse_projections(False)

    def _attentions(self) -> list[Attention]:
        return [module for module in self.modules() if isinstance(module, Attention)]

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


class TracerSpared(TorchFunctionMode):
    """Within, tensors on the device "meta" are neither initialized nor measured in Python.

    They have no values. To give them normal ones, or to make others of their shape, PyTorch 2 computes strides with its
    tracer and sympy, whose import is a part of a second.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        tensor = args[0] if args else given.get("tensor")
        if isinstance(tensor, Tensor) and tensor.is_meta:
            if getattr(func, "__module__", None) == "torch.nn.init":
                return tensor
            if func is torch.empty_like and given.keys() == {"device"}:
                return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, **given)
        return func(*args, **given)


def check_finite(network: nn.Module, where: object) -> None:
    """Raises ValueError, naming the place `where` a network was loaded from, if it has weights that are not finite."""
    wrong = not_finite(network.state_dict())
    if wrong:
        raise ValueError(
            f"{where}: {len(wrong)} weights of the {type(network).__name__} have values that are not finite (NaN or "
            f"infinite), such as {wrong[0]}; the file is damaged, training diverged, or the precision is too narrow"
        )


def not_finite(weights: Mapping[str, Tensor]) -> list[str]:
    """The names of tensors with values that are NaN or infinite. Weights that are not loaded are passed over."""
    numbers = {name: w for name, w in weights.items() if w.dtype in WITH_SUMS and not w.is_meta}
    # A sum is several times faster than looking at every value, and not finite if a value is not.
    doubtful = [name for name, w in numbers.items() if not w.sum(dtype=torch.float32).isfinite()]
    return [name for name in doubtful if not numbers[name].isfinite().all()]


def offloaded_in_groups(network: nn.Module) -> bool:
    """Whether diffusers' group offloading loads this network's weights as they are needed."""
    registry: Any = getattr(network, "_diffusers_hook", None)
    return registry is not None and registry.get_hook("group_offloading") is not None


class Prepared(Protocol):
    """What a denoiser makes of conditions; the batch is its entries' first dimension."""

    def select(self, index: slice | Tensor) -> Self: ...


P = TypeVar("P", bound=Prepared)


class Denoiser(Protocol[P]):
    """A network that denoises, as far as it goes beyond a plain call.

    Every denoiser is called as a whole by trainers: ``network(sample, timestep=t, **conditioning.arguments()).sample``.
    Sampling repeats that call with the same conditions and many timesteps, so a denoiser may also offer its parts, as
    ours do; diffusers' are called as a whole::

        prepared = network.prepare(conditioning)                        # once per prompt
        for timestep in timesteps:
            time = network.embed_time(timestep, class_labels=..., timestep_cond=...)
            prediction = network.denoise(latents, time, prepared)

    The config has ``in_channels``, ``out_channels`` and ``sample_size``, the side or the (height, width) of latents in
    training.
    """

    config: Any

    @property
    def downscale_factor(self) -> int:
        """What sides are multiples of where the network rounds nothing. Other sides may be possible."""

    @property
    def works_in_parts(self) -> bool:
        """Whether the parts may be called now; where it is compiled, or offloaded in groups, only the whole network.

        A network wrapped by ``torch.compile`` does not know of it.
        """

    def prepare(self, conditioning: Conditioning) -> P:
        """All that can be computed from the conditions alone."""

    def prepared_by(self) -> Sequence[nn.Module]:
        """The modules whose weights `prepare` uses: if they change, what was prepared is out of date."""

    def embed_time(
        self,
        timesteps: Tensor | float,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
    ) -> Tensor:
        """Timesteps, one number or (B,), with labels and an embedded guidance scale -> (1 or B, D)."""

    def denoise(self, sample: Tensor, time: Tensor, prepared: P) -> Tensor:
        """Noisy latents (B, C, H, W), `embed_time`'s result and `prepare`'s -> the prediction (B, C', H, W)."""
