"""Networks that turn pictures into features, for the metrics of sets of pictures.

An extractor is named by a short text:

- ``autoencoder``: the encoder of the model that ships in the package; needs no file and no network, and is no FID;
- ``inception`` or ``inception:FILE``: the network of FID and KID, from torch hub's cache or from a file;
- ``timm:NAME=FILE``: any timm model, its weights from a file;
- a folder, or ``owner/name`` on the hub: any vision model of transformers, or CLIP.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from latentdiff.interchange.fingerprint import weights_digest
from latentdiff.interchange.hub import HubError, asking_hub
from latentdiff.metrics.pixels import RESIZE, resize_pictures

AUTO = "auto"
CHOICES = "auto, autoencoder, inception, inception:FILE, timm:NAME=FILE"
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALVES = ((0.5,) * 3, (0.5,) * 3)
T = TypeVar("T")


@dataclass
class Extractor:
    """Pictures to features.

    Args:
        name: its name in a report.
        network: (B, 3, size, size) to features (B, D).
        size: side of the square that pictures are resized to.
        mean, std: of each channel, for pixels in [0, 1]; the network's input is (pixel - mean) / std.
        is_fid: whether a Fréchet distance of these features is FID.
    """

    name: str
    network: nn.Module
    size: int
    mean: Sequence[float]
    std: Sequence[float]
    is_fid: bool = False

    def __post_init__(self) -> None:
        self.network.eval().requires_grad_(False)
        self.digest = weights_digest(self.network.state_dict())
        self.device = torch.device("cpu")

    def to(self, device: torch.device | str) -> "Extractor":
        self.network.to(device)
        self.device = torch.device(device)
        return self

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image]) -> Tensor:
        """(B, D) float32, on the CPU."""
        pixels = resize_pictures(pictures, self.size).to(self.device) / 255
        mean, std = (torch.tensor(values, device=self.device).view(3, 1, 1) for values in (self.mean, self.std))
        return self.network((pixels - mean) / std).float().cpu()

    def features(self, pictures: Iterable[Image.Image], batch_size: int = 16) -> Tensor:
        """(N, D) float32 of any number of pictures, a batch in memory at a time.

        Raises:
            ValueError: there are no pictures.
        """
        found = [self(batch) for batch in in_batches(pictures, batch_size)]
        if not found:
            raise ValueError("there are no pictures to take features of")
        return torch.cat(found)

    def describe(self) -> dict[str, Any]:
        """The entry in a report."""
        resize = f"{RESIZE}, to {self.size}x{self.size}"
        return {"name": self.name, "weights_sha256": self.digest, "resize": resize}


def in_batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items, the last one of what is left."""
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch


def load_extractor(source: str = AUTO) -> Extractor:
    """The extractor that `source` names; see this module. "auto" is ``inception`` if it lies in torch hub's cache.

    Raises:
        FileNotFoundError: a file or folder is missing, and where to get it.
        ValueError: weights do not fit, or there is no such model.
    """
    kind, _, rest = source.partition(":")
    if source == AUTO:
        from latentdiff.metrics.inception import find_weights

        kind, rest = ("inception", "") if find_weights() is not None else ("autoencoder", "")
    if kind == "autoencoder" and not rest:
        name, encoder, size = packaged_encoder()
        return Extractor(f"{name}, mean over places at each level", encoder, size, *HALVES)
    if kind == "inception":
        from latentdiff.metrics.inception import SIZE, load_inception

        inception = load_inception(Path(rest).expanduser() if rest else None)
        same = (128 / 255,) * 3  # (pixel - 128) / 128, as the graph does
        return Extractor("FID Inception (2015-12-05)", inception, SIZE, same, same, is_fid=True)
    if kind == "timm":
        name, network, config = timm_network(rest)
        return Extractor(f"timm {name}", network, config["input_size"][-1], config["mean"], config["std"])
    model, has_pooler, size, mean, std = vision_model(source, f"--extractor takes {CHOICES}")
    name = f"transformers {type(model).__name__} {shown_source(source)}"
    return Extractor(name, PooledVision(model, use_pooler=has_pooler), size, mean, std)


