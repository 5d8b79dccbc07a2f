"""int8 of a denoiser: calibrated on what it sees while its pipeline draws, its error measured on other drawings."""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from latentdiff.pipelines.registry import KINDS
from latentdiff.pipelines.runtime.choice import Runtime
from latentdiff.pipelines.runtime.engine_networks import RuntimeUNet
from latentdiff.pipelines.runtime.engines import Engine, core, openvino, without_telemetry
from latentdiff.pipelines.storage.onnx import MAX_BYTES

logger = logging.getLogger(__name__)

Arrays = dict[str, np.ndarray]

PROMPTS = (
    *("a red car", "a cat", "a house by a lake in the evening", "the face of a smiling woman", "a green tree"),
    *("an old book on a table", "a map", "two people walking in the rain", "a blue bird", "a bowl of fruit"),
)
"""Drawn to calibrate; the last ones to measure the error."""

MEASURED = 2
STEPS = 8
"""At most, of a drawing: from all parts of the way, in a time that can be waited for."""


UNEVEN = [r".*\.ff\.net\.2/.*", r".*\.attn2[./].*", r".*\.proj_out/.*", r".*\.time_emb.*"]
"""Layers, by their names, whose activations have no range for all: OpenVINO finds one for each token as it computes.

Gated feed-forward layers have outliers at some places, and cross-attention at some words. Two thirds of the error came
of these layers, at 8% less speed.
"""


