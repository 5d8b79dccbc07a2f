"""Checkpoint files: found locally or on the hub, read tensor by tensor, and never by executing code in them."""

import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from latentdiff.interchange.folders import check_safetensors
from latentdiff.interchange.single_file.names import CLIP, UNET, VAE, VAE_PARTS
from latentdiff.interchange.user_files import MAX_PICKLE, check_regular, is_stored_whole, parse_json_object

HEADER = "latentdiff"
"""Key of a file's header that holds the configs of what was saved here, as JSON."""

ON_THE_HUB = re.compile(
    r"(?:https?://(?:www\.)?(?:huggingface\.co|hf\.co)/)?([\w.-]+/[\w.-]+)/(?:(?:blob|resolve)/([^/]+)/)?([^?#]+\.\w+)"
    r"(?:\?download=true)?"
)
HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")
"""The arguments of ``hf_hub_download`` that are accepted."""

PICKLED = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
OTHER_KIND = "the file is incomplete, or of another kind of model"


def find_file(source: str | Path, allow_pickle: bool = False, **hub: Any) -> Path:
    """A local file, or one on the hub (downloaded, or from the local cache).

    Args:
        hub: of ``huggingface_hub.hf_hub_download``: ``revision``, ``token``, ``cache_dir``, ``local_files_only``.

    Raises:
        FileNotFoundError: it is neither.
        ValueError: it is on the hub, pickled, and `allow_pickle` is False.
        OSError: the hub cannot be reached.
    """
    file = Path(source).expanduser()
    if file.exists() or not isinstance(source, str):
        return file
    address = ON_THE_HUB.fullmatch(source)
    is_url = source.startswith(("https://", "http://"))
    if address is None or (not is_url and Path(source.split("/")[0]).exists()):
        raise FileNotFoundError(
            f"{source}: no such file; give a .safetensors file, or owner/name/file.safetensors on the Hugging Face hub"
        )
    repository, revision, name = address.groups()
    if not name.endswith(".safetensors") and not allow_pickle:
        raise ValueError(f"{source} is a pickle, which is only read if asked for: allow_pickle=True (--ckpt)")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repository, name, **{"revision": revision, **hub}))
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(f"{source} is not in the local cache, and the hub cannot be asked") from error


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a checkpoint file by their original names.

    A safetensors file is read tensor by tensor. A ``.ckpt`` is read by ``torch.load(weights_only=True)``: see
    `read_pickle`. The names of an autoencoder or a UNet alone, which lack their prefix, get it.

    Args:
        file: ``.safetensors``, or ``.ckpt``, ``.pt``, ``.pth`` or ``.bin`` with `allow_pickle`.
        ema: take the averaged weights (``model_ema.``) of the UNet; in a file without one, of the autoencoder.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged, of another kind, or would need more than tensors; or it has no averaged weights.
    """

    def __init__(self, file: Path, allow_pickle: bool = False, ema: bool = False) -> None:
        check_regular(file)
        self.file = file
        self.metadata: dict[str, str] = {}
        """What the file says of itself beside its tensors."""
        self.global_step: int | None = None
        """The number of training steps, if a ``.ckpt`` holds it."""
        self._stream: Any = None
        self._tensors: dict[str, Tensor] = {}
        if file.suffix == ".safetensors":
            check_safetensors(file)
            self._stream = safe_open(file, "pt")
            self.metadata = self._stream.metadata() or {}
            names = list(self._stream.keys())
        else:
            self._tensors, self.global_step = read_pickle(file, allow_pickle)
            names = list(self._tensors)
        self.header = read_header(file, self.metadata)
        """The config of each component, by name, if this package wrote the file."""
        self.beginning = missing_beginning(names)
        """The prefix that the names in the file lack: an autoencoder's or a UNet's, or the empty string."""
        self._places = original_names(names, self.beginning)
        if ema:
            self.use_averages("UNet" if any(name.startswith(UNET) for name in self._places) else "autoencoder")

    def use_averages(self, part: str) -> None:
        """Let the names of weights refer to their averages, whose names in the file have no dots.

        Args:
            part: "UNet" or "autoencoder". A whole model has averages of the UNet only.

        Raises:
            ValueError: the file has none.
        """
        of: Any = UNET if part == "UNet" else VAE_PARTS
        averages = {
            name: "model_ema." + place.removeprefix("model.").replace(".", "")
            for name, place in self._places.items()
            if name.startswith(of) and name.endswith((".weight", ".bias"))
        }
        there = set(self._places.values())
        missing = [name for name, average in averages.items() if average not in there]
        if missing or not averages:
            lacks = f"; {self.own_name(missing[0])} has none" if 0 < len(missing) < len(averages) else ""
            raise ValueError(f"{self.file} has no averaged weights (model_ema.) of its {part}{lacks}; leave ema out")
        self._places |= averages

    @property
    def has_unet(self) -> bool:
        return f"{UNET}input_blocks.0.0.weight" in self._places

    @property
    def has_vae(self) -> bool:
        return self.is_taesd or any(name.startswith(VAE_PARTS[:2]) for name in self._places)

    @property
    def is_taesd(self) -> bool:
        """Whether it holds both parts of a TAESD."""
        return {"taesd_encoder.0.weight", "taesd_decoder.1.weight"} <= self._places.keys()

    def own_name(self, name: str) -> str:
        """The name of a weight in the file itself."""
        return name.removeprefix(self.beginning)

    def __getitem__(self, name: str) -> Tensor:
        place = self._places[name]
        return self._tensors[place] if self._stream is None else self._stream.get_tensor(place)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        place = self._places[name]
        if self._stream is None:
            return tuple(self._tensors[place].shape)
        return tuple(self._stream.get_slice(place).get_shape())

    def size(self, name: str, dimension: int = 0) -> int:
        """The size of a weight in one dimension.

        Raises:
            ValueError: there is no such weight, or it has fewer dimensions.
        """
        if name not in self:
            raise ValueError(f"{self.file}: {self.own_name(name)} is missing; {OTHER_KIND}")
        shape = self.shape(name)
        if len(shape) <= dimension:
            raise ValueError(f"{self.file}: {self.own_name(name)} has the shape {list(shape)}; {OTHER_KIND}")
        return shape[dimension]

    def main_dtype(self, beginning: str) -> torch.dtype:
        """The dtype of the first floating-point weight whose name starts so; float32 if there is none."""
        tensors = (self[name] for name in self if name.startswith(beginning))
        return next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places


def missing_beginning(names: list[str]) -> str:
    """The prefix that the names of an autoencoder or a UNet alone lack; else the empty string."""
    if any(name.startswith(("encoder.down.", "decoder.up.")) for name in names):
        return VAE
    return UNET if "input_blocks.0.0.weight" in names else ""


def original_names(names: list[str], beginning: str) -> dict[str, str]:
    """The names that the weights have in a whole checkpoint, with those in the file.

    Some files leave out ``text_model.`` in the text encoder's.
    """
    if beginning:
        return {beginning + name: name for name in names}
    if f"{CLIP}embeddings.token_embedding.weight" in names:
        old = tuple(CLIP + part for part in ("embeddings.", "encoder.", "final_layer_norm."))
        return {name.replace(CLIP, f"{CLIP}text_model.") if name.startswith(old) else name: name for name in names}
    return {name: name for name in names}


def read_header(file: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The configs that this package wrote into a file's header; empty for other files.

    Raises:
        ValueError: it is damaged.
    """
    header = parse_json_object(metadata.get(HEADER, "{}"), f"{file}: its header")
    if not all(isinstance(value, dict) for value in header.values()):
        raise ValueError(f"{file}: its header should hold a config for each component")
    return header


