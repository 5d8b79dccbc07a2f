"""Pipeline folders to components: our networks where diffusers would build its own."""

import inspect
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.utils import logging
from torch import nn

from latentdiff.extensions import registered_network
from latentdiff.interchange.folders import DENOISERS, first_dtype, load_whole, read_json
from latentdiff.models.network import Network, check_finite
from latentdiff.pipelines.core.call_options import refuse_unknown

loader_log = logging.get_logger("diffusers.pipelines.pipeline_utils")  # which reports the other components
OUR_CLASSES: dict[str, tuple[str, ...]] = {
    "vae": ("AutoencoderKL", "VQModel", "AutoencoderTiny"),
    "vqvae": (
        "AutoencoderKL",
        "VQModel",
        "AutoencoderTiny",
    ),  # what diffusers calls the autoencoder where there is no text
    "unet": ("UNet2DConditionModel", "UNet2DModel"),
    "transformer": ("DiTTransformer2DModel", "PixArtTransformer2DModel"),
    "classifier": (),
}
"""Per component, the classes of diffusers that we have our own version of."""

OURS_ALONE: dict[str, tuple[str, ...]] = {
    "vae": ("GumbelVQModel", "FSQModel", "IdentityAutoencoder", "DalleAutoencoder"),
    "vqvae": ("GumbelVQModel", "FSQModel", "IdentityAutoencoder", "DalleAutoencoder"),
    "unet": (),
    "transformer": ("TokenTransformer",),
    "classifier": ("NoisyClassifier",),
}
"""Per component, our classes that diffusers has nothing like. A folder names them with the module they are in."""

TRANSFORMERS = {
    "transformers": "transformers",
    "stable_diffusion": "diffusers.pipelines.stable_diffusion",
    "latent_diffusion": "diffusers.pipelines.latent_diffusion",
}
"""Modules with classes of transformers' models, by the libraries in a folder's index."""

OLD_CLASS = "Transformer2DModel"
"""What diffusers' transformers were called in the folders of the first releases."""

ALIGNMENT = 64  # bytes

WEIGHTS = re.compile(r"(?:diffusion_pytorch_model|model)(?:\.([\w-]+?))?(?:-\d+-of-\d+)?\.safetensors")

DIFFUSERS_OPTIONS = (
    *("dtype", "torch_dtype", "variant", "use_safetensors", "device_map", "max_memory", "low_cpu_mem_usage"),
    *("offload_folder", "offload_state_dict", "disable_mmap", "revision", "custom_revision", "token", "cache_dir"),
    *("local_files_only", "force_download", "proxies", "load_connected_pipeline", "runtime", "runtime_shape"),
)
"""Arguments of diffusers' ``from_pretrained`` that are taken here, besides components; and two of ours."""

UNSUPPORTED_OPTIONS = {
    "custom_pipeline": "it would run code from the folder",
    "trust_remote_code": "it would run code from the folder",
    "use_onnx": "there are no ONNX networks here",
    "use_flashpack": "weights are read from safetensors files",
    "quantization_config": "quantised networks cannot be loaded yet",
}


def refuse_options(pipeline_class: type, options: Mapping[str, Any]) -> None:
    """Refuse options of ``from_pretrained`` that would do nothing, or harm, here.

    Raises:
        TypeError: there is no such option, nor a component of that name.
        ValueError: diffusers has it, and it is not supported.
    """
    if "device" in options:
        raise TypeError(
            f"{pipeline_class.__name__}.from_pretrained: unknown argument 'device'; load the pipeline, then "
            f".to({str(options['device'])!r})"
        )
    known = {*DIFFUSERS_OPTIONS, *UNSUPPORTED_OPTIONS, *inspect.signature(pipeline_class).parameters}
    refuse_unknown(f"{pipeline_class.__name__}.from_pretrained: unknown argument", options, sorted(known))
    for name, why in UNSUPPORTED_OPTIONS.items():
        if options.get(name):
            raise ValueError(f"from_pretrained: {name} is not supported: {why}")
    if options.get("device_map") is not None and not names_device(options["device_map"]):
        raise ValueError(
            f"from_pretrained: device_map={options['device_map']!r} is not supported: a pipeline here is on one "
            f"device, such as 'cuda'"
        )
    if not options.get("use_safetensors", True):
        raise ValueError("from_pretrained: use_safetensors=False is not supported: pickled weights can run code")


