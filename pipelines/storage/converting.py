"""Converting models between kinds of files: recognising a source, reading it, writing it whole."""

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DDIMScheduler

from latentdiff.interchange.adapter_files import EMBEDDING_NAMES, LORA_NAMES
from latentdiff.interchange.atomic import allow_as_usual, atomic_folder, failures_named
from latentdiff.interchange.folders import (
    check_links,
    check_model_files,
    check_pipeline_folder,
    find_model,
    read_json,
)
from latentdiff.interchange.hub import asking_hub
from latentdiff.interchange.packed import packed_content, unpacked
from latentdiff.interchange.single_file import Checkpoint, find_file, is_dit, text_kind
from latentdiff.interchange.single_file.checkpoint import PICKLED, load_pickle, state_of
from latentdiff.models.loras import refuse_loras
from latentdiff.pipelines.registry import KINDS, Kind, find_kind, kind_saved_as, kinds_of_unet
from latentdiff.pipelines.runtime.choice import Runtime
from latentdiff.pipelines.runtime.prepared import export
from latentdiff.pipelines.storage.folder import move_into, tidy_configs
from latentdiff.pipelines.storage.loading import (
    OUR_CLASSES,
    OURS_ALONE,
    load_network,
    only_variant,
    stored_dtype,
    stored_dtypes,
)

if TYPE_CHECKING:
    from latentdiff.pipelines import DiTPipeline

LATENT_DIFFUSION = "LDMTextToImagePipeline"
FEW = 8  # an embedding file holds at most this many tensors; with more it is taken for a model


def kind_of_source(source: str, allow_pickle: bool = False) -> str:
    """What a source holds: "folder" (a pipeline, also on the hub), "network", "checkpoint", "packed", "lora" or
    "embedding".

    A network is the folder of a UNet or an autoencoder alone; "packed", a file of `latentdiff.interchange.packed`.

    Raises:
        FileNotFoundError: there is nothing there.
        ValueError: a file is damaged, or pickled and `allow_pickle` is False.
    """
    place = Path(source).expanduser()
    if place.is_dir():
        if (place / "model_index.json").is_file():
            return "folder"
        names = {file.name for file in place.iterdir()}
        if names & {*LORA_NAMES, "adapter_config.json"} or any(place.glob("*/adapter_config.json")):
            return "lora"
        if network_class(place) is not None:
            return "network"
        return "embedding" if names & set(EMBEDDING_NAMES) else "folder"
    if not place.is_file():
        from latentdiff.interchange.single_file import ON_THE_HUB

        address = ON_THE_HUB.fullmatch(source)
        if address and address[3].endswith((".safetensors", *PICKLED)) and not place.parent.exists():
            return "checkpoint"
        if place.suffix in (".safetensors", *PICKLED):
            raise FileNotFoundError(f"{source}: no such file, and no owner/name/file on the Hugging Face hub")
        find_model(source)  # raises if it is nothing
        return "folder"
    if place.suffix == ".safetensors":
        from safetensors import safe_open

        if packed_content(place) is not None:
            return "packed"
        with safe_open(place, "pt") as stream:
            return kind_of_names(stream.keys())
    content = load_pickle(place, allow_pickle)
    return kind_of_names(state_of(content) if isinstance(content, dict) else [])


def network_class(folder: Path) -> str | None:
    """Which component of a pipeline a network's folder holds, "unet", "transformer" or "vae"; None if none of them."""
    if not (folder / "config.json").is_file():
        return None
    name = read_json(folder / "config.json").get("_class_name")
    return next((part for part in OUR_CLASSES if name in OUR_CLASSES[part] + OURS_ALONE[part]), None)


def network_alone(source: str, dtype: torch.dtype | None = None, variant: str | None = None) -> Any:
    """The network of a folder that holds nothing else; see `folder_pipeline`."""
    from latentdiff import models

    folder = Path(source).expanduser()
    check_links(folder, folder.glob("*"))
    check_model_files(folder)
    class_name = read_json(folder / "config.json")["_class_name"]
    variant = variant or only_variant(folder, "")
    dtype = dtype or stored_dtype(folder, variant) or torch.float32
    return load_network(folder, getattr(models, class_name), dtype, variant)


