"""What has to be installed for a feature that not everybody wants."""

from collections.abc import Sequence
from importlib.util import find_spec


def check_installed(what: str, modules: Sequence[str], extra: str) -> None:
    """Raises ImportError if `what` needs a module that is not installed, and says how to install the extra."""
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise ImportError(f"{what} needs {' and '.join(missing)}; install with: {how_to_install(extra)}")


def check_onnx_export() -> None:
    """Raises ImportError if what writes a model as ONNX is not installed."""
    check_installed("ONNX export", ("onnx", "onnxscript"), "onnx")


def how_to_install(extra: str) -> str:
    """The command that installs an extra of this package: by the names of what is in it, which are in every index."""
    from importlib.metadata import PackageNotFoundError, requires

    mark = f'; extra == "{extra}"'
    try:
        found = [one.removesuffix(mark).strip() for one in requires("latentdiff") or () if one.endswith(mark)]
    except PackageNotFoundError:
        found = []
    if not found:
        return f"pip install -e '.[{extra}]' in the folder of this package"
    return "pip install " + " ".join(f"'{one}'" for one in found)
