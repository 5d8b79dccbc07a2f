"""A pipeline's networks as ONNX, in the layout of diffusers' ``OnnxStableDiffusionPipeline`` and of optimum.

They run the folder with onnxruntime and a sampling loop of their own; neither this package nor its networks are needed.
"""

import copy
import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from torch import Tensor, nn

from latentdiff.codec import Codec
from latentdiff.diffusion.schedulers import takes_variance
from latentdiff.extras import check_onnx_export
from latentdiff.interchange.atomic import atomic_folder, json_text
from latentdiff.models.loras import refuse_loras
from latentdiff.models.network import downscale_factor
from latentdiff.pipelines.registry import KINDS, kind_saved_as
from latentdiff.text.encode import max_tokens

logger = logging.getLogger(__name__)

OPSET = 18
"""The oldest that torch's exporter writes without converting down."""

MAX_BYTES = 1_800_000_000
"""Of weights inside ``model.onnx``; as a protobuf it is limited to 2 GiB, so larger weights get a file beside it."""

LATENTS_SCALE = 0.18215
"""The ``scaling_factor`` that diffusers' ONNX pipelines assume for every model."""

SMALLEST_STD = 1e-7
"""In the logarithm, of a posterior without spread."""


class TextGraph(nn.Module):
    """``input_ids`` (B, L), int32 -> ``last_hidden_state`` (B, L, D), and ``pooler_output`` (B, D) if there is one."""

    def __init__(self, text_encoder: nn.Module, padding: int | None) -> None:
        super().__init__()
        self.text_encoder, self.padding = text_encoder, padding

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        mask = None if self.padding is None else (input_ids != self.padding).to(torch.int64)
        output = self.text_encoder(input_ids.to(torch.int64), attention_mask=mask)
        pooled = getattr(output, "pooler_output", None)
        return (output[0],) if pooled is None else (output[0], pooled)


class UNetGraph(nn.Module):
    """``sample`` (B, C, h, w), ``timestep`` (1,), ``encoder_hidden_states`` (B, L, D) -> ``out_sample`` (B, C', h, w).

    The first `channels` of the prediction, without learned variances.
    """

    def __init__(self, unet: nn.Module, channels: int) -> None:
        super().__init__()
        self.unet, self.channels = unet, channels

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        predicted = self.unet(sample, timestep, encoder_hidden_states, return_dict=False)[0]
        return predicted[:, : self.channels]


class EncoderGraph(nn.Module):
    """``sample`` (B, 3, H, W) -> ``latent_sample`` (B, C, h, w), the mean if there is a posterior.

    With a posterior also ``latent_parameters`` (B, 2C, h, w), its mean and the logarithm of its variance. The caller
    multiplies the output by `LATENTS_SCALE`.
    """

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae, self.codec = vae, Codec(vae)

    def forward(self, sample: Tensor) -> tuple[Tensor, ...]:
        posterior = self.codec.posterior(sample)
        mean = self.codec.scaled(posterior.mean) / LATENTS_SCALE
        if posterior.std is None:
            return (mean,)
        std = posterior.std * (self.codec.scale / LATENTS_SCALE)
        return mean, torch.cat([mean, 2 * std.clamp(min=SMALLEST_STD).log()], dim=1)


class DecoderGraph(nn.Module):
    """``latent_sample`` (B, C, h, w), scaled latents divided by `LATENTS_SCALE` -> ``sample`` (B, 3, H, W)."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae, self.codec = vae, Codec(vae)

    def forward(self, latent_sample: Tensor) -> Tensor:
        return self.codec.decode(latent_sample * LATENTS_SCALE)


class Part(NamedTuple):
    """One of the networks: what to export, and what its folder's ``config.json`` says."""

    graph: nn.Module
    inputs: dict[str, Tensor]
    axes: dict[str, dict[int, str]]
    """Of each input, the axes that may have any size."""
    outputs: Sequence[str]
    config: dict[str, Any]

    @property
    def dynamic_shapes(self) -> tuple[Any, ...]:
        """The axes as torch's exporter wants them: those of ``*arguments`` in a tuple of their own."""
        axes, named = tuple(self.axes.values()), getattr(self.graph, "named_inputs", len(self.axes))
        return axes if named == len(axes) else (*axes[:named], axes[named:])