class Recorder:
    """An engine that keeps what it is given."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.inputs = engine, engine.inputs
        self.seen: list[Arrays] = []

    def __call__(self, arrays: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        self.seen.append({name: np.array(array) for name, array in arrays.items()})
        return self.engine(arrays)


def quantize(pipeline: Any, runtime: Runtime, folder: Path) -> dict[str, float]:
    """Replace the denoiser's graph in a folder by one of int8, and say how far it is from the one of float32.

    Args:
        pipeline: whose denoiser it is, of `without_pictures`; it is left with the one of int8.
        folder: with the graphs of float32.

    Returns:
        ``prediction_error``: root mean square of the difference of predictions, over that of the predictions;
        ``picture_difference``: the mean difference of pictures, of 255; ``largest_picture_difference``.
    """
    exact = RuntimeUNet(Runtime(runtime.name), folder)
    recorder = Recorder(exact.engine("unet"))
    exact.engines["unet"] = recorder
    pipeline.unet = exact
    pipeline.set_progress_bar_config(disable=True)
    draw(pipeline, PROMPTS[:-MEASURED])
    calibrated_on, recorder.seen = recorder.seen, []
    expected = draw(pipeline, PROMPTS[-MEASURED:])
    file = folder / "unet" / runtime.kind.file
    (openvino_int8 if runtime.name == "openvino" else onnx_int8)(file, calibrated_on)
    rough = RuntimeUNet(Runtime(runtime.name, "int8"), folder)
    engine = rough.engine("unet")
    pairs = [(engine(arrays)[0], recorder.engine(arrays)[0]) for arrays in recorder.seen]
    error = np.sqrt(sum(((a - b) ** 2).sum() for a, b in pairs) / sum((b**2).sum() for _, b in pairs))
    pipeline.unet = rough
    apart = 255 * np.abs(draw(pipeline, PROMPTS[-MEASURED:]) - expected)
    report = {
        "prediction_error": float(error),
        "picture_difference": float(apart.mean()),
        "largest_picture_difference": float(apart.max()),
    }
    logger.warning(
        "int8: predictions differ from float32's by %.1f%% (root mean square), pictures by %.1f of 255 in the mean and "
        "%.0f at most",
        *(100 * report["prediction_error"], report["picture_difference"], report["largest_picture_difference"]),
    )
    return report


def draw(pipeline: Any, prompts: Sequence[str]) -> np.ndarray:
    """A picture for each prompt, or as many of classes, or of what there is: (P, H, W, 3), values in [0, 1]."""
    takes, steps = type(pipeline).__call__.__annotations__, pipeline.defaults["num_inference_steps"]
    call: dict[str, Any] = {"output_type": "np", "num_inference_steps": min(steps, STEPS)}
    drawn = []
    for seed in range(0, len(prompts), 2):
        pair = list(prompts[seed : seed + 2])
        if "class_labels" in takes:
            some: dict[str, Any] = {"class_labels": [(seed + i) % pipeline.num_classes for i in range(len(pair))]}
        else:
            some = {"prompt": pair} if "prompt" in takes else {"batch_size": len(pair)}
        drawn.append(pipeline(**some, seed=len(pair[0]) + seed, **call).images)
    return np.concatenate(drawn)


def without_pictures(pipeline: Any) -> Any:
    """The pipeline, or one with its networks, that draws from nothing but words, classes or noise.

    Raises:
        ValueError: there is none.
    """
    kind = next((one for one in KINDS if one.name == type(pipeline).__name__), None)
    if kind is None or not kind.pictures:
        return pipeline
    if not kind.interchangeable or pipeline.unet.config.in_channels != pipeline.vae.config.latent_channels:
        raise ValueError(
            f"int8 is calibrated by drawing, which a {type(pipeline).__name__} does from pictures; choose another dtype"
        )
    plain = next(one for one in KINDS if one.family == kind.family and one.interchangeable and not one.pictures)
    return plain.load().from_pipe(pipeline)


def openvino_int8(file: Path, seen: Sequence[Arrays]) -> None:
    """By NNCF: weights of each channel, activations of each layer, matrices' outliers smoothed; not the first and the
    last convolution, which cost little, and whose error is seen at once; of `UNEVEN` the weights alone.
    """
    with without_telemetry():
        import nncf

        logging.getLogger("nncf").setLevel(logging.WARNING)
        model = core().read_model(file)
        names = [one.get_friendly_name() for one in model.get_ordered_ops() if one.get_type_name() == "Convolution"]
        changed = nncf.quantize(
            model,
            nncf.Dataset(list(seen)),
            subset_size=len(seen),
            model_type=nncf.ModelType.TRANSFORMER,
            ignored_scope=nncf.IgnoredScope(names=[names[0], names[-1]], patterns=UNEVEN, validate=False),
        )
        changed = nncf.compress_weights(
            changed,
            mode=nncf.CompressWeightsMode.INT8_SYM,
            ignored_scope=nncf.IgnoredScope(types=["Convolution"], validate=False),
        )
    new = file.with_name("int8.xml")
    openvino().save_model(changed, new, compress_to_fp16=False)
    del model, changed
    for suffix in (".bin", ".xml"):
        os.replace(new.with_suffix(suffix), file.with_suffix(suffix))


def onnx_int8(file: Path, seen: Sequence[Arrays]) -> None:
    """By onnxruntime's static quantisation: weights of each channel, activations of each layer."""
    import onnx
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.left = list(seen)

        def get_next(self) -> Arrays | None:
            return self.left.pop() if self.left else None

    new, beside = file.with_name("int8.onnx"), file.with_name("model.onnx.data")
    large = beside.is_file()  # too large for one file
    root, silent = logging.getLogger(), logging.NullHandler()
    root.addHandler(silent)  # it would set up logging for the whole process to give advice
    try:
        quantization.quantize_static(
            *(file, new, Reader()),
            per_channel=True,
            op_types_to_quantize=["Conv", "MatMul", "Gemm"],
            use_external_data_format=large,
        )
    finally:
        root.removeHandler(silent)
    if large:  # its weights are named after the file: a quarter as many bytes, which may well go into one file
        model = onnx.load(new)
        for old in (beside, new.with_name(f"{new.name}.data")):
            old.unlink()
        onnx.save(model, new, save_as_external_data=model.ByteSize() > MAX_BYTES, location=beside.name)
    os.replace(new, file)
