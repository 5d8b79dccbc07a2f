"""A pipeline's networks as graphs for a runtime: what goes in and out, and writing them to files."""

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentdiff.models.layers import Upsample2D, double, doubling_kernel
from latentdiff.models.network import downscale_factor
from latentdiff.models.patches import PatchTransformer
from latentdiff.models.pixart import PixArtTransformer2DModel
from latentdiff.pipelines.runtime.engines import openvino, without_telemetry
from latentdiff.pipelines.storage.onnx import (
    IMAGES,
    OPSET,
    TOKENS,
    Part,
    decoder_part,
    encoder_part,
    own_config,
    plain,
    write_json,
    write_part,
)

BATCH = {0: "batch_size"}
SIZES = {"resolution": 2, "aspect_ratio": 1}
"""Conditions of PixArt, and how many numbers each has."""
Examples = dict[str, tuple[Tensor, dict[int, str]]]
"""Of each condition of two images, and its free axes."""


class DenoiserGraph(nn.Module):
    """``sample`` (B, C, h, w), ``timestep`` (1,) and the conditions that the network takes -> (B, C', h, w).

    Sizes are conditions by their own names, and not in ``added_cond_kwargs``.
    """

    named_inputs = 2
    """Before ``*conditions``."""

    def __init__(self, network: nn.Module, conditions: tuple[str, ...]) -> None:
        super().__init__()
        self.network, self.conditions = network, conditions

    def forward(self, sample: Tensor, timestep: Tensor, *conditions: Tensor) -> Tensor:
        named: dict[str, Any] = dict(zip(self.conditions, conditions, strict=True))
        added = {name: named.pop(name) for name in SIZES if name in named}
        if added:
            named["added_cond_kwargs"] = added
        return self.network(sample, timestep=timestep, return_dict=False, **named)[0]


def denoiser_part(unet: Any) -> Part:
    """The graph of a denoiser, a UNet of ours or diffusers' or a transformer of ours; its inputs are what a call takes,
    by the names of its arguments.
    """
    config, size = unet.config, downscale_factor(unet.config)
    conditions = transformer_conditions(unet) if isinstance(unet, PatchTransformer) else unet_conditions(unet)
    inputs = {"sample": torch.randn(2, config.in_channels, 2 * size, 3 * size), "timestep": torch.tensor([10.0])}
    axes = {"sample": IMAGES, "timestep": {}}
    inputs |= {name: tensor for name, (tensor, _) in conditions.items()}
    axes |= {name: own for name, (_, own) in conditions.items()}
    return Part(DenoiserGraph(plain(unet), tuple(conditions)), inputs, axes, ["out_sample"], own_config(unet))


def unet_conditions(unet: Any) -> Examples:
    config, examples = unet.config, Examples()
    width, guidance = config.get("cross_attention_dim"), config.get("time_cond_proj_dim")
    if width is not None:
        states = torch.randn(2, 5, width if isinstance(width, int) else width[0])
        examples["encoder_hidden_states"] = (states, TOKENS)
    if getattr(unet, "class_embedding", None) is not None:
        examples["class_labels"] = (example_labels(config), BATCH)
    if guidance is not None:
        examples["timestep_cond"] = (torch.randn(2, guidance), BATCH)
    return examples


def transformer_conditions(network: PatchTransformer) -> Examples:
    """Labels; or text states, 1 where they count, and the sizes where it takes them."""
    config = network.config
    if not isinstance(network, PixArtTransformer2DModel):
        return Examples(class_labels=(torch.tensor([0, 1]), BATCH))
    width = config.cross_attention_dim if config.caption_channels is None else config.caption_channels
    examples = Examples(
        encoder_hidden_states=(torch.randn(2, 5, width), TOKENS), encoder_attention_mask=(torch.ones(2, 5), TOKENS)
    )
    if network.takes_sizes:
        examples |= {name: (torch.ones(2, count), BATCH) for name, count in SIZES.items()}
    return examples


def example_labels(config: Any) -> Tensor:
    """Labels of two images, as `class_embed_type` wants them."""
    kind = config.get("class_embed_type")
    if kind is None:
        return torch.tensor([0, 1])
    if kind == "timestep":
        return torch.tensor([10.0, 20.0])
    if kind == "identity":
        return torch.randn(2, config.get("time_embedding_dim") or config["block_out_channels"][0] * 4)
    return torch.randn(2, config["projection_class_embeddings_input_dim"])


def parts_of(pipeline: Any) -> Iterator[tuple[str, Callable[[], Part]]]:
    """What of a pipeline a runtime runs, each with what makes it: the denoiser, and the autoencoder if it computes."""
    from latentdiff.models import IdentityAutoencoder

    yield "unet", lambda: denoiser_part(pipeline.unet)
    if not isinstance(pipeline.vae, IdentityAutoencoder):
        yield "vae_decoder", lambda: decoder_part(pipeline)
        yield "vae_encoder", lambda: encoder_part(pipeline)