def load_networks(
    folder: Path,
    index: Mapping[str, Any],
    dtype: torch.dtype | dict[str, torch.dtype],
    variant: str | None,
    unet_classes: Sequence[str],
) -> dict[str, nn.Module]:
    """The networks of a pipeline folder: autoencoder, denoiser and classifier as our classes, others as transformers'.

    Args:
        folder: checked already.
        index: of the folder, less what need not be loaded.
        dtype: of all weights, or per component, with "default" for the rest.
        variant: such as "fp16": the weight files to take where a component has them.
        unet_classes: what the denoiser may be; the first is the one where a folder names `OLD_CLASS`.

    Raises:
        ValueError: a component is of a class that we have no version of, lacks weights, or has nan or inf among them.
    """
    import latentdiff.models as models

    networks = {}
    for name, of_diffusers in OUR_CLASSES.items():
        denoises = name in DENOISERS
        class_names = tuple(unet_classes) if denoises else of_diffusers + OURS_ALONE[name]
        if name not in index or index[name][0] is None:
            continue
        class_name = unet_classes[0] if denoises and index[name][1] == OLD_CLASS else index[name][1]
        network_class = registered_network(*index[name]) or getattr(models, class_name, None)
        if class_name not in class_names and registered_network(*index[name]) is None:
            hint = ""
            if class_name == "UNet2DModel":
                hint = (
                    " (it takes no prompt, being a model of classes or of nothing; draw with latentdiff generate, "
                    "UnconditionalPipeline or ClassConditionalPipeline)"
                )
            if class_name == "TokenTransformer":
                hint = " (a model of codes draws from words, and within a mask: give an image with a mask)"
            wanted = " or ".join(class_names)
            raise ValueError(f"{folder}: its {name} is a {class_name}; this pipeline takes {wanted}{hint}")
        networks[name] = load_network(folder / name, network_class, dtype_of(name, dtype), variant)
        loader_log.info(f"Loaded {name} as {class_name} from `{name}` subfolder of {folder}.")
    for name, value in index.items():
        model_class = transformers_class(value)
        if model_class is not None:
            own = dtype_of(name, dtype)
            networks[name] = load_whole(model_class, folder / name, dtype=own, **variant_of(folder / name, variant))
            align(networks[name])
            loader_log.info(f"Loaded {name} as {value[1]} from `{name}` subfolder of {folder}.")
    return networks


KINDS_OF_VALUES = {bool: (bool,), int: (int, float), float: (int, float), str: (str,)}
"""By the type of a scheduler's default, the types that a value in a config may have."""


def check_schedulers(folder: Path, index: Mapping[str, Any]) -> None:
    """Look at the types of values in the configs of a folder's schedulers, before one fails by them, or in a call.

    Raises:
        ValueError: one is of another type than the scheduler takes; with file, key and value.
    """
    for name, entry in index.items():
        file = folder / name / "scheduler_config.json"
        if (
            isinstance(entry, list)
            and file.is_file()
            and isinstance(kind := getattr(diffusers, str(entry[1]), None), type)
        ):
            usual = {key: one.default for key, one in inspect.signature(kind).parameters.items()}
            for key, value in read_json(file).items():
                check_value(f"{file}: its {key}", value, usual.get(key))


def check_value(what: str, value: Any, usual: Any) -> None:
    """Raises ValueError, beginning with `what`, for a value in a config of another type than `usual`, its default.

    None is left to the scheduler, unless it would compute with it.
    """
    known = KINDS_OF_VALUES.get(type(usual))
    betas = what.endswith((" beta_start", " beta_end"))
    if known is not None and type(value) not in known and (value is not None or betas):
        kinds = {bool: "true or false", str: "a text"}
        raise ValueError(f"{what} is {json.dumps(value)[:200]}; it should be {kinds.get(type(usual), 'a number')}")


def small_parts(folder: Path, index: Mapping[str, Any], loaded: Iterable[str]) -> dict[str, Any] | None:
    """What is left of a pipeline folder besides networks, if that is only schedulers and tokenizers; else None.

    diffusers' loader of pipelines would load them likewise, but imports its own pipelines and ONNX before.
    """
    import diffusers
    import transformers

    found = {}
    for name, (library, class_name) in index.items():
        if name in loaded:
            continue
        kind: Any = getattr(diffusers if library == "diffusers" else transformers, class_name, None)
        is_scheduler = library == "diffusers" and class_name.endswith("Scheduler")
        is_tokenizer = library == "transformers" and class_name.endswith(("Tokenizer", "TokenizerFast"))
        if not isinstance(kind, type) or not (is_scheduler or is_tokenizer):
            return None
        found[name] = kind.from_pretrained(str(folder / name))  # type: ignore[attr-defined]
        loader_log.info(f"Loaded {name} as {class_name} from `{name}` subfolder of {folder}.")
    return found


