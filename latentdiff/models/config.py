"""Strict configs: nothing in a config is silently ignored.

diffusers' classes have keys that ours do not support. Such a key is accepted at its neutral value, which has no
effect, and is kept, so that both libraries read each other's config files. Any other value is an error, and so is an
unknown key.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import diffusers
from diffusers import ConfigMixin


class StrictConfig(ConfigMixin):
    """``ConfigMixin`` for a class whose ``__init__`` takes its keys by name and the rest as ``**others``.

    ``neutral`` names diffusers' further keys with the values that have no effect, diffusers' default first.
    """

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    ignore_for_config: ClassVar[list[str]] = ["others"]

    @staticmethod
    def _get_init_keys(input_class: type) -> set[str]:
        return ConfigMixin._get_init_keys(input_class) | set(getattr(input_class, "neutral", {}))

    @classmethod
    def extract_init_dict(
        cls, config_dict: Mapping[str, Any], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        check_class(cls, config_dict.get("_class_name"))
        public = [key for key in {**config_dict, **kwargs} if not key.startswith("_") and key != "quantization_config"]
        refuse_unknown(cls.__name__, public, cls._get_init_keys(cls))
        return super().extract_init_dict(config_dict, **kwargs)

    def accept_neutral(self, others: Mapping[str, Any]) -> None:
        """Add the neutral keys to the config.

        Raises:
            ValueError: one of them has another value, or a key is unknown.
        """
        name = type(self).__name__
        refuse_unknown(name, others, self._get_init_keys(type(self)))
        for key, value in others.items():
            values = value if isinstance(value, (list, tuple)) else (value,)
            if any(v not in self.neutral[key] for v in values):
                raise ValueError(
                    f"{name}: {key}={value!r} is not supported; leave {key} out or set it to {self.neutral[key][0]!r}."
                )
        self.register_to_config(**{key: others.get(key, values[0]) for key, values in self.neutral.items()})


def check_class(cls: type, written_by: Any) -> None:
    """Refuse the config of another class of diffusers, whose keys ``ConfigMixin`` would silently drop."""
    family = {base.__name__ for base in cls.__mro__}
    if isinstance(written_by, str) and written_by not in family and hasattr(diffusers, written_by):
        raise ValueError(f"This is the config of a {written_by}; {cls.__name__} cannot be built from it.")


def refuse_unknown(name: str, keys: Iterable[str], known: Iterable[str]) -> None:
    known = sorted(set(known) - {"self", "others"})
    for key in sorted(set(keys).difference(known)):
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"the known keys are {', '.join(known)}."
        raise ValueError(f"{name}: unknown config key {key!r}; {hint}")


def check_choice(name: str, key: str, value: Any, choices: Sequence[Any]) -> None:
    """``value``, or each of its elements if it is a sequence, must be one of ``choices``."""
    for v in value if isinstance(value, (list, tuple)) else (value,):
        if v not in choices:
            raise ValueError(f"{name}: {key}={v!r} is not supported; use one of {', '.join(map(repr, choices))}.")


def check_block_types(name: str, key: str, types: Sequence[str], known: Sequence[str], levels: int) -> None:
    """`types` must hold one of the `known` types of blocks for each level."""
    check_choice(name, key, types, known)
    if len(types) != levels:
        raise ValueError(f"{name}: {key}={types!r} has {len(types)} entries for {levels} levels.")


def downscale_factor(config: Mapping[str, Any]) -> int:
    """By how much the last level of a network is smaller than its input: every level but the last halves.

    Of an autoencoder: pixels of a side to one latent. Of a UNet: what sides are multiples of where nothing is rounded.
    """
    return int(2 ** (len(config["block_out_channels"]) - 1))


def check_multiple(name: str, key: str, values: Sequence[int], divisor_key: str, divisors: Sequence[int]) -> None:
    """Every value must be a multiple of the divisor beside it."""
    for value, divisor in zip(values, divisors, strict=True):
        if value % divisor:
            raise ValueError(f"{name}: {key}={value} is not a multiple of {divisor_key}={divisor}.")


def per_level(name: str, key: str, value: int | Sequence[int], levels: int, least: int = 1) -> tuple[int, ...]:
    """One number for all levels, or one for each: a tuple of ``levels`` whole numbers of ``least`` or more."""
    values: tuple[Any, ...] = tuple(value) if isinstance(value, (list, tuple)) else (value,) * levels
    if len(values) != levels:
        raise ValueError(f"{name}: {key}={value!r} has {len(values)} entries for {levels} levels.")
    if not all(isinstance(v, int) and not isinstance(v, bool) and v >= least for v in values):
        raise ValueError(
            f"{name}: {key}={value!r} is not supported; give a whole number, {least} or more, or one for each level."
        )
    return values
