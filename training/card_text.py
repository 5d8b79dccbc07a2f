"""What a model's card says: usage, figures and settings, as Markdown, and nothing about where files lay."""

import re
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

# In a card of settings the names of these say something; where they lay says too much.
PATHS = frozenset(
    {"data", "output", "autoencoder", "text_encoder", "model", "manifest", "cache_dir", "perceptual_network"}
)

AUTOENCODER_USAGE = """## How to use it

```python
from latentdiff.models import CLASS

autoencoder = CLASS.from_pretrained("THIS_FOLDER")
```"""

AUTOENCODERS = {"kl": "AutoencoderKL", "vq": "VQModel", "gumbel": "GumbelVQModel", "fsq": "FSQModel"}

PIPELINE_USAGE = """## How to draw with it

```python
from latentdiff import TextToImagePipeline

pipeline = TextToImagePipeline.from_pretrained("THIS_FOLDER")
pipeline(PROMPT, seed=0).images[0].save("picture.png")
```

```sh
latentdiff generate PROMPT --model THIS_FOLDER -o picture.png
```

Plain diffusers loads it too:

```python
from diffusers import StableDiffusionPipeline

StableDiffusionPipeline.from_pretrained("THIS_FOLDER")(PROMPT).images[0]
```"""

TEXTLESS_USAGE = """## How to draw with it

```python
from latentdiff import PIPELINE

pipeline = PIPELINE.from_pretrained("THIS_FOLDER")
pipeline(CALL, seed=0).images[0].save("picture.png")
```"""


def usage(draws: bool, settings: Mapping[str, Any]) -> str:
    """How to use it, with a prompt of the run's own if it has one."""
    if not draws:
        kind = settings.get("kind", "kl")
        text = AUTOENCODER_USAGE.replace("CLASS", AUTOENCODERS[kind])
        return text + "\n\ndiffusers' class of this name loads it as well." if kind in ("kl", "vq") else text
    if settings.get("condition") == "class":
        return TEXTLESS_USAGE.replace("PIPELINE", "ClassConditionalPipeline").replace("CALL", "0")
    if settings.get("condition") == "none":
        return TEXTLESS_USAGE.replace("PIPELINE", "UnconditionalPipeline").replace("CALL", "batch_size=1")
    prompts = [*(settings.get("sample_prompts") or ()), "a red car"]
    plain = next(prompt for prompt in prompts if not set(prompt) & set('"\\`$!\n'))  # needs no quoting in a shell
    return PIPELINE_USAGE.replace("PROMPT", f'"{plain}"')


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
    """A setting's value as one line of YAML, its place on somebody's disk left out."""
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
    """The last part of a path; a hub id, which tells nothing about a disk, stays whole."""
    if is_hub_id(value) and not Path(value).exists():
        return value
    return PurePath(value.replace("\\", "/")).name or value


def is_hub_id(value: str) -> bool:
    from latentdiff.interchange.folders import HUB_ID

    return bool(HUB_ID.fullmatch(value)) and not value.startswith(".") and not Path(value).expanduser().exists()
