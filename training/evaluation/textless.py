"""Models without text, from their folders."""

import torch

from latentdiff.interchange.folders import find_model, read_json
from latentdiff.pipelines import ClassConditionalPipeline, UnconditionalPipeline
from latentdiff.pipelines.registry import find_kind, kind_saved_as


def textless_kind(model: str) -> str | None:
    """The class of `latentdiff.pipelines` that loads a folder with a model without text; None: it holds another.

    Raises:
        FileNotFoundError: there is no pipeline folder, here or among the packaged models.
    """
    folder = find_model(model)
    if folder is None or not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"{model}: no pipeline folder; train one with 'latentdiff train denoiser'")
    kind = kind_saved_as(str(read_json(folder / "model_index.json").get("_class_name")))
    return kind.name if kind is not None and kind.conditioned_by in ("class", "none") else None


def load_textless(model: str, dtype: torch.dtype = torch.float32) -> ClassConditionalPipeline | UnconditionalPipeline:
    """A model without text, from its folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is conditioned by text.
    """
    kind = textless_kind(model)
    if kind is None:
        raise ValueError(
            f"{model} is no model without text, such as condition=class or none trains, and this needs one"
        )
    return find_kind(kind).load().from_pretrained(find_model(model), dtype=dtype)
