"""Modules that add to the package from outside: kinds of pipeline, processes, and what else has a register function."""

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

VARIABLE = "LATENTDIFF_EXTENSIONS"
"""Of the environment: names as `load_extensions` takes them, with the system's path separator between."""


def load_extensions(names: Iterable[str]) -> None:
    """Import modules, which register what they have to offer.

    Args:
        names: of modules, or of ``.py`` files; a file is imported under its stem.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a module cannot be imported, or a file has the name of a module that is loaded already.
    """
    for name in names:
        try:
            _import_file(Path(name)) if name.endswith(".py") else importlib.import_module(name)
        except ImportError as error:
            raise ValueError(f"the extension {name} cannot be imported: {error}") from error


def extensions_of_environment() -> list[str]:
    """The names in the environment variable."""
    return [name for name in os.environ.get(VARIABLE, "").split(os.pathsep) if name]


def _import_file(file: Path) -> None:
    if not file.is_file():
        raise FileNotFoundError(f"the extension {file}: no such file")
    there = sys.modules.get(file.stem)
    if there is not None:
        if getattr(there, "__file__", None) == str(file.resolve()):
            return
        raise ValueError(f"the extension {file} has the name of another module, {file.stem}; rename the file")
    spec = importlib.util.spec_from_file_location(file.stem, file.resolve())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[file.stem]
        raise


Network = TypeVar("Network", bound=type)

_NETWORKS: dict[tuple[str, str], type] = {}


def register_network(network: Network) -> Network:
    """Let saved pipelines name a class of networks that is not of this package; also a class decorator.

    Without it a folder that names the class is refused: a folder alone must not choose what code is imported.
    """
    _NETWORKS[network.__module__, network.__name__] = network
    return network


def registered_network(library: Any, class_name: Any) -> Any:
    """The registered class of that module and name; None: there is none."""
    return _NETWORKS.get((str(library), str(class_name)))
