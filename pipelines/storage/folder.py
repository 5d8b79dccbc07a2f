"""Pipelines as folders: loaded with our networks, saved as diffusers' own."""

import inspect
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers import DiffusionPipeline

from latentdiff.interchange.atomic import allow_as_usual, failures_named, json_text
from latentdiff.interchange.folders import check_pipeline_folder, find_model, read_json
from latentdiff.interchange.hub import asking_hub
from latentdiff.interchange.user_files import faults_named
from latentdiff.models.loras import refuse_loras
from latentdiff.pipelines.core.call_options import positive_whole, real_number, whole_number
from latentdiff.pipelines.registry import DEFAULTS, DEFAULTS_KEY, KINDS, kind_of_family, kind_saved_as
from latentdiff.pipelines.runtime.choice import dtype_in, runtime_of
from latentdiff.pipelines.runtime.engine_networks import refuse_runtimes
from latentdiff.pipelines.storage.loading import (
    OUR_CLASSES,
    check_schedulers,
    load_networks,
    only_variant,
    refuse_options,
    small_parts,
)
from latentdiff.pipelines.storage.packed import PackedPipeline
from latentdiff.text.load import check_vocabulary

logger = logging.getLogger(__name__)

UNUSED = {"variant", "local_files_only", "force_download", "revision", "token", "cache_dir"}
"""Options of loading that mean nothing where the folder is here and its networks are loaded."""

AS_IT_IS = object()  # a dtype that changes nothing