class Ignored:
    """Stand-in for objects of the trainer that the first released checkpoints hold beside their weights."""

    def __init__(self, *args: Any, **options: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


IGNORED = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    "torch.nn.modules.container.ParameterDict",
    "argparse.Namespace",
)
"""Classes that are read as `Ignored` and never imported. The last but one occurs in files of embeddings, the last in
DiT's training checkpoints."""


class HeldModule:
    """Stand-in for a module that was pickled whole: of its state what holds tensors is kept."""

    _parameters: Mapping[str, Any] = {}
    _modules: Mapping[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        held = state if isinstance(state, dict) else {}
        self._parameters, self._modules = (dict(held.get(name) or {}) for name in ("_parameters", "_modules"))

    def tensors(self, file: Path, beginning: str = "") -> Iterator[tuple[str, Tensor]]:
        """All of them, by name. Raises ValueError, with the file's name, for modules in modules without end."""
        if beginning.count(".") > DEEPEST:
            raise ValueError(f"{file}: its modules are in one another without end")
        for name, tensor in self._parameters.items():
            if isinstance(tensor, Tensor):
                yield f"{beginning}{name}", tensor
        for name, module in self._modules.items():
            if isinstance(module, HeldModule):
                yield from module.tensors(file, f"{beginning}{name}.")


MODULES = (
    *(f"dall_e.{name}" for name in ("encoder.Encoder", "encoder.EncoderBlock", "decoder.Decoder")),
    *("dall_e.decoder.DecoderBlock", "dall_e.utils.Conv2d", "torch.nn.modules.container.Sequential"),
    *("torch.nn.modules.activation.ReLU", "torch.nn.modules.pooling.MaxPool2d"),
    *("torch.nn.modules.upsampling.Upsample", "torch.nn.modules.linear.Identity"),
)
"""Classes of modules that are read as `HeldModule` and never imported: those of DALL-E's released files."""
DEEPEST = 16
"""Of modules in modules."""


def load_pickle(file: Path, allow: bool, classes: Sequence[type] = ()) -> Any:
    """The content of a file of ``torch.save``, if it is tensors, numbers, strings and containers of them.

    Tensors stay on disk until they are used, if the file is not of the oldest format.

    Args:
        classes: that it may hold besides.

    Raises:
        ValueError: it is damaged, holds anything else, or `allow` is False.
    """
    if file.suffix not in PICKLED:
        raise ValueError(f"{file}: a checkpoint is a .safetensors file, or with allow_pickle=True (--ckpt) a .ckpt")
    if not allow:
        raise ValueError(
            f"{file} is a pickle, which is only read if asked for: allow_pickle=True (--ckpt). Nothing in it is run "
            f"then, but better get the model as .safetensors"
        )
    is_zip = check_inflated(file)
    own = {f"{kind.__module__}.{kind.__qualname__}" for kind in classes}
    stand_ins: list[Any] = [
        (type(name, (base,), {}), name)
        for base, names in ((Ignored, IGNORED), (HeldModule, MODULES))
        for name in names
        if name not in own
    ]
    try:
        with torch.serialization.safe_globals([*stand_ins, *classes]):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} holds more than tensors, which could run code, so it was not read and nothing was run "
            f"({reason(error)}); get the model as .safetensors"
        ) from None
    except Exception as error:  # a damaged file can raise anything
        raise ValueError(f"{file} is damaged, or no checkpoint ({reason(error)})") from None


