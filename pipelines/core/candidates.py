"""The best of several: pictures of one prompt, ranked by how well a CLIP model finds them to fit it.

DALL-E (Ramesh et al. 2021), Sec. 2.6, draws 512 and keeps the best.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image

from latentdiff.metrics.clip import ClipScore, load_clip
from latentdiff.pipelines.core.call_options import TextOptions
from latentdiff.text.tokens import without_weights

BATCH = 16

P = TypeVar("P")


def reranker_of_call(options: TextOptions, pipeline: Any) -> ClipScore | None:
    """What compares the candidates of a call; None if it asks for none.

    Raises:
        TypeError, FileNotFoundError, ValueError: they cannot be compared, see `load_reranker`; the message says why.
    """
    if options.candidates is None:
        if options.reranker is not None:
            raise ValueError("a reranker needs candidates=, how many pictures of each prompt to choose from")
        return None
    kept = options.num_images_per_prompt or 1
    if options.candidates < kept:
        raise ValueError(f"candidates must be at least the {kept} to keep of each prompt, not {options.candidates}")
    if options.output_type == "latent":
        raise ValueError("candidates are compared as pictures; output_type='latent' does not go with them")
    source = options.reranker or pipeline.reranker
    if source is None:
        raise ValueError(
            "candidates are compared by a CLIP model; give one with reranker=, such as "
            "'open_clip:ViT-B-32/laion2b_s34b_b79k' or the folder of a transformers CLIP, or set pipeline.reranker"
        )
    if options.prompt is None:
        raise ValueError("candidates are compared with the prompt; give it as text, not as prompt_embeds")
    return load_reranker(source, pipeline._execution_device)


def load_reranker(source: Any, device: torch.device | str = "cpu") -> ClipScore:
    """A ``ClipScore``, or one loaded from where `latentdiff.metrics.clip.load_clip` finds it.

    What is loaded goes to `device`, and stays loaded for the next call.

    Raises:
        TypeError: neither a ``ClipScore`` nor a name.
        FileNotFoundError, ValueError: there is no such model, or it is no CLIP.
    """
    if isinstance(source, ClipScore):
        return source
    if not isinstance(source, str) and not hasattr(source, "__fspath__"):
        raise TypeError(f"a reranker is a ClipScore, or the name or folder of a CLIP model, not {source!r}")
    folder = Path(source).expanduser()
    return _load_once(str(folder.resolve()) if folder.is_dir() else str(source)).to(device)


@lru_cache(maxsize=1)
def _load_once(source: str) -> ClipScore:
    return load_clip(source)


def best_of(
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    candidates: int,
    keep: int,
    reranker: ClipScore,
    withheld: Sequence[bool] | None = None,
    prompt_weights: bool = False,
) -> tuple[list[int], list[float]]:
    """Of `candidates` pictures of each prompt the `keep` that fit it best.

    Args:
        images: for each prompt in turn `candidates`.
        withheld: which of them are black, spoilt or by a safety checker; they come last.
        prompt_weights: whether the prompts have weights, which a CLIP does not read.

    Returns:
        Which they are, for each prompt in turn, the best first; and their scores, from 0 to 100. Of equal ones the
        earlier comes first.

    Raises:
        ValueError: the numbers do not go together.
    """
    if len(images) != len(prompts) * candidates or keep > candidates:
        raise ValueError(
            f"{len(images)} pictures are not {candidates} for each of {len(prompts)} prompts, to keep {keep}"
        )
    captions = [without_weights(one) if prompt_weights else one for one in prompts for _ in range(candidates)]
    cosines = torch.cat(  # not the scores: those of all that fit badly are 0
        [reranker.cosines(images[i : i + BATCH], captions[i : i + BATCH]) for i in range(0, len(images), BATCH)]
    )
    rank = cosines.clone()
    if withheld is not None:
        rank[torch.tensor(withheld)] = -2.0
    order = rank.view(len(prompts), candidates).argsort(dim=1, descending=True, stable=True)[:, :keep]
    best = (order + candidates * torch.arange(len(prompts))[:, None]).flatten()
    return best.tolist(), (100 * cosines[best].clamp(min=0)).tolist()


def best_of_each(pictures: Iterator[P], prompts: Sequence[str], keep: int, settings: Any, device: Any) -> Iterator[P]:
    """Of the candidates of each prompt the `keep` best, best first, as soon as all of them are there; with scores.

    Args:
        pictures: for each prompt in turn its candidates, each with ``image``, ``withheld``, ``spoilt`` and ``score``.
        settings: how many there are (``candidates``), what compares them (``reranker``), and ``prompt_weights``.
        device: where they are compared.
    """
    reranker, count = load_reranker(settings.reranker, device), settings.candidates
    for prompt in prompts:
        candidates: list[Any] = [next(pictures) for _ in range(count)]
        images, useless = [one.image for one in candidates], [one.withheld or one.spoilt for one in candidates]
        best, scores = best_of(images, [prompt], count, keep, reranker, useless, settings.prompt_weights)
        for number, score in zip(best, scores, strict=True):
            yield replace(candidates[number], score=score)
