"""Embeddings of new words (Textual Inversion, Gal et al. 2022): read in diffusers' and A1111's formats, and written.

diffusers': a tensor under its word. A1111's: a safetensors file with ``emb_params``, or a pickled one with
``string_to_param``; both are named after the word.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from latentdiff.interchange.adapter_files import EMBEDDING_NAMES, PICKLED, SAFE, find_adapter, save_whole

PICKLED_NAMES = (*EMBEDDING_NAMES, "learned_embeds.bin")
MOST_VALUES = 2**22
"""Of a word: 1,000 vectors of the widest text encoders, and more than a prompt has room for. A strided tensor in a
pickle can claim any number in a few bytes."""

OF_TWO = ("clip_l", "clip_g")
"""Names of a word's vectors for SDXL's two text encoders; the file is named after the word."""
WORD_KEY = "word"
"""In the header of such a file of ours: the word."""

EmbeddingFormat = Literal["diffusers", "a1111"]


@dataclass(frozen=True)
class EmbeddingReport:
    """What `convert_embedding` did."""

    source_format: str
    file: Path
    words: dict[str, tuple[int, int]]
    """For each word, the number of its vectors and their width."""


def convert_embedding(
    source: Path,
    target: Path,
    allow_pickle: bool = False,
    token: str | None = None,
    *,
    to: EmbeddingFormat = "diffusers",
    overwrite: bool = False,
) -> EmbeddingReport:
    """Write the embeddings of a new word as a safetensors file in diffusers' or A1111's format.

    Args:
        source: a file, or a folder with one; see above.
        target: a safetensors file. In A1111's format its name is the word.
        allow_pickle: read ``.pt`` and ``.bin`` files as well, tensors only; nothing in them is run.
        token: the word; by default that of the file.
        overwrite: replace ``target`` if it exists.

    Raises:
        FileNotFoundError: there is no such file.
        FileExistsError: ``target`` exists, and ``overwrite`` is False.
        ValueError: the source is damaged or holds no embeddings, or the format cannot hold them.
    """
    source, target = Path(source).expanduser(), Path(target).expanduser()
    if to not in get_args(EmbeddingFormat):
        raise ValueError(f"unknown format of embeddings {to!r}; choose from {', '.join(get_args(EmbeddingFormat))}")
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such file or folder")
    if target.suffix not in SAFE:
        raise ValueError(f"{target}: embeddings are written as a safetensors file; give a name ending in .safetensors")
    if target.is_dir() or (target.exists() and not overwrite):
        raise FileExistsError(f"{target} is there already; choose another name, or --overwrite (overwrite=True)")
    file, content = read_file(source, None, allow_pickle, {})
    words = embeddings_of(content, token, file)
    if to == "a1111" and len(words) > 1:
        raise ValueError(f"{file} holds {len(words)} words ({', '.join(words)}); a file of A1111's holds one")
    tensors = {"emb_params": next(iter(words.values()))} if to == "a1111" else words
    save_whole(tensors, target, {"format": "pt"})
    sizes = {word: (len(vectors), vectors.shape[1]) for word, vectors in words.items()}
    return EmbeddingReport(format_of(content), target, sizes)


def find_embeddings(
    source: Any, token: str | list[str] | None, weight_name: str | None, allow_pickle: bool, hub: Mapping[str, Any]
) -> list[tuple[str, Tensor]]:
    """Words and their vectors (n, D), of any source that a pipeline's ``load_textual_inversion`` takes.

    Raises:
        FileNotFoundError, ValueError: see there.
    """
    sources = source if isinstance(source, list) else [source]
    tokens = token if isinstance(token, list) else [token] * len(sources)
    if isinstance(source, Tensor) and len(tokens) > 1:
        sources = list(source)  # one vector for each word
    if len(tokens) != len(sources):
        raise ValueError(f"{len(tokens)} words were given for {len(sources)} embeddings; give one for each")
    found: list[tuple[str, Tensor]] = []
    for one, word in zip(sources, tokens, strict=True):
        file: Path | None = None
        if not isinstance(one, Tensor | Mapping):
            file, one = read_file(one, weight_name, allow_pickle, hub)
        found += embeddings_of(one, word, file).items()
    words = [word for word, _ in found]
    for word in words:
        if words.count(word) > 1:
            raise ValueError(f"there are {words.count(word)} embeddings for the word {word!r}; give one")
    return found


def read_file(
    source: str | Path, weight_name: str | None, allow_pickle: bool, hub: Mapping[str, Any]
) -> tuple[Path, Any]:
    """The file that `source` refers to, and its unchecked content."""
    names, suffixes = (PICKLED_NAMES, PICKLED) if allow_pickle else (EMBEDDING_NAMES, SAFE)
    try:
        file = find_adapter(source, names, weight_name, suffixes, **hub)
    except ValueError as error:
        if not allow_pickle and str(weight_name or source).endswith(PICKLED[1:]):
            raise ValueError(f"{error}; allow_pickle=True reads the tensors of this one and runs nothing") from None
        raise
    if file.suffix in SAFE:
        return file, load_file(file)
    from latentdiff.interchange.single_file.checkpoint import load_pickle

    return file, load_pickle(file, allow_pickle, [nn.ParameterDict])  # the original code's files hold one


def find_joint_embeddings(
    source: Any, token: str | None, weight_name: str | None, hub: Mapping[str, Any], *, second_alone: bool = False
) -> tuple[str, list[Tensor]]:
    """A word and its vectors (n, D1) and (n, D2), for SDXL's two text encoders.

    Args:
        source: a safetensors file, a folder, an ``owner/name`` on the hub, or {"clip_l": ..., "clip_g": ...}.
        second_alone: the vectors (n, D2) alone, which SDXL's refiner takes; the others may be missing.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is of another kind, or damaged.
    """
    file: Path | None = None
    header: dict[str, str] = {}
    if not isinstance(source, Mapping):
        file, source = read_file(source, weight_name, False, hub)
        with safe_open(file, "pt") as stream:
            header = stream.metadata() or {}
    where = "these embeddings" if file is None else str(file)
    needed = OF_TWO[1:] if second_alone else OF_TWO
    if not set(needed) <= set(source) <= set(OF_TWO):
        raise ValueError(
            f"{where}: it holds {', '.join(sorted(source)[:5])}; "
            + ("the one text encoder of SDXL's refiner needs" if second_alone else "SDXL's two text encoders need")
            + f" {' and '.join(needed)}, and nothing else"
        )
    word = check_word(token or header.get(WORD_KEY) or (file.stem if file else None), where)
    vectors = [check_vectors(word, source[name], where) for name in needed]
    if len(vectors[0]) != len(vectors[-1]):
        raise ValueError(
            f"{where}: clip_l has {len(vectors[0])} vectors and clip_g {len(vectors[1])}; one word has as many"
        )
    return word, vectors


def format_of(content: Any) -> str:
    keys = set(content) if isinstance(content, Mapping) else set()
    return "a1111" if keys & {"string_to_param", "emb_params"} else "diffusers"


def embeddings_of(content: Any, token: str | None, file: Path | None) -> dict[str, Tensor]:
    """Words and their vectors (n, D).

    Raises:
        ValueError: there are none, or it is not clear for which word they are.
    """
    where = "these embeddings" if file is None else str(file)
    if isinstance(content, Tensor):
        content = {"emb_params": content}
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{where}: no embeddings in it, but a {type(content).__name__}")
    if set(OF_TWO) & set(content):
        raise ValueError(f"{where}: its embeddings (clip_l, clip_g) are for Stable Diffusion XL, with two encoders")
    if "string_to_param" in content:
        params = content["string_to_param"]
        vectors = list(params.values()) if isinstance(params, Mapping | nn.ParameterDict) else []
        if len(vectors) != 1:
            raise ValueError(f"{where}: its string_to_param holds {len(vectors)} embeddings, not one")
        own = check_word(token or content.get("name") or (file.stem if file else None), where)
        words: dict[str | None, Any] = {own: vectors[0]}
    elif "emb_params" in content:
        words = {token or (file.stem if file else None): content["emb_params"]}
    elif token is not None and len(content) > 1:
        raise ValueError(f"{where}: there are {len(content)} words ({', '.join(content)}); one token cannot name them")
    else:
        words = {token or word: vectors for word, vectors in content.items()}
    return {check_word(word, where): check_vectors(word, vectors, where) for word, vectors in words.items()}


def check_word(word: Any, where: str) -> str:
    if word is None:
        raise ValueError(f"{where}: nothing says which word they are for; give one with token='<word>'")
    if not isinstance(word, str) or not word.strip() or not word.isprintable():
        raise ValueError(f"{where}: {word!r} cannot be a word; give one with token='<word>'")
    return word


def check_vectors(word: Any, vectors: Any, where: str) -> Tensor:
    """(n, D), from vectors of shape (n, D) or (D,), after checking them."""
    if not isinstance(vectors, Tensor):
        raise ValueError(f"{where}: {word!r} is a {type(vectors).__name__}, not a tensor")
    if vectors.numel() > MOST_VALUES:
        raise ValueError(f"{where}: the embedding {word!r} has {vectors.numel()} values; a word has a few vectors")
    if vectors.ndim not in (1, 2) or 0 in vectors.shape or not vectors.is_floating_point():
        raise ValueError(
            f"{where}: the embedding {word!r} has {vectors.dtype} and the shape {tuple(vectors.shape)}; one vector for "
            f"each token is expected"
        )
    if not vectors.float().isfinite().all():
        raise ValueError(f"{where}: the embedding {word!r} has values that are not finite (nan or inf)")
    return vectors.detach().reshape(-1, vectors.shape[-1])