def packaged_encoder() -> tuple[str, "EncoderLevels", int]:
    """The name for reports, the network, and the side of the pictures it was trained on."""
    from latentdiff.interchange.folders import DEFAULT_MODEL, packaged_model
    from latentdiff.models import AutoencoderKL

    autoencoder = AutoencoderKL.from_pretrained(packaged_model() / "vae", use_safetensors=True)
    name = f"encoder of the autoencoder of the packaged model {DEFAULT_MODEL!r}"
    return name, EncoderLevels(autoencoder.encoder), autoencoder.config.sample_size


class EncoderLevels(nn.Module):
    """(B, 3, H, W) in [-1, 1] to the mean activations of every level of an encoder, concatenated.

    The activations of each position are first scaled to unit mean square, as in LPIPS (Zhang et al. 2018, Eq. 1): the
    residual sums of the levels differ a hundredfold in size, and the largest would dominate every distance.
    """

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder

    def levels(self, pixels: Tensor) -> list[Tensor]:
        """The unscaled activations, (B, C_i, h_i, w_i)."""
        x = self.encoder.conv_in(pixels)
        found = []
        for block in (*self.encoder.down_blocks, self.encoder.mid_block):
            x = block(x)
            found.append(x)
        return found

    def forward(self, pixels: Tensor) -> Tensor:
        levels = [x.permute(0, 2, 3, 1) for x in self.levels(pixels)]  # (B, h, w, C)
        return torch.cat([F.rms_norm(x, x.shape[-1:]).mean((1, 2)) for x in levels], dim=1)


def timm_network(source: str) -> tuple[str, Any, dict[str, Any]]:
    """``NAME=FILE``: the name, the network with its weights and without its head, and timm's config of its input.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: there is no such model, or the file does not hold its weights.
    """
    import timm

    name, equals, file = source.partition("=")
    if not equals or not file:
        raise ValueError(f"timm:{source}: a timm model and a file of its weights are written timm:NAME=FILE")
    if not timm.is_model(name):
        raise ValueError(f"timm has no model named {name!r}; timm.list_models() lists them")
    weights = read_weights(Path(file).expanduser())
    network = timm.create_model(name, pretrained=False, num_classes=0)
    network.load_state_dict(fitting(weights, network, f"{file} does not hold weights of {name}"), strict=False)
    return name, network, timm.data.resolve_model_data_config(network)


def cache_folder() -> Path:
    """Torch hub's, where weights of torchvision's networks lie."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def read_weights(file: Path) -> dict[str, Tensor]:
    """Tensors by name, from a safetensors file or one of torch; no code in it is executed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, or holds something else.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file of weights")
    from latentdiff.interchange.single_file.checkpoint import check_inflated

    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            weights: Any = load_file(file)
        else:
            check_inflated(file)
            weights = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # of torch, pickle, zipfile or safetensors
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{file} cannot be read as weights ({type(error).__name__}: {reason})") from error
    weights = weights.get("state_dict", weights) if isinstance(weights, dict) else weights
    if not isinstance(weights, dict) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise ValueError(f"{file} holds something other than tensors by name")
    return weights


def fitting(weights: Mapping[str, Tensor], network: nn.Module, message: str) -> dict[str, Tensor]:
    """Of `weights` those that `network` has. Batch normalisation's counters may lack: evaluation does not use them.

    Raises:
        ValueError: with `message` and an example, if one is missing or has another shape.
    """
    wanted = network.state_dict()
    wrong = [
        name
        for name, tensor in wanted.items()
        if (weights[name].shape != tensor.shape if name in weights else not name.endswith("num_batches_tracked"))
    ]
    if wrong:
        raise ValueError(f"{message}: {len(wrong)} tensors are missing or of another shape, such as {wrong[0]}")
    return {name: weights[name] for name in wanted if name in weights}


def vision_model(source: str, others: str) -> tuple[Any, bool, int, Sequence[float], Sequence[float]]:
    """A transformers model, whether it has its pooler's weights, and side, mean and deviation of its input.

    others: what else `source` could be, for the message.

    Raises:
        FileNotFoundError: it is neither a model's folder nor a hub id.
        ValueError: it cannot be loaded, its weights do not fit, or its preprocessing is not known.
    """
    folder, model, missing = transformers_model(source, others, optional="pooler.")
    return model, not missing, *preprocessing(folder, getattr(model.config, "vision_config", model.config))


