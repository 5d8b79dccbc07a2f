"""Our autoencoders against diffusers', with the same random weights: speed, memory and how far the outputs differ.

    python benchmarks/autoencoders.py                         # sizes of Latent Diffusion, at 256 pixels
    python benchmarks/autoencoders.py --kinds kl-f8 --sizes 128 512 --batch 2
    python benchmarks/autoencoders.py --kinds tiny-32 emoji tiny kl-f8 --sizes 128 256 --alone
    python benchmarks/autoencoders.py --peak ours kl-f8 decode 1 2048 512     # memory alone, in tiles of 512

Speed is the median of runs in turn within one process, on a quiet machine. Memory is the peak above the loaded model,
of one call in a process of its own, as Linux counts it. A difference is the largest, in the unit of the output (pixels
are in [-1, 1]).
"""

import argparse
import itertools
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import diffusers
import torch
from side_by_side import in_turn

from latentdiff import models
from latentdiff.models.network import downscale_factor

WIDE = (128, 256, 512, 512)
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "kl-f4": ("AutoencoderKL", {"block_out_channels": WIDE[:3], "latent_channels": 3}),
    "kl-f8": ("AutoencoderKL", {"block_out_channels": WIDE, "latent_channels": 4}),
    "kl-f16": ("AutoencoderKL", {"block_out_channels": (128, 128, 256, 256, 512), "latent_channels": 16}),
    "vq-f4": ("VQModel", {"block_out_channels": WIDE[:3], "latent_channels": 3, "num_vq_embeddings": 8192}),
    "vq-f8": ("VQModel", {"block_out_channels": WIDE, "latent_channels": 4, "num_vq_embeddings": 16384}),
    "emoji": (
        "AutoencoderKL",
        {
            "block_out_channels": (48, 96, 128, 128),
            "latent_channels": 8,
            "layers_per_block": 1,
            "norm_num_groups": 16,
        },
    ),
    "tiny": ("AutoencoderTiny", {}),
    "tiny-32": (
        "AutoencoderTiny",
        {
            "encoder_block_out_channels": (32,) * 4,
            "decoder_block_out_channels": (32,) * 4,
            "num_encoder_blocks": (1, 2, 2, 2),
            "num_decoder_blocks": (2, 2, 2, 1),
            "latent_channels": 8,
        },
    ),
}
BLOCKS = {"down": "Encoder", "up": "Decoder"}
LIBRARIES: dict[str, Any] = {"ours": models, "theirs": diffusers}


def build(library: str, kind: str, tile: int) -> Any:
    name, shape = SHAPES[kind]
    if name != "AutoencoderTiny":
        levels = len(shape["block_out_channels"])
        blocks = {f"{way}_block_types": (f"{way.title()}{kind}Block2D",) * levels for way, kind in BLOCKS.items()}
        shape = {"layers_per_block": 2, "sample_size": tile or 256, **blocks, **shape}
    torch.manual_seed(0)
    model = getattr(LIBRARIES[library], name)(**shape).eval()
    if tile:
        model.enable_tiling()
    return model


def call(model: Any, operation: str, batch: int, size: int) -> torch.Tensor:
    """Encode a picture of that size, or decode latents to one."""
    generator = torch.Generator().manual_seed(1)
    if operation == "encode":
        output = model.encode(torch.rand(batch, 3, size, size, generator=generator) * 2 - 1)
        return output.latents if hasattr(output, "latents") else output.latent_dist.mean
    side = size // downscale_factor(model.config)
    return model.decode(torch.randn(batch, model.config.latent_channels, side, side, generator=generator)).sample


def status(key: str) -> float:
    """MiB, from what Linux says of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1024


def peak(library: str, kind: str, operation: str, batch: int, size: int, tile: int) -> float:
    """MiB above the model at the peak of one call."""
    model = build(library, kind, tile)
    call(model, operation, 1, 64)  # what is set up once
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now
    call(model, operation, batch, size)
    return status("VmHWM") - before


def peak_alone(*arguments: Any) -> float:
    command = [sys.executable, __file__, "--peak", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return float(done.stdout.rsplit(maxsplit=1)[-1])


def compare(kind: str, operation: str, arguments: argparse.Namespace, size: int) -> str:
    ours, theirs = (build(library, kind, arguments.tiles) for library in ("ours", "theirs"))
    theirs.load_state_dict(ours.state_dict())
    where = operation, arguments.batch, size
    difference = float((call(ours, *where) - call(theirs, *where)).abs().max())
    mine, other, ratio = in_turn(lambda: call(ours, *where), lambda: call(theirs, *where), arguments.repeats)
    memory = [peak_alone(library, kind, *where, arguments.tiles) for library in ("ours", "theirs")]
    return f"{mine:>8.3f}s{other:>10.3f}s{ratio:>7.2f}{memory[0]:>9.0f}{memory[1]:>10.0f}{difference:>12.1e}"


def processor_time(kind: str, operation: str, batch: int, size: int, repeats: int) -> float:
    """Seconds that one thread of ours computes, the least of several times; other processes hardly count."""
    torch.set_num_threads(1)
    model, times = build("ours", kind, 0), []
    for _ in range(repeats):
        start = time.thread_time()
        call(model, operation, batch, size)
        times.append(time.thread_time() - start)
    return min(times)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--sizes", nargs="+", type=int, default=[256])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tiles", type=int, default=0, help="side of a tile in pixels; 0: whole pictures")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peak", nargs=6, metavar=("LIBRARY", "KIND", "OPERATION", "BATCH", "SIZE", "TILES"))
    parser.add_argument("--alone", action="store_true", help="ours only: the processor's time in one thread")
    arguments = parser.parse_args()
    if arguments.peak:
        library, kind, operation, *numbers = arguments.peak
        print(f"MiB above the model: {peak(library, kind, operation, *map(int, numbers)):.0f}")
        return
    if arguments.alone:
        for size, kind in itertools.product(arguments.sizes, arguments.kinds):
            times = [
                processor_time(kind, way, arguments.batch, size, arguments.repeats) for way in ("encode", "decode")
            ]
            print(f"{kind:7}{size:>6}  encode {times[0] * 1000:.0f} ms  decode {times[1] * 1000:.0f} ms", flush=True)
        return
    tiles = f", tiles of {arguments.tiles}" if arguments.tiles else ""
    print(f"torch {torch.__version__}, diffusers {diffusers.__version__}, {torch.get_num_threads()} threads, float32")
    print(f"batch {arguments.batch}{tiles}\n")
    print(f"{'':21}{'ours':>9}{'diffusers':>11}{'ratio':>7}{'MiB':>9}{'theirs':>10}{'difference':>12}")
    for kind in arguments.kinds:
        for size in arguments.sizes:
            for operation in ("encode", "decode"):
                print(f"{kind:7}{size:>6} {operation:7}" + compare(kind, operation, arguments, size), flush=True)


if __name__ == "__main__":
    main()