def only_part(source: str, allow_pickle: bool = False) -> str | None:
    """Which component a checkpoint holds, if that is an autoencoder, or DiT's transformer, and nothing else."""
    weights = Checkpoint(find_file(source, allow_pickle), allow_pickle)
    if is_dit(weights):
        return "transformer"
    return "vae" if weights.has_vae and not weights.has_unet and text_kind(weights) is None else None


def kind_of_names(names: Iterable[Any]) -> str:
    """What a file is, from the names of what it holds."""
    found = [str(name) for name in names]
    if any("lora" in name.lower() for name in found):
        return "lora"
    few = 0 < len(found) <= FEW and not any(name.endswith((".weight", ".bias")) for name in found)
    if few or {"emb_params", "string_to_param"} & set(found):
        return "embedding"
    return "checkpoint"


def folder_pipeline(source: str, dtype: torch.dtype | None = None, variant: str | None = None) -> Any:
    """The pipeline of a folder, a packaged model or one on the hub, as the class that the folder says.

    Args:
        dtype: of the weights; None leaves each component as it is on disk.
        variant: of the weight files to read; by default the one that there is, if there are no plain ones.

    Raises:
        FileNotFoundError, ValueError, OSError: see ``from_pretrained``; or it is a folder of another pipeline.
    """
    from latentdiff.pipelines import TextToImagePipeline

    folder = find_model(source)
    if folder is None:
        folder = Path(TextToImagePipeline.download(source, variant=variant, use_safetensors=True))
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"{folder} is neither a pipeline folder, with a model_index.json, nor a LoRA's")
    name = read_json(folder / "model_index.json").get("_class_name")
    kind = kind_saved_as(str(name))
    if name != LATENT_DIFFUSION and kind is None:
        known = list(dict.fromkeys(kind.saved_as[0] for kind in KINDS))
        raise ValueError(f"{folder} is of a {name}; these can be converted: {', '.join([*known, LATENT_DIFFUSION])}")
    variant = variant or only_variant(folder)
    dtypes = dtype or {**stored_dtypes(folder, variant), "default": torch.float32}
    if kind is None:
        return latent_diffusion_pipeline(folder, dtypes, variant)
    return kind.load().from_pretrained(folder, dtype=dtypes, variant=variant)


def packed_pipeline(file: Path, dtype: torch.dtype | None = None) -> Any:
    """The pipeline in a file of `latentdiff.interchange.packed`, as the class that the file says."""
    with unpacked(file) as folder:
        return folder_pipeline(str(folder), dtype)


def latent_diffusion_pipeline(folder: Path, dtype: Any, variant: str | None) -> Any:
    """Latent Diffusion's text-to-image model in a folder of diffusers' own pipeline for it, as one of ours.

    The components have other names there, and prompts are always cut at the text encoder's limit.

    Raises:
        FileNotFoundError, ValueError, OSError: see ``from_pretrained``.
    """
    import diffusers

    from latentdiff.pipelines import TextToImagePipeline

    check_pipeline_folder(folder)
    theirs = diffusers.LDMTextToImagePipeline.from_pretrained(
        str(folder), dtype=dtype, variant=variant, use_safetensors=True, local_files_only=True
    )
    tokenizer = theirs.tokenizer
    tokenizer.model_max_length = min(tokenizer.model_max_length, theirs.bert.config.max_position_embeddings)
    return TextToImagePipeline(theirs.vqvae, theirs.bert, tokenizer, theirs.unet, theirs.scheduler)


def checkpoint_pipeline(source: str, allow_pickle: bool, ema: bool, **options: Any) -> Any:
    """The pipeline of a single file, of the class that its UNet is for.

    Raises:
        FileNotFoundError, ValueError, OSError: see ``from_single_file``.
    """
    file = find_file(source, allow_pickle)
    return (
        checkpoint_kind(file, allow_pickle).load().from_single_file(file, allow_pickle=allow_pickle, ema=ema, **options)
    )