def transformers_model(source: str, others: str, optional: str = "") -> tuple[str, Any, list[str]]:
    """What transformers loads from a model's folder or hub id, and which optional weights are missing.

    Args:
        others: what else `source` could be, for the message.
        optional: how names of weights begin that may be missing.

    Raises:
        FileNotFoundError: it is neither a model's folder nor a hub id.
        ValueError: it is damaged or cannot be fetched, or weights are missing.
    """
    from transformers import AutoModel

    from latentdiff.interchange.folders import check_model_files, check_transformers_source

    folder = Path(source).expanduser()
    check_transformers_source(source, others)
    if folder.is_dir():
        check_model_files(folder)
    place = str(folder) if folder.is_dir() else source
    with loading(source):
        model, info = AutoModel.from_pretrained(
            place, use_safetensors=True, output_loading_info=True, trust_remote_code=False
        )
    missing = sorted(info["missing_keys"])
    if any(not optional or not name.startswith(optional) for name in missing):  # they would have random values
        raise ValueError(
            f"{source}: the weights do not fit config.json; {len(missing)} are missing, such as {missing[0]}"
        )
    return place, model, missing


@contextmanager
def loading(source: str) -> Iterator[None]:
    """Turn the errors of a library that cannot load a model into a ValueError with the model's name.

    Such as: no network, weights of another model, no safetensors files, a model that needs code of its own.
    """
    try:
        with asking_hub(source):
            yield
    except Exception as error:  # the tokenizers library raises plain Exceptions
        reason = " ".join(str(error).split())
        if isinstance(error, HubError):
            raise ValueError(reason) from None
        if "trust_remote_code" in reason:
            reason = "it needs code of its own, which is not run"
        elif "ignore_mismatched_sizes" in reason:
            reason = "the weights are of other shapes than config.json says"
        raise ValueError(f"{source} could not be loaded: {reason[:300]}") from error


def shown_source(source: str) -> str:
    """A hub id, or the last part of a folder."""
    folder = Path(source).expanduser()
    return folder.resolve().name if folder.is_dir() else source


def preprocessing(source: str, config: Any) -> tuple[int, Sequence[float], Sequence[float]]:
    """Side, mean and standard deviation of the pictures that a transformers model was trained on."""
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{source} has no preprocessor_config.json, so how its pictures look is not known") from error
    size = getattr(config, "image_size", None)
    if not isinstance(size, int):
        sizes = dict(getattr(processor, "crop_size", None) or getattr(processor, "size", None) or {})
        size = next((sizes[key] for key in ("height", "shortest_edge") if sizes.get(key)), 224)
    mean, std = (getattr(processor, name, None) for name in ("image_mean", "image_std"))
    return size, mean or IMAGENET[0], std or IMAGENET[1]


class PooledVision(nn.Module):
    """A vision model's pooled output; for CLIP and similar models, open_clip's too, the projected features.

    use_pooler: False for weights without the pooler, as classifiers have them; then the mean over positions is taken.
    """

    def __init__(self, model: Any, use_pooler: bool = True) -> None:
        super().__init__()
        self.model, self.use_pooler = model, use_pooler

    def forward(self, pixels: Tensor) -> Tensor:
        names = ("get_image_features", "encode_image", "forward")
        run = next(getattr(self.model, name) for name in names if hasattr(self.model, name))
        return pooled(run(pixels), self.use_pooler)


def pooled(output: Any, use_pooler: bool = True) -> Tensor:
    """(B, D) from a model's output.

    Raises:
        ValueError: it has no features of whole pictures.
    """
    if isinstance(output, Tensor):
        return output.flatten(1)
    found = getattr(output, "pooler_output", None) if use_pooler else None
    if found is not None:
        return found.flatten(1)
    states = getattr(output, "last_hidden_state", None)
    if states is None:
        raise ValueError(f"this model gives no features of a whole picture, but a {type(output).__name__}")
    return states.mean(1) if states.ndim == 3 else states.mean((2, 3))  # tokens, or a grid
