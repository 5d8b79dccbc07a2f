"""Figures and settings for a model's card, as Markdown, without the places where files lay."""

import re
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

# In a card of settings the names of these say something; where they lay says too much.
PATHS = frozenset(
    {"data", "output", "autoencoder", "text_encoder", "model", "manifest", "cache_dir", "perceptual_network"}
)


def figures_table(figures: Mapping[str, float], pictures: int) -> str:
    if not figures:
        return ""
    rows = "\n".join(f"| {name} | {value:.6g} |" for name, value in sorted(figures.items()))
    return f"## Figures of training\n\n| what | figure |\n|---|---|\n{rows}\n| training pictures | {pictures:,} |"


def settings_list(settings: Mapping[str, Any]) -> str:
    if not settings:
        return ""
    lines = "\n".join(f"{name}: {shown(name, value)}" for name, value in settings.items() if value is not None)
    return f"## Settings\n\n```yaml\n{lines}\n```"


def shown(name: str, value: Any) -> str:
    """A setting's value as one line of YAML; of paths the last part."""
    import yaml

    if isinstance(value, PurePath) or (isinstance(value, str) and (name in PATHS or looks_like_path(value))):
        value = last_part(str(value))
    if isinstance(value, (list, tuple)):
        value = [last_part(item) if isinstance(item, str) and looks_like_path(item) else item for item in value]
    line = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=float("inf"))
    return line.removesuffix("...\n").strip()


def looks_like_path(value: str) -> bool:
    """Whether a string is the absolute path, or the home path, of something."""
    return bool(re.match(r"(/|~|[A-Za-z]:[\\/]|\.\.?[\\/])\S", value)) and " " not in value


def last_part(value: str) -> str:
    """The last part of a path; a hub id stays whole."""
    if is_hub_id(value) and not Path(value).exists():
        return value
    return PurePath(value.replace("\\", "/")).name or value


def is_hub_id(value: str) -> bool:
    from latentdiff.interchange.folders import HUB_ID

    return bool(HUB_ID.fullmatch(value)) and not value.startswith(".") and not Path(value).expanduser().exists()