def write_graph(runtime: str, name: str, part: Part, folder: Path, half: bool) -> None:
    """Write a network's graph and its config for a runtime.

    Args:
        half: the weights in float16.

    Raises:
        ValueError: the network has an operation that cannot be exported.
    """
    if runtime == "onnx":
        write_part(name, part, folder, OPSET)
        if half:
            halve_weights(folder / "model.onnx")
        return
    folder.mkdir(parents=True)
    model = openvino_model(name, part)
    openvino().save_model(model, folder / "openvino_model.xml", compress_to_fp16=half)
    write_json(folder / "config.json", part.config)


def openvino_model(name: str, part: Part) -> Any:
    """The graph as OpenVINO's model, with inputs of its own names.

    Raises:
        ValueError: it has an operation that torch cannot export, or OpenVINO does not know.
    """
    graph = in_faster_layers(part.graph)
    try:
        with torch.no_grad(), warnings.catch_warnings(), without_telemetry():
            warnings.simplefilter("ignore")  # about torch's own insides
            # traced, in a seventh of the time that torch.export takes; all axes of the inputs are free
            model = openvino().convert_model(graph, example_input=tuple(part.inputs.values()))
    except Exception as error:  # of many classes, of torch's and of OpenVINO's
        lines = [line for line in str(error.__cause__ or error).splitlines() if line.strip()]
        summary = [line.removeprefix("-- ") for line in lines if line.startswith("-- ")]  # after places in its source
        raise ValueError(f"OpenVINO cannot take over the {name}: {[*summary, *lines, repr(error)][0]}") from error
    for port, wanted in zip(model.inputs, part.inputs, strict=True):
        port.get_tensor().set_names({wanted})
        port.get_node().set_friendly_name(wanted)
    return model


class ChannelNorm(nn.Module):
    """``GroupNorm`` by sums over each channel first: a graph keeps channels last, which its reshaping would undo."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.groups, self.eps = norm.num_groups, norm.eps
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        centred = x - self._over_group(x.mean((2, 3)))
        variance = self._over_group(centred.square().mean((2, 3)))  # (B, C, 1, 1)
        scale = torch.rsqrt(variance + self.eps) * self.weight.view(1, -1, 1, 1)
        return centred * scale + self.bias.view(1, -1, 1, 1)

    def _over_group(self, means: Tensor) -> Tensor:
        """Means of channels (B, C) -> of their groups, for each channel, (B, C, 1, 1)."""
        channels = means.shape[1]
        size = channels // self.groups
        grouped = means.reshape(-1, self.groups, size).mean(-1, keepdim=True)
        return grouped.expand(-1, -1, size).reshape(-1, channels, 1, 1)


class Doubling(Upsample2D):
    """`Upsample2D` as one transposed convolution: 4/9 of the products, where no size is asked for but the double."""

    def __init__(self, upsample: Upsample2D) -> None:
        nn.Module.__init__(self)
        self.conv = upsample.conv
        self.kernel = nn.Parameter(doubling_kernel(self.conv.weight.detach()))

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """(B, C, H, W) -> (B, C, 2H, 2W) or (B, C, *size)."""
        if size is not None:  # odd sides end otherwise, and one graph is for all sizes
            return self.conv(double(x, size))
        return F.conv_transpose2d(x, self.kernel, self.conv.bias, stride=2, padding=1)


def in_faster_layers(graph: nn.Module) -> nn.Module:
    """A copy in which normalisations of feature maps are `ChannelNorm`, doublings `Doubling`; it shares the weights."""
    shared = {id(tensor): tensor for tensor in [*graph.parameters(), *graph.buffers()]}
    changed = copy.deepcopy(graph, shared)
    for module in list(changed.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.GroupNorm and name != "group_norm":  # which attention gives tokens
                setattr(module, name, ChannelNorm(child))
            elif type(child) is Upsample2D and type(child.conv) is nn.Conv2d:
                setattr(module, name, Doubling(child))
    return changed


def halve_weights(file: Path) -> None:
    """Store the weights of an ONNX graph in float16; each is made float32 where it is used."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load(file)
    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or tensor.ByteSize() < 1024:
            continue
        name, values = tensor.name, numpy_helper.to_array(tensor)
        if abs(values).max(initial=0) > 65504:  # float16 ends there
            continue
        tensor.CopyFrom(numpy_helper.from_array(values.astype("float16"), f"{name}_half"))
        casts.append(helper.make_node("Cast", [tensor.name], [name], to=TensorProto.FLOAT))
    for i, node in enumerate(casts):
        model.graph.node.insert(i, node)
    beside = file.with_name("model.onnx.data")
    beside.unlink(missing_ok=True)
    onnx.save(model, file, save_as_external_data=model.ByteSize() > 1_800_000_000, location=beside.name)