IMAGES = {0: "batch_size", 2: "height", 3: "width"}
TOKENS = {0: "batch_size", 1: "sequence_length"}


def export_onnx(pipeline: Any, folder: str | Path, opset: int = OPSET) -> Path:
    """Write a pipeline's networks as ONNX, in float32: text encoder, UNet, the autoencoder's encoder and decoder.

    The folder holds ``text_encoder``, ``unet``, ``vae_encoder`` and ``vae_decoder`` with a ``model.onnx`` each,
    ``tokenizer``, ``scheduler`` and ``model_index.json``; it is written whole or not at all. Batch, height, width and
    the number of tokens may be any. ``diffusers.OnnxStableDiffusionPipeline.from_pretrained`` and optimum's
    ``ORTStableDiffusionPipeline`` draw from it. diffusers' assumes a downscale factor of 8: for an autoencoder of
    factor f, ask it for 8 / f times the size.

    The graphs convert between `LATENTS_SCALE` and the model's scale. Padding is masked for a text encoder whose config
    says ``use_attention_mask``. The pipeline itself is not changed.

    Args:
        pipeline: text to image, image to image or inpainting.
        folder: must be empty, or not be there.
        opset: of ONNX.

    Returns:
        The folder.

    Raises:
        ImportError: what the export needs is not installed.
        FileExistsError: there is something in the folder.
        ValueError: the pipeline cannot be exported, and why.
    """
    check_onnx_export()
    folder = Path(folder).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not empty; choose another folder")
    check_pipeline(pipeline)
    with atomic_folder(folder) as new:
        for name, make in PARTS.items():
            logger.info("Exporting %s", name)
            write_part(name, make(pipeline), new / name, opset)
        pipeline.tokenizer.save_pretrained(new / "tokenizer")
        limit_tokens(new / "tokenizer", max_tokens(pipeline.tokenizer, pipeline.text_encoder))
        pipeline.scheduler.save_pretrained(new / "scheduler")
        write_json(new / "model_index.json", index_of(pipeline))
    return folder


def onnx_class(pipeline: Any) -> str:
    """diffusers' class for a pipeline, ours or theirs, in ONNX.

    Raises:
        ValueError: there is none.
    """
    name = getattr(pipeline, "saved_class_name", type(pipeline).__name__)
    kind = kind_saved_as(name)
    if kind is None or kind.onnx is None:
        known = ", ".join(kind.saved_as[0] for kind in KINDS if kind.onnx)
        raise ValueError(f"a {name} cannot be exported to ONNX; these can: {known}")
    return kind.onnx


def check_pipeline(pipeline: Any) -> None:
    """Raises ValueError if a pipeline cannot be exported."""
    onnx_class(pipeline)
    if getattr(pipeline, "text_encoder", None) is None:
        raise ValueError("this pipeline has no text encoder to export")
    refuse_loras({name: getattr(pipeline, name) for name in ("text_encoder", "unet")}, "exported")
    config = pipeline.vae.config
    for key in ("latents_mean", "latents_std"):
        if config.get(key) is not None:
            raise ValueError(f"the autoencoder's {key} is not supported in ONNX's layout of a pipeline")
    if getattr(pipeline.unet, "class_embedding", None) is not None:
        raise ValueError("a UNet with class embeddings cannot be exported; the layout has no input for the labels")
    if getattr(pipeline, "safety_checker", None) is not None:
        logger.warning("The safety checker is not exported; the ONNX pipeline does without")


def text_part(pipeline: Any) -> Part:
    encoder, tokenizer = pipeline.text_encoder, pipeline.tokenizer
    hides_padding = getattr(encoder.config, "use_attention_mask", False)
    graph = TextGraph(plain(encoder), tokenizer.pad_token_id if hides_padding else None)
    ids = torch.randint(encoder.config.vocab_size, (2, max_tokens(tokenizer, encoder)), dtype=torch.int32)
    with torch.no_grad():
        count = len(graph(ids))
    return Part(
        graph,
        {"input_ids": ids},
        {"input_ids": TOKENS},
        ["last_hidden_state", "pooler_output"][:count],
        json.loads(encoder.config.to_json_string(use_diff=False)),
    )