def transformers_class(entry: Any) -> Any:
    """The class of transformers' models that an entry of a folder's index names; None for other classes."""
    library = entry[0] if isinstance(entry, list) and len(entry) == 2 else None
    if library not in TRANSFORMERS:
        return None
    from transformers import PreTrainedModel

    named = getattr(import_module(TRANSFORMERS[library]), entry[1], None)
    return named if isinstance(named, type) and issubclass(named, PreTrainedModel) else None


def dtype_of(name: str, dtype: torch.dtype | dict[str, torch.dtype]) -> torch.dtype:
    return dtype.get(name, dtype.get("default", torch.float32)) if isinstance(dtype, dict) else dtype


def stored_dtypes(folder: Path, variant: str | None) -> dict[str, torch.dtype]:
    """The precision of each component on disk, by that of its first weight."""
    parts = sorted(path for path in folder.iterdir() if path.is_dir())
    found = {part.name: stored_dtype(part, variant) for part in parts}
    return {name: dtype for name, dtype in found.items() if dtype is not None}


def stored_dtype(part: Path, variant: str | None) -> torch.dtype | None:
    """The precision of the first weight in a component's folder; None if it has none."""
    files = [(file, match[1]) for file in sorted(part.glob("*.safetensors")) if (match := WEIGHTS.fullmatch(file.name))]
    chosen = [file for file, its in files if its == variant] or [file for file, its in files if its is None]
    return first_dtype(chosen[0]) if chosen else None


def variant_of(folder: Path, variant: str | None) -> dict[str, str]:
    """The argument for a component's loader: the variant, if the component has weights of it."""
    return {"variant": variant} if variant and any(folder.glob(f"*.{variant}*.safetensors")) else {}


def load_network(folder: Path, network_class: Any, dtype: torch.dtype, variant: str | None = None) -> nn.Module:
    """The network in a component's folder, of one of our classes or a registered one; see `load_networks`."""
    try:
        network, info = network_class.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            **variant_of(folder, variant),
        )
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{folder}: {shortened(error).removeprefix(f'{folder}: ')}") from error
    missing = sorted(info["missing_keys"])
    if missing:  # diffusers would leave them at random values
        raise ValueError(
            f"{folder}: the weights do not fit config.json; {len(missing)} are missing, such as {missing[0]}"
        )
    align(network)
    if not isinstance(network, Network):  # which looks itself
        check_finite(network, folder)
    return network


def align(network: nn.Module) -> None:
    """Move weights that begin anywhere in memory, as in a mapped file, to where torch puts tensors of its own.

    Some kernels add up in another order where weights begin elsewhere, so that the same pictures would differ in their
    last bits before saving and after loading.
    """
    for tensor in itertools.chain(network.parameters(), network.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()


def shortened(error: Exception) -> str:
    """The message of diffusers' loader, without its advice to load with random weights instead."""
    shapes = re.search(
        r"because (\S+) expected shape (?:torch\.Size\()?(.*?)\)?, but got (?:torch\.Size\()?(.*?)\)?\.", str(error)
    )
    if shapes is None:
        return str(error)
    key, wanted, found = shapes.groups()
    return f"the weights do not fit config.json: {key} should have the shape {wanted}, and has {found}"


def only_variant(folder: Path, part: str | None = None) -> str | None:
    """The variant of a folder's weights, if one of its parts, the denoiser, has one and no plain weights."""
    if part is None:
        part = next((name for name in DENOISERS if (folder / name).is_dir()), DENOISERS[0])
    found = {match[1] for file in (folder / part).glob("*.safetensors") if (match := WEIGHTS.fullmatch(file.name))}
    return found.pop() if len(found) == 1 else None


def names_device(value: Any) -> bool:
    """Whether it is a device, or the name of one."""
    try:
        torch.device(value)
    except (RuntimeError, TypeError):
        return False
    return True
