"""What runs the networks: which runtime, in which precision, for which shapes; and what this machine has of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from latentdiff.extras import check_installed
from latentdiff.pipelines.runtime.engines import Engine, onnx_engine, openvino_engine, openvino_has

PRECISIONS = ("float32", "bfloat16", "float16", "int8")


@dataclass(frozen=True)
class Kind:
    """One runtime: what it needs, what it reads, what opens that."""

    title: str
    needs: tuple[str, ...]
    """Modules; its extra, of the same name as the runtime, installs them."""
    to_quantize: str
    """The module that makes int8 of a network."""
    file: str
    """Of a network, in the network's folder."""
    open: Callable[..., Engine]
    precisions: tuple[str, ...]


RUNTIMES = {
    "openvino": Kind("OpenVINO", ("openvino",), "nncf", "openvino_model.xml", openvino_engine, PRECISIONS),
    "onnx": Kind(
        "onnxruntime",
        ("onnxruntime", "onnx", "onnxscript"),
        "onnxruntime.quantization",
        "model.onnx",
        onnx_engine,
        ("float32", "float16", "int8"),
    ),
}


@dataclass(frozen=True)
class Runtime:
    """What runs the networks of a pipeline, instead of torch.

    Args:
        name: "openvino" or "onnx".
        precision: "float32"; "bfloat16": computed in it, the weights of float32; "float16": the weights, computed in
            float32 where the processor has nothing faster; "int8": weights and activations of the denoiser.
        shape: (pictures, height, width) of every call, for graphs of this shape only; None: any. What else is asked
            for is refused.

    Raises:
        ValueError: one that is not known, or that the runtime has not, or this processor.
        ImportError: the runtime is not installed.
    """

    name: str
    precision: str = "float32"
    shape: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        if self.name not in RUNTIMES:
            raise ValueError(f"there is no runtime {self.name!r}; choose from {', '.join(RUNTIMES)}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"there is no precision {self.precision!r}; choose from {', '.join(PRECISIONS)}")
        if self.precision not in self.kind.precisions:
            raise ValueError(
                f"{self.kind.title} computes on no processor in {self.precision}; choose from "
                f"{', '.join(self.kind.precisions)}, or the runtime openvino"
            )
        needed = self.kind.needs + ((self.kind.to_quantize.split(".")[0],) if self.precision == "int8" else ())
        check_installed(f"the runtime {self.name}", needed, self.name)
        if self.precision == "bfloat16" and not openvino_has("BF16"):
            raise ValueError(
                "this processor does not compute in bfloat16 (it lacks avx512_bf16 and amx_bf16); choose float32, "
                "or int8"
            )

    @property
    def kind(self) -> Kind:
        return RUNTIMES[self.name]

    @property
    def stored(self) -> str:
        """The precision of what is written: bfloat16 is computed with the weights of float32."""
        return "float32" if self.precision == "bfloat16" else self.precision

    def precision_of(self, part: str) -> str:
        """Of a network, by its folder. In int8 is the denoiser, and then the decoder in bfloat16 where that is fast."""
        if self.precision != "int8" or part == "unet":
            return self.precision
        return "bfloat16" if part == "vae_decoder" and self.name == "openvino" and openvino_has("BF16") else "float32"

    @classmethod
    def of(cls, name: str, dtype: Any = None, shape: Sequence[int] | None = None) -> "Runtime":
        """As options of ``from_pretrained`` say it.

        Raises:
            TypeError, ValueError: a dtype that is no precision, or a shape that is none.
            ImportError: the runtime is not installed.
        """
        from latentdiff.pipelines.core.call_options import whole_number

        precision = "float32" if dtype is None else str(dtype).removeprefix("torch.")
        if precision not in PRECISIONS:
            raise ValueError(
                f"a runtime has one dtype of {', '.join(f'torch.{one}' for one in PRECISIONS)}, not {dtype}"
            )
        if shape is not None:
            if len(shape) != 3:
                raise ValueError(f"runtime_shape is (pictures, height, width), not {tuple(shape)}")
            shape = tuple(whole_number(one, "runtime_shape") for one in shape)
        return cls(name, precision, shape)  # type: ignore[arg-type]


def dtype_in(options: dict[str, Any]) -> Any:
    """The ``dtype`` among options, or what stands there under its older name; taken out of them.

    Raises:
        ValueError: it is none.
    """
    from latentdiff.dtypes import read_dtype

    newer, older = (options.pop(name, None) for name in ("dtype", "torch_dtype"))
    return read_dtype(newer or older)


def runtime_of(options: dict[str, Any]) -> Runtime | None:
    """The `Runtime` among options of ``from_pretrained``, taken out of them with its dtype; None: torch."""
    name, shape = options.pop("runtime", None), options.pop("runtime_shape", None)
    if name is None:
        if shape is not None:
            raise ValueError("from_pretrained: runtime_shape is of a runtime; say runtime= too")
        if {"int8", "torch.int8"} & {str(options.get("dtype")), str(options.get("torch_dtype"))}:
            raise ValueError("from_pretrained: torch does not draw in int8; say runtime='openvino' or 'onnx' too")
        return None
    if options.get("device_map") not in (None, "cpu"):
        raise ValueError(f"from_pretrained: the runtime {name} computes on the processor; leave device_map out")
    options.pop("device_map", None)
    return Runtime.of(name, dtype_in(options), shape)
