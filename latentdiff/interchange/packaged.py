"""The models that ship inside the package."""

from pathlib import Path

DEFAULT_MODEL = "emoji"
WEIGHTS = Path(__file__).resolve().parent.parent / "weights"


def packaged_models() -> dict[str, Path]:
    """The names of the models in this installation, and their folders."""
    return {index.parent.name: index.parent for index in sorted(WEIGHTS.glob("*/model_index.json"))}


def packaged_model(name: str = DEFAULT_MODEL) -> Path:
    """The folder of a packaged model.

    Raises:
        FileNotFoundError: this installation has no model of that name.
    """
    models = packaged_models()
    if name not in models:
        have = f"it has {', '.join(models)}" if models else "it has none: the package was built without its weights"
        raise FileNotFoundError(f"no model named {name!r} comes with this installation of latentdiff; {have}")
    return models[name]