class FolderPipeline(PackedPipeline, DiffusionPipeline):
    """A ``DiffusionPipeline`` whose folder is one of diffusers'.

    ``model_index.json`` names `saved_class_name` and diffusers' classes, so plain diffusers loads what this one saves,
    and this one loads what diffusers saves.
    """

    saved_class_name: ClassVar[str]
    usual_defaults: ClassVar[dict[str, Any]] = DEFAULTS
    unet_classes: ClassVar[tuple[str, ...]] = ("UNet2DConditionModel",)
    """Of a folder's UNet."""
    for_runtimes: ClassVar[bool] = True
    """Whether other runtimes than torch can run its networks."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path | None = None, **options: Any) -> Self:
        """Load a pipeline: a packaged model by its name, a folder, or an ``owner/name`` on the hub.

        What the folder holds decides the class: of an SDXL folder this is the class for SDXL that does the same.

        Args:
            pretrained_model_name_or_path: None stands for the packaged default model.
            options: those of diffusers' ``from_pretrained``: ``dtype`` or, by its older name, ``torch_dtype`` (float32
                by default, whatever is on disk), ``variant`` (by default the only one, if there are no plain weights),
                components that replace the folder's, ``device_map`` (a single device), and for the hub ``revision``,
                ``token`` and so on. ``runtime``: "openvino" or "onnx" runs denoiser and autoencoder instead of torch,
                on the processor; ``dtype`` is then its precision, torch.int8 too, and ``runtime_shape`` the (pictures,
                height, width) of every call, if only one shape is drawn.

        Raises:
            ImportError: the runtime is not installed.
            FileNotFoundError: no such folder, or a part of it is missing.
            ValueError: a file is damaged, or an option or a component is not supported.
            TypeError: an unknown option.
            OSError: the hub cannot be asked, or has no such model.
        """
        source = pretrained_model_name_or_path
        folder = find_model(source)
        if folder is not None and (own := cls.of_folder(folder)) is not cls:
            return own.from_pretrained(folder, **options)
        refuse_options(cls, options)
        if folder is not None:
            cls.refuse_runtime(options.get("runtime"))  # first, for the extra would not help
        runtime = runtime_of(options)
        device = options.pop("device_map", None)
        if folder is None:
            folder = Path(cls.download(str(source), **{**options, "use_safetensors": True}))
            if (own := cls.of_folder(folder)) is not cls:
                again = {"runtime": runtime, "device_map": device}
                return own.from_pretrained(folder, **options, **{k: v for k, v in again.items() if v is not None})
        cls.refuse_runtime(runtime)
        if runtime is not None:
            from latentdiff.pipelines.runtime.prepared import load

            return load(cls, folder, runtime, options)
        dtype = dtype_in(options) or torch.float32
        index = check_pipeline_folder(folder, options)
        wanted = {name: value for name, value in index.items() if name not in options}
        asked = options.get("variant")
        there = asked is None or any(f".{asked}" in file.name for file in folder.glob("*/*.safetensors"))
        if asked is None:
            options["variant"] = only_variant(folder)
        with faults_named(folder, foreign=True):
            check_schedulers(folder, wanted)
            networks = load_networks(folder, wanted, dtype, options["variant"], cls.unet_classes)
            cls.check_complete(folder, index, options)
            simple = there and options.keys() <= UNUSED  # diffusers says which variants there are instead
            pipeline = cls.assembled(folder, index, networks) if simple else None
            if pipeline is None:
                options |= {**networks, "dtype": dtype, "use_safetensors": True}
                pipeline = super().from_pretrained(str(folder), **options)
            for number in ("", "_2"):
                tokenizer = getattr(pipeline, f"tokenizer{number}", None)
                if f"tokenizer{number}" in wanted and tokenizer is not None:
                    encoder = getattr(pipeline, f"text_encoder{number}")
                    check_vocabulary(tokenizer, str(folder / f"tokenizer{number}"), encoder)
            pipeline.register_defaults(**index.get(DEFAULTS_KEY, {}))
        return pipeline if device is None else pipeline.to(device)

    @classmethod
    def refuse_runtime(cls, runtime: Any) -> None:
        """Raises ValueError if a runtime is asked for that does not draw with this class's models."""
        if runtime is not None and not cls.for_runtimes:
            raise ValueError(f"a {cls.__name__} is drawn with by torch only; leave runtime (--runtime) out")

    @classmethod
    def of_folder(cls, folder: Path) -> type[Self]:
        """This class, or the one that does the same for the family of models that the folder is of.

        Raises:
            ValueError: the folder is of another family than this class is for.
        """
        file = folder / "model_index.json"
        index = read_json(file) if file.is_file() else {}
        saved_as = index.get("_class_name")
        kind = kind_of_family(cls.__name__, saved_as)
        if kind is None:
            refuse_other_family(cls.__name__, folder, saved_as)
            return cls
        found: type[Self] = kind.load()
        if not issubclass(found, cls):
            raise ValueError(
                f"{folder} is of a {saved_as}, which {cls.__name__} cannot draw with: it is for another family of "
                f"models, with other text encoders; load it with {kind.name}"
            )
        return found

    @classmethod
    def check_complete(cls, folder: Path, index: dict[str, Any], given: Mapping[str, Any]) -> None:
        """Raises ValueError if neither a folder's index nor what is given has a component that the class must have."""
        parameters = inspect.signature(cls.__init__).parameters
        needed = [name for name, one in parameters.items() if one.default is inspect.Parameter.empty and name != "self"]
        there = {name for name, value in index.items() if isinstance(value, list) and value and value[0] is not None}
        lacking = [name for name in needed if name not in {*there, *given, *cls._optional_components}]
        if lacking:
            raise ValueError(
                f"{folder / 'model_index.json'}: names no {' and no '.join(lacking)}, which a {index['_class_name']} "
                f"has; part of it is missing, or it is of another kind of model"
            )

    @classmethod
    def assembled(cls, folder: Path, index: dict[str, Any], networks: dict[str, Any]) -> Self | None:
        """The pipeline of these networks and a folder's schedulers and tokenizers; None if there is more in the folder,
        or less than the constructor needs, with which diffusers' loader knows what to do.
        """
        parameters = inspect.signature(cls.__init__).parameters
        named = {name: value for name, value in index.items() if name in parameters}
        parts = {name: value for name, value in named.items() if isinstance(value, list)}
        there = {name: value for name, value in parts.items() if value[0] is not None}
        required = [
            name for name, one in parameters.items() if one.default is inspect.Parameter.empty and name != "self"
        ]
        if not set(required) <= set(there) or not set(there) >= set(networks):
            return None
        small = small_parts(folder, there, networks)
        if small is None:
            return None
        settings = {name: value for name, value in named.items() if name not in parts}
        pipeline = cls(**dict.fromkeys(set(parts) - set(there)), **networks, **small, **settings)
        pipeline.register_to_config(_name_or_path=str(folder))
        return pipeline

    @classmethod
    def download(cls, pretrained_model_name: Any, **options: Any) -> Any:
        """Fetch a model from the hub, as in diffusers. Raises OSError if that cannot be asked, or has no such model."""
        with asking_hub(pretrained_model_name):
            return super().download(pretrained_model_name, **options)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **options: Any) -> Self:
        """A pipeline of this class that shares the networks of another, ours or diffusers'; nothing is copied.

        Args:
            options: components that replace those of `pipeline`, and ``dtype``, to which the shared networks are cast;
                by default they keep their precision (diffusers' pipelines cast them to float32).

        Raises:
            ValueError: `pipeline` lacks a component.
        """
        kind = kind_of_family(cls.__name__, type(pipeline).__name__)
        if kind is None:  # our classes are kinds by their own name
            kind = kind_of_family(cls.__name__, getattr(pipeline, "saved_class_name", None))
        if kind is not None and issubclass(own := kind.load(), cls):
            return own.from_pipe(pipeline, **options)
        if options.get("dtype") is None and options.get("torch_dtype") is None:
            options = {**options, "dtype": AS_IT_IS, "torch_dtype": None}
        return super().from_pipe(pipeline, **options)

    def to(self, *args: Any, **options: Any) -> Self:
        """To a device or a precision, as in diffusers. Raises ValueError if this machine has no such device."""
        for wanted in (*args, options.get("device"), options.get("torch_device")):
            if isinstance(wanted, str | torch.device):
                check_device(torch.device(wanted))
        return self if options.get("dtype") is AS_IT_IS else super().to(*args, **options)

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **options: Any,
    ) -> None:
        """Write a folder that this class and plain diffusers load; other files in it are kept.

        Files are written to a temporary folder and then moved into place, ``model_index.json`` last.

        Args:
            save_directory: made if need be.
            safe_serialization: has no effect, weights are always written as safetensors; False logs a warning.
            variant: such as "fp16", a part of the weight files' names.
            max_shard_size: of one weight file, such as "15MB".
            push_to_hub: upload too; ``options`` are then ``repo_id``, ``token``, ``private`` and so on.

        Raises:
            ValueError: there are LoRAs in a network, fused ones included, which such a folder cannot hold; nothing is
                written.
        """
        refuse_loras(self.components, "saved")
        refuse_runtimes(self.components, "saved")
        if not safe_serialization:
            logger.warning(
                "safe_serialization=False has no effect: weights are always written as safetensors, never as pickles"
            )
        folder = Path(save_directory)
        with failures_named(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with failures_named(folder), tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
            new = Path(temporary) / folder.name
            super().save_pretrained(new, variant=variant, max_shard_size=max_shard_size)
            tidy_configs(new)
            allow_as_usual(new)
            move_into(new, folder, variant)
        if push_to_hub:
            self.push_to_hub(options.pop("repo_id", folder.name), variant=variant, **options)

    @classmethod
    def _get_signature_types(cls) -> dict[str, tuple[Any, ...]]:
        """As in diffusers; what a runtime runs is as good as what torch does."""
        from latentdiff.pipelines.runtime.engine_networks import RuntimeAutoencoder, RuntimeUNet

        types = super()._get_signature_types()
        more: dict[str, type] = dict.fromkeys(("unet", "transformer"), RuntimeUNet)
        more |= dict.fromkeys(("vae", "vqvae"), RuntimeAutoencoder)
        return {name: (*known, more[name]) if name in more else known for name, known in types.items()}

    def register_to_config(self, **values: Any) -> None:
        """As in diffusers; our networks are registered as the diffusers classes that read the same files."""
        for name, value in values.items():
            ours = isinstance(value, tuple) and str(value[0]).startswith("latentdiff.")
            if ours and value[1] in OUR_CLASSES.get(name, ()):
                values[name] = ("diffusers", value[1])
        super().register_to_config(**values)

    def to_json_string(self) -> str:
        """The content of ``model_index.json``, without the path this pipeline was loaded from."""
        index = json.loads(super().to_json_string())
        index.pop("_name_or_path", None)
        return json_text({**index, "_class_name": self.saved_class_name})

    def register_defaults(self, **defaults: float) -> None:
        """Set what a call of this model uses for ``num_inference_steps`` and ``guidance_scale``; saved with it.

        Raises:
            TypeError: a value is no number of the kind.
            ValueError: another name, a value that is not finite, or no step.
        """
        for name, value in defaults.items():
            if name not in DEFAULTS:
                raise ValueError(f"unknown default {name!r}; a model can have {', '.join(DEFAULTS)}")
            read = whole_number if name == "num_inference_steps" else real_number
            defaults[name] = read(value, name)
            if name == "num_inference_steps":
                positive_whole(value, name)
        if defaults:
            self.register_to_config(**{DEFAULTS_KEY: {**self.registered_defaults, **defaults}})

    @property
    def defaults(self) -> dict[str, Any]:
        """``num_inference_steps`` and ``guidance_scale`` of a call that does not give them."""
        return {**self.usual_defaults, **self.registered_defaults}

    @property
    def registered_defaults(self) -> dict[str, Any]:
        """What was set by ``register_defaults``."""
        return dict(self.config.get(DEFAULTS_KEY, {}))


def refuse_other_family(class_name: str, folder: Path, saved_as: object) -> None:
    """Raises ValueError if a folder is of a family in which no kind does what the class of that name does."""
    own, theirs = next((one for one in KINDS if one.name == class_name), None), kind_saved_as(str(saved_as))
    if own is not None and theirs is not None and own.family != theirs.family:
        draws = {"text": "from a prompt", "picture": "from a picture", "class": "classes", "none": "without a prompt"}
        raise ValueError(
            f"{folder} is of a {saved_as}, which draws {draws[theirs.conditioned_by]}, and {class_name} cannot draw "
            f"with it; load it with {theirs.name}"
        )


def check_device(device: torch.device) -> None:
    """Raises ValueError if this machine has no such device."""
    there: dict[str, Any] = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    if device.type in there and not there[device.type]():
        raise ValueError(
            f"this machine has no {device.type} device that torch can use (torch {torch.__version__}); draw on 'cpu', "
            f"or install a driver and a torch that is made for it"
        )


def tidy_configs(folder: Path) -> None:
    """Make the saved components' configs independent of this machine.

    The path a component was loaded from is removed. The text encoder's dtype becomes float32: by default diffusers
    loads its networks in float32, but transformers uses the dtype in the config, so a folder in half precision would be
    loaded in two precisions, which cannot draw together.
    """
    for file in folder.glob("*/config.json"):
        config = json.loads(file.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)
        if file.parent.name.startswith("text_encoder"):
            config["dtype"] = "float32"
        file.write_text(json_text(config), encoding="utf-8")


def move_into(new: Path, folder: Path, variant: str | None) -> None:
    """Move all files below `new` to the same places below `folder`, the index last, each whole.

    Weight files of an earlier save that the new files replace are removed; nothing else of `folder` is touched.
    """
    files = sorted(file for file in new.rglob("*") if file.is_file())
    files.sort(key=lambda file: file.name == "model_index.json")
    for file in files:
        target = folder / file.relative_to(new)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, target)
    suffix = "" if variant is None else re.escape(f".{variant}")
    weights = re.compile(
        rf"(diffusion_pytorch_model|model){suffix}(-\d+-of-\d+)?\.safetensors(\.index\.json)?|"
        rf"(diffusion_pytorch_model|model)\.safetensors\.index{suffix}\.json"
    )
    written = {folder / file.relative_to(new) for file in files}
    for part in {target.parent for target in written if target.parent != folder}:
        for old in part.iterdir():
            if old not in written and weights.fullmatch(old.name):
                old.unlink()
    shutil.rmtree(new)