def checkpoint_kind(file: Path, allow_pickle: bool = False) -> Kind:
    """The kind of pipeline that a file of Stable Diffusion's layout holds, as its UNet's channels show.

    Raises:
        ValueError: it lacks a UNet or an autoencoder, or holds something else.
    """
    from latentdiff.interchange.single_file import check_checkpoint, is_refiner, unet_config, vae_config

    weights = Checkpoint(file, allow_pickle)
    check_checkpoint(weights)
    for name, has in (("unet", weights.has_unet), ("vae", weights.has_vae)):
        if not has:
            other = "vae" if name == "unet" else "unet"
            raise ValueError(f"{file} has no {name}; convert what it has alone, with --component {other}")
    unet, vae = weights.header.get("unet") or unet_config(weights), weights.header.get("vae") or vae_config(weights)
    if is_refiner(weights):
        return find_kind("SDXLImageToImagePipeline")
    fitting = kinds_of_unet(unet.get("in_channels", 4), vae.get("latent_channels", 4))
    return fitting[0] if fitting else KINDS[0]  # whose loader says what is wrong


def dit_pipeline(source: str, vae: str, dtype: torch.dtype | None = None, allow_pickle: bool = False) -> "DiTPipeline":
    """The pipeline of a released checkpoint of DiT, drawing as its code does: with DDIM, and this autoencoder.

    Args:
        vae: folder of an autoencoder or of a pipeline with one, a packaged model, or an autoencoder on the hub.

    Raises:
        FileNotFoundError, ValueError, OSError: one cannot be read, or they do not fit together.
    """
    from latentdiff.models import AutoencoderKL, DiTTransformer2DModel
    from latentdiff.pipelines import DiTPipeline

    folder = find_model(vae)
    if folder is None:
        with asking_hub(vae):
            autoencoder = AutoencoderKL.from_pretrained(vae, dtype=dtype or torch.float32)
    else:
        place = folder / "vae" if (folder / "vae").is_dir() else folder
        if network_class(place) != "vae":
            raise ValueError(f"{vae} holds no autoencoder")
        autoencoder = network_alone(str(place), dtype)
    transformer = DiTTransformer2DModel.from_single_file(source, dtype=dtype, allow_pickle=allow_pickle)
    return DiTPipeline(transformer, autoencoder, DDIMScheduler(clip_sample=False))


def write_folder(
    pipeline: Any, target: Path, variant: str | None, overwrite: bool, runtime: Runtime | None = None
) -> None:
    """Write a pipeline folder, whole or not at all; into an existing folder, file by file.

    Args:
        runtime: whose graphs come into it too.

    Raises:
        FileExistsError: there is something, and `overwrite` is False.
        ValueError: no runtime draws with such a pipeline.
    """
    if runtime is not None and not pipeline.for_runtimes:
        raise ValueError(f"a {type(pipeline).__name__} is drawn with by torch only; leave --runtime out")

    def write(folder: Path) -> None:
        pipeline.save_pretrained(folder, variant=variant)
        if runtime is not None:
            export(type(pipeline), folder, runtime, variant)

    if is_free(target, overwrite):
        with atomic_folder(target) as new:
            write(new)
    else:
        write(target)


def write_part(pipeline: Any, component: str, target: Path, variant: str | None, overwrite: bool) -> None:
    """Write one component as diffusers' (or transformers') folder; see `write_folder`."""
    refuse_loras({component: getattr(pipeline, component)}, "saved")
    free = is_free(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    with failures_named(target), tempfile.TemporaryDirectory(dir=target.parent, prefix=".saving-") as temporary:
        new = Path(temporary) / component
        getattr(pipeline, component).save_pretrained(new, variant=variant)
        tidy_configs(Path(temporary))
        allow_as_usual(Path(temporary))
        if free:
            os.replace(new, target)
        else:
            move_into(new, target, variant)


def part_weights(pipeline: Any, component: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """One component's weights under their original names, and the header of their file.

    An autoencoder's names lack their prefix, as in published files of autoencoders alone.
    """
    from latentdiff.interchange import single_file

    part = getattr(pipeline, component)
    if component == "vae":
        weights = single_file.autoencoder_alone(part)
    else:
        of = single_file.original_unet if component == "unet" else single_file.original_text_encoder
        weights = of(part)
    return weights, single_file.header_of_parts({component: single_file.plain_config(part)})


def is_free(target: Path, overwrite: bool) -> bool:
    """Whether there is nothing at `target`, or an empty folder.

    Raises:
        FileExistsError: there is something, and `overwrite` is False; or it is a file.
    """
    if target.is_dir() and not any(target.iterdir()):
        return True
    if target.exists() and (not overwrite or not target.is_dir()):
        raise FileExistsError(f"{target} is there already; choose another name, or --overwrite (overwrite=True)")
    return not target.exists()
