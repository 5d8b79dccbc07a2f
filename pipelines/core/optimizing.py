"""What makes a pipeline draw faster on this machine: found by trying, and remembered for each user."""

import copy
import hashlib
import itertools
import json
import logging
import math
import os
import platform
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.utils.torch_utils import is_compiled_module
from torch import Tensor, nn

from latentdiff.interchange.atomic import json_text, write_text_whole
from latentdiff.interchange.cache_folder import shared_folder
from latentdiff.interchange.fingerprint import weights_digest
from latentdiff.memory import is_lack_of_memory
from latentdiff.models.network import offloaded_in_groups
from latentdiff.pipelines.core.step_runner import StepRunner

if TYPE_CHECKING:
    from latentdiff.pipelines.core.pipeline import LatentPipeline

logger = logging.getLogger(__name__)

VERSION = 4  # of what is remembered, to be raised when it means something else
GAIN = 0.95  # a way that changes results, or takes memory, must take at most this share of the time
FEW = 8  # steps of a call that is measured, at most


@dataclass(frozen=True)
class Way:
    """A way to run the denoiser."""

    dtype: str = "float32"
    channels_last: bool = False
    compiled: bool = False
    threads: int = 1
    """0 on a GPU."""
    graphs: bool = False

    @classmethod
    def of(cls, pipeline: "LatentPipeline") -> "Way":
        """As a pipeline draws now."""
        unet, runner = pipeline.unet, pipeline.step_runner
        way = cls(str(unet.dtype).removeprefix("torch."), is_channels_last(unet), threads=torch.get_num_threads())
        if unet.device.type != "cuda":
            return way
        return replace(
            way, threads=0, compiled=runner is not None and runner.compiled, graphs=runner is not None and runner.graphs
        )

    def apply(self, pipeline: "LatentPipeline") -> None:
        """Let the pipeline draw so; its UNet stays the very one if nothing of it changes, else it becomes a copy."""
        network = self.applied(pipeline.unet)
        if network is not pipeline.unet:
            pipeline.unet = network
        runner, wanted = pipeline.step_runner, not self.threads and (self.compiled or self.graphs)
        if not wanted:
            pipeline.step_runner = None
        elif runner is None or (runner.compiled, runner.graphs) != (self.compiled, self.graphs):
            pipeline.step_runner = StepRunner(compiled=self.compiled, graphs=self.graphs)

    def applied(self, network: Any) -> Any:
        """A network that runs so: the very one if nothing of it changes, else a copy."""
        if self.threads:
            torch.set_num_threads(self.threads)
        dtype = getattr(torch, self.dtype)
        reorder = self.channels_last and not is_channels_last(network)
        if dtype != network.dtype or reorder:
            network = copy.deepcopy(network)
            torch.nn.Module.to(
                network, dtype
            )  # diffusers' own warns of modules to keep in float32, of which it has none
        if reorder:
            network = network.to(memory_format=torch.channels_last)
        packed = self.compiled and self.threads
        return torch.compile(network, options={"freezing": True}) if packed else network

    def __str__(self) -> str:
        parts = [self.dtype, *[f"{self.threads} thread{'s' if self.threads > 1 else ''}"] * bool(self.threads)]
        parts += ["channels-last"] * self.channels_last
        parts += [f"compiled{', with its weights packed' * bool(self.threads)}"] * self.compiled
        return ", ".join([*parts, *["as CUDA graphs"] * self.graphs])


def is_channels_last(network: nn.Module) -> bool:
    """Whether the kernels of all convolutions are so in memory."""
    kernels = [weight for weight in network.parameters() if weight.dim() == 4]
    last = all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)
    return last and not all(kernel.is_contiguous() for kernel in kernels)  # some kernels are both


@dataclass(frozen=True)
class Optimization:
    """What `optimize` found, and what the pipeline does from then on.

    Args:
        way: that was chosen.
        seconds: of one step, by way, as they were tried; the first is how the pipeline ran before.
        errors: of the chosen way's first prediction, as a share of its size (root mean squares).
        remembered: whether it was found earlier, and nothing was tried now.
    """

    way: Way
    seconds: dict[str, float]
    error: float = 0.0
    remembered: bool = field(default=False, compare=False)

    @property
    def speedup(self) -> float:
        first, *_ = self.seconds.values()
        return first / self.seconds[str(self.way)]

    def __str__(self) -> str:
        found = (
            "as found earlier"
            if self.remembered
            else "of " + "; ".join(f"{way}: {seconds * 1000:.0f} ms" for way, seconds in self.seconds.items())
        )
        return (
            f"draws in {self.way}: {self.speedup:.2f} times as fast as before, predictions differ by {self.error:.2%} "
            f"({found})"
        )