def unet_part(pipeline: Any) -> Part:
    unet, config = pipeline.unet, pipeline.unet.config
    width = config.cross_attention_dim
    size = downscale_factor(config)
    channels = config.out_channels if takes_variance(pipeline.scheduler) else pipeline.vae.config.latent_channels
    inputs = {
        "sample": torch.randn(2, config.in_channels, 2 * size, 3 * size),
        "timestep": torch.tensor([10.0]),
        "encoder_hidden_states": torch.randn(2, 5, width if isinstance(width, int) else width[0]),
    }
    axes = {"sample": IMAGES, "timestep": {}, "encoder_hidden_states": TOKENS}
    changed = {**own_config(unet), "out_channels": channels}
    return Part(UNetGraph(plain(unet), channels), inputs, axes, ["out_sample"], changed)


def encoder_part(pipeline: Any) -> Part:
    vae, size = pipeline.vae, downscale_factor(pipeline.vae.config)
    pixels = torch.randn(2, vae.config.in_channels, 4 * size, 6 * size)
    outputs = ["latent_sample"] if hasattr(vae, "quantize") else ["latent_sample", "latent_parameters"]
    return Part(EncoderGraph(plain(vae)), {"sample": pixels}, {"sample": IMAGES}, outputs, vae_config(vae))


def decoder_part(pipeline: Any) -> Part:
    latents = torch.randn(2, pipeline.vae.config.latent_channels, 4, 6)
    graph, config = DecoderGraph(plain(pipeline.vae)), vae_config(pipeline.vae)
    return Part(graph, {"latent_sample": latents}, {"latent_sample": IMAGES}, ["sample"], config)


def vae_config(vae: Any) -> dict[str, Any]:
    """Of the graphs, which take and give latents in the layout's scale."""
    config = own_config(vae)
    unshifted = {"shift_factor": None} if "shift_factor" in config else {}
    return {**config, "scaling_factor": LATENTS_SCALE, **unshifted}


PARTS = {"text_encoder": text_part, "unet": unet_part, "vae_encoder": encoder_part, "vae_decoder": decoder_part}


def plain(network: Any) -> Any:
    """The network in float32 on the CPU and not training; a copy unless it is so already."""
    network = getattr(network, "_orig_mod", network)  # under torch.compile
    tensors = [*network.parameters(), *network.buffers()]
    floating = [tensor for tensor in tensors if tensor.is_floating_point()]
    as_needed = all(tensor.dtype == torch.float32 for tensor in floating)
    if as_needed and not network.training and all(tensor.device.type == "cpu" for tensor in tensors):
        return network
    return copy.deepcopy(network).cpu().float().eval()  # to() would warn of nothing


def own_config(network: Any) -> dict[str, Any]:
    """The config of a network of diffusers' or ours, under diffusers' class name."""
    config = {key: value for key, value in network.config.items() if not key.startswith("_")}
    return {"_class_name": type(network).__name__, "_diffusers_version": diffusers.__version__, **config}


def write_part(name: str, part: Part, folder: Path, opset: int) -> None:
    """Write ``model.onnx`` and ``config.json``.

    Raises:
        ValueError: torch cannot export it.
    """
    folder.mkdir(parents=True)
    weights = sum(parameter.numel() * 4 for parameter in part.graph.parameters())
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about torch's own insides
            torch.onnx.export(
                part.graph,
                tuple(part.inputs.values()),
                folder / "model.onnx",
                dynamo=True,
                input_names=list(part.inputs),
                output_names=list(part.outputs),
                dynamic_shapes=part.dynamic_shapes,
                opset_version=opset,
                external_data=weights > MAX_BYTES,
                verbose=False,
            )
    except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise ValueError(f"torch cannot export the {name} to ONNX: {reason}") from error
    write_json(folder / "config.json", part.config)


def index_of(pipeline: Any) -> dict[str, Any]:
    """What ``model_index.json`` says."""
    return {
        "_class_name": onnx_class(pipeline),
        "_diffusers_version": diffusers.__version__,
        **{name: ["diffusers", "OnnxRuntimeModel"] for name in PARTS},
        "tokenizer": ["transformers", type(pipeline.tokenizer).__name__],
        "scheduler": ["diffusers", type(pipeline.scheduler).__name__],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
    }


def limit_tokens(folder: Path, length: int) -> None:
    """Write into a saved tokenizer's config how many tokens the encoder takes."""
    file = folder / "tokenizer_config.json"
    write_json(file, {**json.loads(file.read_text(encoding="utf-8")), "model_max_length": length})


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json_text(value), encoding="utf-8")
