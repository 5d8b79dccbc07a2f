"""Imports put off until what they give is used, for a program that is to draw one picture and end.

diffusers and transformers import for everything that they can do, which is twice what a drawing needs: a compiler, two
packages of algebra and statistics, training over many machines, models that nobody asked for.
"""

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any, Unpack

NOT_FOR_A_DRAWING = (
    "diffusers.loaders.single_file_utils",
    "diffusers.models.autoencoders.autoencoder_rae",
    "diffusers.models.transformers",
    "peft",
    "scipy",
    "sympy",
    "torch._dynamo",
    "torch.distributed._composable",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.fx.experimental.symbolic_shapes",
    "torch.nn.attention.flex_attention",
    "torchvision",
    "transformers.distributed.expert_parallel",
    "transformers.image_transforms",
    "transformers.distributed.tensor_parallel",
    "transformers.image_utils",
    "transformers.processing_utils",
)
"""Modules, with all within them, that diffusers' and transformers' modules take names of, and use in functions only."""

TRIED = {"torch": ("2.14",), "diffusers": ("0.42",), "transformers": ("5.23",)}
"""Versions whose imports the tests have tried this with; others may use while they are imported what these do not."""


def is_tried() -> bool:
    """Whether the packages here are of versions in `TRIED`."""
    from importlib.metadata import version  # slow

    return all(version(name).startswith(tuple(f"{one}." for one in ones)) for name, ones in TRIED.items())


@contextmanager
def imports_deferred(names: Sequence[str] = NOT_FOR_A_DRAWING, unless: str | None = None) -> Iterator[None]:
    """Within, modules of these names are stand-ins: what is taken of them is loaded when it is used.

    Afterwards they are imported as always; what was taken remains, and is still loaded when it is used. Modules that
    are loaded already are left alone, and modules that are not installed are not found.

    Args:
        unless: a module. Where it is loaded, this may be somebody's notebook or server, and nothing is deferred.
    """
    if unless in sys.modules:
        yield
        return
    finder = Finder(names)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name, module in list(sys.modules.items()):
            if isinstance(module, StandIn):
                forget(name)


def forget(name: str) -> None:
    """The module of this name, a stand-in, is no longer taken for loaded."""
    module = sys.modules.pop(name)
    parent, _, child = name.rpartition(".")
    if parent in sys.modules and vars(sys.modules[parent]).get(child) is module:
        delattr(sys.modules[parent], child)


def load(name: str) -> ModuleType:
    """The module itself, though a stand-in may be in its place; so are then those that it lies in."""
    parts = name.split(".")
    for whole in [".".join(parts[: i + 1]) for i in range(len(parts))]:
        if isinstance(sys.modules.get(whole), StandIn):
            for finder in sys.meta_path:
                if isinstance(finder, Finder):
                    finder.give_up(whole)
            for within in [other for other in sys.modules if f"{other}.".startswith(f"{whole}.")]:
                forget(within)
    return import_module(name)


ASKED_BY_TYPING = re.compile("__(typing_.*|origin|parameters|unpacked)__")
"""Attributes by which ``typing`` tells apart what stands in annotations."""


class Finder(MetaPathFinder, Loader):
    """Finds stand-ins in place of modules that are installed."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)

    def give_up(self, name: str) -> None:
        self.names = [other for other in self.names if not f"{name}.".startswith(f"{other}.")]

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if not any(f"{name}.".startswith(f"{one}.") for one in self.names):
            return None
        others = sys.meta_path[sys.meta_path.index(self) + 1 :]
        found = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None:
            spec.loader = self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


class StandIn(ModuleType):
    """A module that is not loaded; whatever is taken of it is `Deferred`."""

    def __getattr__(self, name: str) -> Any:
        if name in ("__all__", "__version__"):
            return getattr(load(self.__name__), name)
        if name.startswith("__"):
            raise AttributeError(name)  # Python's imports ask for it
        return ALREADY.get((self.__name__, name)) or Deferred(self.__name__, name)


class Deferred:
    """Something of a module, which is loaded when this is used."""

    def __init__(self, module: str, name: str) -> None:
        self.__dict__.update(_module=module, _name=name)

    def _load(self) -> Any:
        module = load(self._module)
        if not hasattr(module, self._name):
            import_module(f"{self._module}.{self._name}")
        return getattr(module, self._name)

    def __getattr__(self, name: str) -> Any:
        if ASKED_BY_TYPING.fullmatch(name):
            raise AttributeError(name)
        return getattr(self._load(), name)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._load()(*args, **options)

    def __contains__(self, item: Any) -> bool:
        return item in self._load()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._load())

    def __getitem__(self, key: Any) -> Any:
        return self._load()[key]

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self._load(),)

    def __or__(self, other: Any) -> "AnyOf":
        return AnyOf(self, other)

    def __ror__(self, other: Any) -> "AnyOf":
        return AnyOf(other, self)

    def __instancecheck__(self, instance: Any) -> bool:
        there = sys.modules.get(self._module)
        if there is None or isinstance(there, StandIn):
            return False  # nobody can have made one
        return isinstance(instance, self._load())


class AnyOf:
    """The union of something deferred and other types, as in an annotation."""

    def __init__(self, *kinds: Any) -> None:
        self.kinds = tuple(type(None) if kind is None else kind for kind in kinds)

    def __or__(self, other: Any) -> "AnyOf":
        return AnyOf(*self.kinds, other)

    def __instancecheck__(self, instance: Any) -> bool:
        return isinstance(instance, self.kinds)


def disable(function: Any = None, recursive: bool = True, **others: Any) -> Any:
    """``torch._dynamo.disable``, which is loaded at the first call of the function."""
    if others.get("wrapping") is False:
        return function  # for a call now, and nobody compiles
    import torch

    return torch._disable_dynamo(function, recursive)


def assume_constant_result(function: Any) -> Any:
    function._dynamo_marked_constant = True
    return function


def expect_true(condition: Any, skip: int = 0) -> bool:
    """``torch.fx.experimental.symbolic_shapes.expect_true``, which is loaded for conditions that are no plain ones."""
    if isinstance(condition, bool):
        return condition
    return load("torch.fx.experimental.symbolic_shapes").expect_true(condition, skip)


ALREADY: dict[tuple[str, str], Any] = {
    ("torch._dynamo", "allow_in_graph"): lambda marked: marked,
    ("torch._dynamo", "assume_constant_result"): assume_constant_result,
    ("torch._dynamo", "disable"): disable,
    ("torch._dynamo", "eval_frame"): SimpleNamespace(
        OptimizedModule=Deferred("torch._dynamo.eval_frame", "OptimizedModule")
    ),
    ("torch.fx.experimental.symbolic_shapes", "expect_true"): expect_true,
    ("transformers.processing_utils", "Unpack"): Unpack,
}
"""What is used while others are imported: marks for a compiler, which nobody waits for here, and annotations."""