def check_inflated(file: Path) -> bool:
    """Whether a file of ``torch.save`` is a zip archive, as all but the oldest are.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no regular file; or a part of it is large without being a tensor, or is a compressed tensor,
            which torch never writes.
    """
    check_regular(file)
    with file.open("rb") as stream:
        if stream.read(4) != b"PK\x03\x04":
            return False
    try:
        with zipfile.ZipFile(file) as archive:
            parts = archive.infolist()
    except Exception as error:  # a damaged directory can raise nearly anything
        raise ValueError(f"{file} is damaged, or no checkpoint ({reason(error)})") from None
    for part in parts:
        is_tensor = "/data/" in part.filename and part.compress_type == zipfile.ZIP_STORED
        if not is_tensor and part.file_size > MAX_PICKLE:
            raise ValueError(
                f"{file}: its {part.filename!r} has {part.file_size / 2**20:.0f} MiB, more than the limit of "
                f"{MAX_PICKLE / 2**20:.0f}; no checkpoint needs that much beside its tensors"
            )
    return True


def reason(error: Exception) -> str:
    """The reason in torch's message, without its advice to read the file unsafely."""
    asked = re.search(r"GLOBAL (\S+)", str(error))
    if asked:
        return f"it asks for {asked[1]}"
    text = str(error).split("WeightsUnpickler error:")[-1].strip().split("\n")[0].split(". ")[0]
    return " ".join(text.split())[:200] or type(error).__name__


def state_of(content: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """The weights by name in the content of a pickled checkpoint; of DiT's training checkpoints the averages."""
    averages = content.get("ema")
    state: Mapping[Any, Any] = content.get("state_dict", averages if isinstance(averages, dict) else content)
    return state


def read_pickle(file: Path, allow: bool) -> tuple[dict[str, Tensor], int | None]:
    """The named tensors of a pickled checkpoint, and its number of training steps, if it holds it.

    Raises:
        ValueError: see `load_pickle`; or there are no named tensors in it.
    """
    content = load_pickle(file, allow)
    if isinstance(content, HeldModule):
        content = {"state_dict": dict(content.tensors(file))}
    content = content if isinstance(content, dict) else {}
    state = state_of(content)
    tensors = {name: value for name, value in state.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"{file}: there are no named tensors in it")
    for name, tensor in tensors.items():
        if not is_stored_whole(tensor):
            raise ValueError(f"{file}: {name} claims more values than the file holds")
    step = content.get("global_step")
    return tensors, step if isinstance(step, int) else None