def optimize(
    pipeline: "LatentPipeline", call: dict[str, Any], max_error: float, compiled: bool, again: bool
) -> Optimization:
    """See `LatentPipeline.optimize`."""
    check(pipeline, max_error)
    file = memory(pipeline, call, max_error, compiled)
    found = None if again else recall(file)
    if found is None:
        found = tried(pipeline, call, max_error, compiled)
        remember(file, found)
    found.way.apply(pipeline)
    logger.info("the pipeline %s", found)
    return found


def check(pipeline: "LatentPipeline", max_error: float) -> None:
    """Raises ValueError for a pipeline that cannot be optimized, or a limit that is none."""
    if next(pipeline.unet.parameters(), None) is None:
        raise ValueError(
            "optimize() is for networks that torch runs; a pipeline with another runtime is optimized already"
        )
    place, unet = pipeline._execution_device, pipeline.unet.device
    if place.type not in ("cpu", "cuda") or unet.type != place.type or offloaded_in_groups(pipeline.unet):
        raise ValueError(
            f"optimize() is for a processor or a CUDA GPU that holds the UNet; the pipeline draws on {place}, and "
            f"its UNet is on {unet}; undo offloading, or load it with dtype=torch.float16 or torch.bfloat16 and draw "
            f"without optimize()"
        )
    if is_compiled_module(pipeline.unet) or getattr(pipeline.unet, "_compiled_call_impl", None) is not None:
        raise ValueError(
            "optimize() takes a pipeline whose UNet is not compiled; give compiled=True instead (what an optimize() "
            "compiled stays so)"
        )
    if not isinstance(max_error, int | float) or not 0 <= max_error < 1:
        raise ValueError(f"max_error must lie in [0, 1), not {max_error!r}")


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_cores() -> int:
    """Of one, half and all cores, the most that other processes leave free, by the load of the last minute."""
    free = cores() - os.getloadavg()[0] if hasattr(os, "getloadavg") else cores()
    return next((some for some in (cores(), cores() // 2) if 1 <= some <= free + 0.5), 1)


def processor() -> str:
    """Its name and what it can do; enough to tell machines apart."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    said = {line.split(":")[0].strip(): line for line in lines}
    return "\n".join([platform.machine(), *(said.get(key, "") for key in ("model name", "flags"))])


def memory(pipeline: "LatentPipeline", call: dict[str, Any], max_error: float, compiled: bool) -> Path:
    """The file that remembers what was found for these weights, this call, machine, its free cores and torch."""
    told = {key: one for key, one in call.items() if isinstance(one, int | float | bool) and key != "seed"}
    drawn = (call[key] for key in ("prompt", "class_labels") if isinstance(call.get(key), list | tuple))
    told["items"] = max(map(len, drawn), default=1)
    machine: tuple[Any, ...] = (processor(), cores(), free_cores())
    if pipeline.unet.device.type == "cuda":
        machine = (str(torch.cuda.get_device_properties(pipeline.unet.device)),)
    facts = (VERSION, machine, torch.__version__, max_error, compiled, sorted(told.items()))
    start = (str(Way.of(pipeline)), weights_digest(pipeline.unet.state_dict()))
    key = hashlib.sha256(repr((facts, start)).encode()).hexdigest()[:40]
    return shared_folder() / "optimized" / f"{key}.json"


def remember(file: Path, found: Optimization) -> None:
    """Write for `recall` what was found; where that cannot be, a warning says so."""
    content = {**asdict(found), "seconds": [*found.seconds.items()]}  # pairs, since their order tells the first
    try:
        write_text_whole(file, json_text(content))
    except OSError as error:
        logger.warning("what was found cannot be remembered, and will be tried again next time: %s", error)


def recall(file: Path) -> Optimization | None:
    """What was found earlier; None if nothing, or nothing that can be read and done here."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        found = Optimization(Way(**content["way"]), dict(content["seconds"]), float(content["error"]), remembered=True)
        dtype, threads = getattr(torch, found.way.dtype), found.way.threads
        known = isinstance(dtype, torch.dtype) and dtype.is_floating_point and isinstance(threads, int)
        possible = known and 0 <= threads <= max(cores(), torch.get_num_threads())
        return found if possible and math.isfinite(found.speedup) else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError, RecursionError):
        return None


def tried(pipeline: "LatentPipeline", call: dict[str, Any], max_error: float, compiled: bool) -> Optimization:
    """Try ways in turn, each a change of the best so far, and keep those that pay."""
    before = torch.get_num_threads()
    on_gpu = pipeline.unet.device.type == "cuda"
    best = Way.of(pipeline)
    try:
        step, exact = measured(pipeline, best, call)
        seconds, error = {str(best): step}, 0.0
        for change, gain in changes_on_gpu(best, compiled) if on_gpu else changes(best, compiled):
            way = replace(best, **change)
            if str(way) in seconds:
                continue
            try:
                step, prediction = measured(pipeline, way, call, seconds[str(best)])
            except RuntimeError as lack:
                if not is_lack_of_memory(lack):
                    raise
                logger.info("there is not enough memory to draw in %s", way)
                continue
            seconds[str(way)] = step
            off = relative(prediction, exact)
            if step <= gain * seconds[str(best)] and off <= max_error:
                best, error = way, off
    finally:
        torch.set_num_threads(before)
    return Optimization(best, seconds, error)


def changes(start: Way, compiled: bool) -> Iterator[tuple[dict[str, Any], float]]:
    """What to try, and the share of the best time that it must reach."""
    for threads in sorted({1, max(cores() // 2, 1), cores()} - {start.threads}):
        yield {"threads": threads}, GAIN
    yield {"channels_last": True}, GAIN
    if start.dtype == "float32" and has_bfloat16():
        yield {"dtype": "bfloat16"}, GAIN
        yield {"dtype": "bfloat16", "channels_last": True}, GAIN
    if compiled:
        yield {"compiled": True}, GAIN


def changes_on_gpu(start: Way, compiled: bool) -> Iterator[tuple[dict[str, Any], float]]:
    """As `changes`, on a GPU."""
    if start.dtype == "float32":
        yield {"dtype": "float16"}, GAIN
        yield {"dtype": "bfloat16"}, GAIN
    yield {"channels_last": True}, GAIN
    yield {"graphs": True}, GAIN
    if compiled:
        yield {"channels_last": True, "compiled": True, "graphs": True}, GAIN


def has_bfloat16() -> bool:
    """Whether this processor multiplies in bfloat16; others only imitate it, slowly."""
    return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()) and any(
        name in processor() for name in ("avx512_bf16", "amx_bf16", "aarch64", "arm64")
    )


def measured(
    pipeline: "LatentPipeline", way: Way, call: dict[str, Any], best: float = math.inf
) -> tuple[float, Tensor]:
    """Seconds of a few steps after the first, their median, and the first prediction (B, C, h, w).

    The fastest would not tell what other processes do to threads that wait for each other. Where one takes twice as
    long as the `best` so far, no further one is waited for.
    """
    trial = copy.copy(pipeline)
    trial._progress_bar_config = {"disable": True}
    way.apply(trial)
    on_gpu = not way.threads
    usual = trial.defaults["num_inference_steps"]
    steps = max(2, usual if usual <= FEW else FEW if on_gpu else 3)
    times: list[float] = []
    first = None
    seed = call.get("seed") or 0  # for all the same noise, which a generator would not give twice
    call = {**call, "seed": seed, "generator": None, "num_inference_steps": steps, "output_type": "latent"}
    for progress in trial.stream(**call):
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter())
        if first is None:
            first = progress.prediction.detach().float().clone()
        elif times[-1] - times[-2] > 2 * best:
            break
    assert first is not None
    return statistics.median(b - a for a, b in itertools.pairwise(times[:steps])), first


def relative(other: Tensor, exact: Tensor) -> float:
    """The root mean square of their difference over that of `exact`."""
    return float((other - exact).square().mean().sqrt() / exact.square().mean().sqrt().clamp(min=1e-12))
