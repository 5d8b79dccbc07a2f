"""Graphs in files, opened by a runtime: arrays in, arrays out, on the processor, from any number of threads."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Lock, RLock
from typing import Any, Protocol

import numpy as np

Shapes = tuple[tuple[int, ...], ...]

FIXED = 3
"""How many shapes get a graph of their own, which is faster by a quarter; further ones share one for any shape."""

_IMPORTING = RLock()


class Engine(Protocol):
    """A graph that can be run.

    Attributes:
        inputs: their names, with the size of each axis; None where it may be any.
    """

    inputs: dict[str, tuple[int | None, ...]]

    def __call__(self, arrays: Mapping[str, np.ndarray]) -> list[np.ndarray]: ...


def check_shapes(file: Path, inputs: Mapping[str, tuple[int | None, ...]], arrays: Mapping[str, np.ndarray]) -> None:
    """Raises ValueError for an array of a shape that the graph does not take, one too many, or one that is missing."""
    for name in set(arrays) ^ set(inputs):
        lacking = "has no input for" if name in arrays else "needs"
        raise ValueError(f"{file}: the graph {lacking} {name}; its inputs are {', '.join(inputs)}")
    for name, sizes in inputs.items():
        given = arrays[name].shape
        if len(given) != len(sizes) or any(one not in (None, size) for one, size in zip(sizes, given, strict=True)):
            wanted = " x ".join("any" if one is None else str(one) for one in sizes)
            raise ValueError(
                f"{file}: the graph was made for {name} of {wanted}, and {' x '.join(map(str, given))} was given; draw "
                f"at the size and with the number of pictures that it was made for, or make one for any shape"
            )


@contextmanager
def without_telemetry() -> Iterator[None]:
    """Within, what OpenVINO and NNCF use to report to their makers is not found, so they do not report.

    Threads are within one after another.
    """
    with _IMPORTING:
        before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "openvino_telemetry"}
        for name in before:
            del sys.modules[name]
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
        try:
            yield
        finally:
            del sys.modules["openvino_telemetry"]
            sys.modules.update(before)


@lru_cache(maxsize=1)
def openvino() -> Any:
    """The module."""
    with without_telemetry():
        import openvino

        return openvino


@lru_cache(maxsize=1)
def core() -> Any:
    """OpenVINO's, of this process."""
    return openvino().Core()


def openvino_has(capability: str) -> bool:
    """Whether the processor computes in BF16, FP16, INT8."""
    return capability in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


class OpenVinoEngine:
    """By OpenVINO. The first shapes are compiled one by one, each when it is first given."""

    def __init__(self, file: Path, precision: str, threads: int, keep: bool) -> None:
        self.file = file
        self.model = core().read_model(file)
        hint = {"bfloat16": "bf16", "float16": "f16" if openvino_has("FP16") else "f32"}.get(precision, "f32")
        self.options = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
        if keep:
            self.options |= {"CACHE_DIR": str(file.parent / "compiled"), "CACHE_MODE": "OPTIMIZE_SPEED"}
        self.inputs = {name_of(one): sizes_of(one) for one in self.model.inputs}
        self.compiled: dict[Shapes | None, Any] = {}
        self.requests: dict[Shapes | None, SimpleQueue[Any]] = {}
        self.lock = Lock()

    def __call__(self, arrays: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        check_shapes(self.file, self.inputs, arrays)
        given = [np.ascontiguousarray(arrays[name]) for name in self.inputs]
        idle, compiled = self._compiled_for(tuple(one.shape for one in given))
        try:
            request = idle.get_nowait()
        except Empty:
            request = compiled.create_infer_request()
        results = request.infer(given, share_inputs=True)
        arrays_out = [np.array(results[i]) for i in range(len(results))]
        idle.put(request)
        return arrays_out

    def _compiled_for(self, shapes: Shapes) -> tuple[Any, Any]:
        with self.lock:
            key = shapes if shapes in self.compiled or len(self.compiled) < FIXED else None
            if key not in self.compiled:
                model = self.model
                if key is not None:
                    model = model.clone()
                    model.reshape({name: list(shape) for name, shape in zip(self.inputs, shapes, strict=True)})
                self.compiled[key] = core().compile_model(model, "CPU", self.options)
                self.requests[key] = SimpleQueue()
            return self.requests[key], self.compiled[key]


def name_of(port: Any) -> str:
    """An input's own name; OpenVINO adds those of operations that take it as it is."""
    return port.get_node().get_friendly_name()


def sizes_of(port: Any) -> tuple[int | None, ...]:
    return tuple(one.get_length() if one.is_static else None for one in port.get_partial_shape())


class OnnxEngine:
    """By onnxruntime."""

    def __init__(self, file: Path, threads: int) -> None:
        import onnxruntime

        self.file = file
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # waiting threads take no time
        self.session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self.inputs = {
            one.name: tuple(size if isinstance(size, int) else None for size in one.shape)
            for one in self.session.get_inputs()
        }

    def __call__(self, arrays: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        check_shapes(self.file, self.inputs, arrays)
        return self.session.run(None, {name: np.ascontiguousarray(arrays[name]) for name in self.inputs})


def openvino_engine(file: Path, precision: str, threads: int, keep: bool = False) -> Engine:
    """keep: what is compiled, on disk, as large as the weights for each shape."""
    return OpenVinoEngine(file, precision, threads, keep)


def onnx_engine(file: Path, precision: str, threads: int, keep: bool = False) -> Engine:
    """The precision is that of the file; nothing is compiled that could be kept."""
    return OnnxEngine(file, threads)
