"""Settings of autoencoders to begin from, by name."""

from importlib.resources import files
from pathlib import Path


def configurations() -> dict[str, Path]:
    """Their files."""
    folder = Path(str(files(__name__)))
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}
