"""What runs the networks fastest on this processor: torch, OpenVINO and onnxruntime against diffusers, in turn.

    python benchmarks/runtimes.py                          # the packaged model's UNet, decoder and whole pictures
    python benchmarks/runtimes.py --rows torch openvino-float32 openvino-bfloat16
    python benchmarks/runtimes.py --size sd15              # a UNet of Stable Diffusion 1.5's size, random weights
    python benchmarks/runtimes.py --size rehearsal         # a small one of its kind, to see that all rows run

Every row is compared with diffusers' eager float32, which runs between any two of them; printed are medians, the
median of the ratios round by round (above 1: faster than diffusers), and the largest difference from diffusers' result.
A row of bfloat16 is compared with diffusers in bfloat16 too. Say how busy the machine was: the load is printed.
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from latentdiff import TextToImagePipeline, UNet2DConditionModel
from latentdiff.interchange.folders import packaged_model
from latentdiff.pipelines.runtime.choice import Runtime
from latentdiff.pipelines.runtime.engine_networks import RuntimeUNet
from latentdiff.pipelines.runtime.graphs import denoiser_part, write_graph
from latentdiff.pipelines.runtime.quantize import Recorder, onnx_int8, openvino_int8

Work = Callable[[], Tensor]
ROWS = ("torch", "torch-bfloat16", "onnx-float32", "onnx-int8")
ROWS += ("openvino-float32", "openvino-bfloat16", "openvino-int8")
DIFFUSERS, HALF = "diffusers", "diffusers-bfloat16"


def seconds(work: Work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compare(title: str, works: dict[str, Work], repeats: int) -> None:
    """Run all in turn, several rounds, and print a line for each, compared with the first."""
    first = next(iter(works))
    reference = works[first]().float()
    apart = {name: float((work().float() - reference).abs().max()) for name, work in works.items()}
    rounds = [{name: seconds(work) for name, work in works.items()} for _ in range(repeats)]
    print(f"\n{title:36}{'median':>10}{'ratio':>8}{'in bfloat16':>13}{'largest difference':>20}")
    for name in works:
        median = statistics.median(one[name] for one in rounds)
        ratio = statistics.median(one[first] / one[name] for one in rounds)
        same = statistics.median(one[HALF] / one[name] for one in rounds) if HALF in works else None
        in_half = f"{same:>13.2f}" if same is not None and "float32" not in name else f"{'':13}"
        print(f"{name:36}{median * 1e3:>8.1f}ms{ratio:>8.2f}{in_half}{apart[name]:>20.2g}", flush=True)


def inputs(config: Any, batch: int, side: int) -> dict[str, Any]:
    """Of a UNet: latents, a timestep, text states."""
    generator = torch.Generator().manual_seed(0)
    return {
        "sample": torch.randn(batch, config.in_channels, side, side, generator=generator),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(batch, 77, config.cross_attention_dim, generator=generator),
    }


def called(unet: Any, dtype: torch.dtype, given: dict[str, Any]) -> Work:
    cast = {name: one.to(dtype) if one.is_floating_point() else one for name, one in given.items()}
    return lambda: unet(**cast, return_dict=False)[0]


def step_in_loop(unet: Any, dtype: torch.dtype, given: dict[str, Any]) -> Work:
    """Ours as the pipeline calls it: what depends on prompt and step only is made beforehand."""
    time_embedding = unet.embed_time(given["timestep"])
    context = unet.encode_text(given["encoder_hidden_states"].to(dtype))
    return lambda: unet.denoise(given["sample"].to(dtype), time_embedding, context)


def unet_rows(
    rows: list[str], ours: Any, theirs: Any, runtimes: dict[str, Any], given: dict[str, Any]
) -> dict[str, Work]:
    """Name -> a step. The networks have the same weights."""
    half = torch.bfloat16
    works: dict[str, Work] = {DIFFUSERS: called(theirs[torch.float32], torch.float32, given)}
    if any("bfloat16" in row or "int8" in row for row in rows):
        works[HALF] = called(theirs[half], half, given)
    for row in rows:
        if row.startswith("torch"):
            dtype = half if "bfloat16" in row else torch.float32
            works[row] = step_in_loop(ours[dtype], dtype, given)
        else:
            works[row] = called(runtimes[row], torch.float32, given)
    return works


def packaged(rows: list[str], repeats: int) -> None:
    model = str(packaged_model())
    dtypes = (torch.float32, torch.bfloat16)
    ours = {dtype: TextToImagePipeline.from_pretrained(model, dtype=dtype) for dtype in dtypes}
    theirs = {dtype: diffusers.StableDiffusionPipeline.from_pretrained(model, torch_dtype=dtype) for dtype in dtypes}
    runtimes = of_runtimes(model, rows)
    for batch in (1, 2, 8):
        config = ours[torch.float32].unet.config
        given = inputs(config, batch, config.sample_size)
        networks = [{dtype: one.unet for dtype, one in some.items()} for some in (ours, theirs)]
        works = unet_rows(rows, *networks, {row: one.unet for row, one in runtimes.items()}, given)
        compare(f"UNet of the packaged model, batch {batch}", works, repeats)
    runtimes = of_runtimes(model, rows)  # anew: the batches above have used up the shapes with graphs of their own
    named = {DIFFUSERS: theirs[torch.float32]}
    if any("bfloat16" in row or "int8" in row for row in rows):
        named[HALF] = theirs[torch.bfloat16]
    for row in rows:
        named[row] = runtimes.get(row) or ours[torch.bfloat16 if "bfloat16" in row else torch.float32]
    for steps, scale in ((4, 1.0), (8, 4.0)):
        works = {name: picture(one, steps, scale) for name, one in named.items()}
        compare(f"pictures in {steps} steps, guidance {scale:g}", works, max(repeats // 2, 3))


def of_runtimes(model: str, rows: list[str]) -> dict[str, Any]:
    """A pipeline for each row that a runtime draws."""
    split = {row: row.split("-") for row in rows if not row.startswith("torch")}
    load = TextToImagePipeline.from_pretrained
    return {row: load(model, runtime=name, dtype=getattr(torch, dtype)) for row, (name, dtype) in split.items()}


def picture(pipeline: Any, steps: int, scale: float) -> Work:
    """Prompt to picture, (1, 3, H, W) in [0, 1]."""
    pipeline.set_progress_bar_config(disable=True)

    def draw() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        call = {"num_inference_steps": steps, "guidance_scale": scale, "output_type": "pt"}
        return pipeline("a red car", generator=generator, **call).images

    return draw


def sd15(rows: list[str], repeats: int, side: int = 32, **other: Any) -> None:
    """Stable Diffusion 1.5's UNet with random weights; for a rehearsal, with `other` entries in its config."""
    torch.manual_seed(0)
    config = {"sample_size": 64, "cross_attention_dim": 768, **other}
    ours = {torch.float32: UNet2DConditionModel(**config).eval()}
    weights = ours[torch.float32].state_dict()
    given = inputs(ours[torch.float32].config, 2, side)
    with tempfile.TemporaryDirectory() as place:
        runtimes = {}  # first, for they take most memory as they are made
        for row in [row for row in rows if not row.startswith("torch")]:
            runtime = Runtime(*row.split("-"))
            folder = Path(place, f"{runtime.name}-{runtime.stored}")
            if not folder.exists():
                write_graph(runtime.name, "unet", denoiser_part(ours[torch.float32]), folder / "unet", half=False)
                if runtime.precision == "int8":
                    quantized(runtime, folder, given)
            runtimes[row] = RuntimeUNet(runtime, folder)
        theirs, halves = {}, any("bfloat16" in row or "int8" in row for row in rows)
        for dtype in (torch.float32, torch.bfloat16) if halves else (torch.float32,):
            theirs[dtype] = of_weights(diffusers.UNet2DConditionModel, config, weights, dtype)
        if "torch-bfloat16" in rows:
            ours[torch.bfloat16] = of_weights(UNet2DConditionModel, config, weights, torch.bfloat16)
        works = unet_rows(rows, ours, theirs, runtimes, given)
        compare(f"Stable Diffusion 1.5's UNet, {side} x {side}, batch 2", works, max(repeats // 3, 3))


def of_weights(kind: Any, config: dict[str, Any], weights: dict[str, Tensor], dtype: torch.dtype) -> Any:
    with torch.device("meta"):
        unet = kind(**config)
    unet.load_state_dict({name: tensor.to(dtype) for name, tensor in weights.items()}, assign=True)
    return unet.eval()


def quantized(runtime: Runtime, folder: Path, given: dict[str, Any]) -> None:
    """A graph of float32 becomes one of int8, calibrated on noise: as fast as any, and of no use."""
    exact = RuntimeUNet(Runtime(runtime.name), folder)
    recorder = Recorder(exact.engine("unet"))
    exact.engines["unet"] = recorder
    exact(**given, return_dict=False)
    exact.engines.clear()
    seen, file = recorder.seen, folder / "unet" / runtime.kind.file
    del recorder
    (openvino_int8 if runtime.name == "openvino" else onnx_int8)(file, seen)


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("packaged", "sd15", "rehearsal"), default="packaged")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    print(f"{processor()}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    print(f"torch {torch.__version__}, diffusers {diffusers.__version__}")
    if arguments.size == "packaged":
        packaged(arguments.rows, arguments.repeats)
    else:
        small = {"block_out_channels": (32, 32, 64, 64), "cross_attention_dim": 32}
        sd15(arguments.rows, arguments.repeats, **(small if arguments.size == "rehearsal" else {}))
    print(f"\nload at the end {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
