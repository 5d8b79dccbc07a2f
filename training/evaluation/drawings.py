"""The pictures of an evaluation: what to draw, and drawing what is not there yet."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from latentdiff import __version__
from latentdiff.interchange.fingerprint import weights_digest
from latentdiff.pipelines.registry import find_kind
from latentdiff.training.card.card import last_part
from latentdiff.training.data import CaptionedPicture
from latentdiff.training.drawings import Drawing, draw, missing


def plan(
    pictures: Sequence[CaptionedPicture], count: int, seed: int, folder: Path, common: Mapping[str, Any]
) -> list[Drawing]:
    """What to draw: the captions in a random order that is the seed's, the first of each picture, then the second...

    The first drawings stay the same when `count` grows, so that they are kept.

    Args:
        common: settings of all of them, see `call_settings`.
    """
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(seed)).tolist()
    drawings = []
    for i in range(count):
        captions = pictures[order[i % len(order)]].captions
        caption = captions[i // len(order) % len(captions)]
        drawings.append(Drawing(folder / f"{i:06d}.png", {"prompts": [caption], "seed": seed + i, **common}))
    return drawings


def caption_of(drawing: Drawing) -> str:
    return str(drawing.settings["prompts"][0])


def call_settings(pipeline: Any, model: str, steps: int | None, guidance: float | None) -> dict[str, Any]:
    """What every drawing of an evaluation has in common; kept in each picture.

    Args:
        model: its name; of a path only the last part is kept.
        steps, guidance: None is the model's own.
    """
    height, width = pipeline.picture_size(None, None)
    defaults = pipeline.defaults
    parts = ("unet", "vae", "text_encoder", "classifier")
    networks = {part: net for part in parts if (net := getattr(pipeline, part, None)) is not None}
    for part, net in pipeline.components.items():  # what a kind from elsewhere has besides
        if isinstance(net, torch.nn.Module) and not any(net is other for other in networks.values()):
            networks[part] = net
    tensors = {f"{part}.{name}": t for part, net in networks.items() for name, t in net.state_dict().items()}
    return {
        "count": 1,
        "negative_prompt": None,
        "num_inference_steps": defaults["num_inference_steps"] if steps is None else steps,
        "guidance_scale": defaults.get("guidance_scale", 1.0) if guidance is None else guidance,
        "model": last_part(model),
        "weights": weights_digest(tensors),
        "scheduler": type(pipeline.scheduler).__name__,
        "scheduler_config": plain_config(pipeline.scheduler),
        "precision": str(pipeline.unet.dtype).removeprefix("torch."),
        "width": width,
        "height": height,
        "version": __version__,
    }


def plain_config(scheduler: Any) -> dict[str, Any]:
    """A scheduler's config as it comes back from JSON."""
    config = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
    return json.loads(json.dumps(config, default=str))


def draw_missing(pipeline: Any, drawings: Sequence[Drawing], batch_size: int) -> int:
    """Draw what is not there yet, or was drawn otherwise. Returns how many."""
    absent = missing(drawings)

    def pictures_of(batch: Sequence[Drawing]) -> Sequence[Any]:
        common = batch[0].settings
        given: dict[str, Any] = {"batch_size": len(batch)}
        conditioned_by = find_kind(type(pipeline).__name__).conditioned_by
        if conditioned_by != "none":
            which = "class_labels" if conditioned_by == "class" else "prompt"
            given = {which: list(map(caption_of, batch)), "guidance_scale": common["guidance_scale"]}
        return pipeline(
            **given,
            num_inference_steps=common["num_inference_steps"],
            seed=[drawing.settings["seed"] for drawing in batch],
            return_dict=False,
        )[0]

    draw(absent, pictures_of, batch_size)
    return len(absent)
