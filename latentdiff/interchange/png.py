"""PNG files that hold the settings they were generated with."""

import io
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from latentdiff.interchange.atomic import atomic_file
from latentdiff.interchange.user_files import check_regular

KEY = "latentdiff"
"""Text chunk that holds the settings, as JSON."""


def image_grid(images: Sequence[Image.Image], columns: int, gap: int = 2) -> Image.Image:
    """`images`, all of one size, in rows of `columns` on white.

    Raises:
        ValueError: there are none.
    """
    if not images:
        raise ValueError("a grid needs at least one image")
    width, height = images[0].size
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, image in enumerate(images):
        grid.paste(image, ((i % columns) * (width + gap), (i // columns) * (height + gap)))
    return grid


def parameters_text(settings: Mapping[str, Any]) -> str:
    """`settings` in the notation of Stable Diffusion's web interfaces, which picture viewers read."""
    lines = ["\n".join(settings["prompts"])]
    if settings.get("negative_prompt"):
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    fields = {
        "Steps": settings["num_inference_steps"],
        "Sampler": settings["scheduler"],
        "CFG scale": settings["guidance_scale"],
        "Seed": settings["seed"],
        "Size": f"{settings['width']}x{settings['height']}",
        "Denoising strength": settings.get("strength"),
        "Model": settings["model"],
        "Model hash": settings.get("model_digest", "")[:10] or None,
        "Version": f"latentdiff {settings['version']}",
    }
    lines.append(", ".join(f"{name}: {value}" for name, value in fields.items() if value is not None))
    return "\n".join(lines)


def save_picture(image: Image.Image, file: Path, settings: Mapping[str, Any] | None = None) -> None:
    """Write a PNG, with `settings` in it if given, whole or not at all. Missing folders are made."""
    info = info_of(settings)
    with atomic_file(file) as partial:
        image.save(partial, format="PNG", pnginfo=info)


def picture_bytes(image: Image.Image, settings: Mapping[str, Any] | None = None) -> bytes:
    """What `save_picture` writes."""
    stream = io.BytesIO()
    image.save(stream, format="PNG", pnginfo=info_of(settings))
    return stream.getvalue()


def info_of(settings: Mapping[str, Any] | None) -> PngInfo:
    """Settings as chunks of a PNG."""
    info = PngInfo()
    if settings is not None:
        if "prompts" in settings:  # it was drawn
            info.add_text("parameters", parameters_text(settings))
        info.add_text(KEY, json.dumps(settings, ensure_ascii=False))
    return info


def read_settings(file: Path) -> dict[str, Any] | None:
    """The settings in a picture that `save_picture` wrote; None for any other file. The pixels are not decoded."""
    try:
        check_regular(file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(file, formats=("PNG",)) as image:
                return settings_of(image)
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError):
        return None


def settings_of(image: Image.Image) -> dict[str, Any] | None:
    """The settings in an open picture; None if it has none, or unreadable ones."""
    text = image.info.get(KEY)
    try:
        settings = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return None
    return settings if isinstance(settings, dict) else None


def check_output(file: Path, overwrite: bool = False) -> None:
    """Refuse to write over a file that is not a picture of ours.

    Raises:
        ValueError: `file` is not named ``.png``.
        FileExistsError: it is there, was not written by this program, and `overwrite` is False; or it is a folder.
        PermissionError: nothing may be written into its folder.
    """
    if file.suffix.lower() != ".png":
        raise ValueError(f"{file}: pictures are written as PNG, which keeps the settings; name it {file.stem}.png")
    if file.is_dir():
        raise FileExistsError(f"{file} is a folder")
    folder = next((one for one in file.absolute().parents if one.exists()), None)
    if folder is not None and not os.access(folder, os.W_OK):
        raise PermissionError(f"{file}: you may not write into {folder}; choose another folder")
    if file.exists() and not overwrite and read_settings(file) is None:
        raise FileExistsError(
            f"{file} exists and was not drawn by latentdiff; choose another name, or replace it with --overwrite"
        )
