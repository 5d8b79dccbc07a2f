"""Train the packaged model in one short run.

    python -m latentdiff.training.recipes.emoji.burst base PACKED OUT --seconds 450 --autoencoder-seconds 110
    python -m latentdiff.training.recipes.emoji.burst base PACKED OUT --seconds 450 --weights EARLIER_OUT
    python -m latentdiff.training.recipes.emoji.burst distil PACKED OUT --seconds 200
    python -m latentdiff.training.recipes.emoji.burst both PACKED OUT --seconds 560 --weights EARLIER_OUT

PACKED is a folder that `pack` wrote. `base` trains autoencoder and denoiser, `distil` the few-step student of the
denoiser in OUT, `--state` or PACKED; `both` is one after the other, in one call, and leaves the denoiser itself in
`--state`. All leave half-precision weights of at most 16 MiB a file, `log.jsonl` and a page of pictures in OUT.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .settings import BurstSettings

BASE = 0.7  # of the time, for the base, where both are trained


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="burst", description="Train the packaged model in one short run.")
    parser.add_argument("what", choices=("base", "distil", "both"))
    parser.add_argument("packed", type=Path, help="the folder that pack wrote")
    parser.add_argument("output", type=Path)
    parser.add_argument("--seconds", type=float, required=True, help="of the whole run; it ends by itself")
    parser.add_argument("--autoencoder-seconds", type=float, default=110.0)
    parser.add_argument("--state", type=Path, default=Path("burst-state"), help="where base leaves what distil needs")
    parser.add_argument("--weights", type=Path, help="go on from an earlier run's output; its autoencoder stays")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--settings", type=json.loads, default={}, help="a JSON object of BurstSettings")
    options = parser.parse_args(arguments)
    try:
        settings = BurstSettings.read(options.settings)
        if not (options.packed / "bundle.xz").is_file():
            raise FileNotFoundError(f"{options.packed} has no bundle.xz; it is not a folder that pack wrote")
        if options.weights is not None and not (options.weights / "facts.json").is_file():
            raise FileNotFoundError(f"{options.weights} has no facts.json; it is not the output of an earlier run")
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"burst: {error}")
    options.output.mkdir(parents=True, exist_ok=True)
    options.state.mkdir(parents=True, exist_ok=True)
    import torch

    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    deadline = time.monotonic() + options.seconds
    networks = None
    if options.what == "both":
        options.seconds *= BASE
    if options.what != "distil":
        networks = base(options, settings)
    if options.what != "base":
        options.seconds = deadline - time.monotonic()
        distil(options, settings, networks)


def base(options: argparse.Namespace, settings: BurstSettings) -> Any:
    """Compose, train the autoencoder, then the denoiser; the latter gets what is left of the time.

    Returns what `distil` trains, compiled while the denoiser was trained, or None where it is not to follow.
    """
    deadline = time.monotonic() + options.seconds
    from .pool import Pool

    pool = Pool.empty(settings.pool, settings.size, settings.max_captions, settings.tokens)
    # Forked before this process uses the device: one composes, one compiles the denoiser meanwhile and trains it then.
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    composer = context.Process(target=_compose, args=(options, settings, pool, deadline))
    child = context.Process(target=_denoise, args=(options, settings, pool, receiver, deadline))
    composer.start()
    child.start()
    networks = None
    try:
        _autoencode(options, settings, pool, sender)
        if options.what == "both":
            networks = _ready_to_distil(options, settings)
        child.join()
    finally:  # no process outlives a failure
        composer.terminate()
        child.terminate()
    if child.exitcode:
        sys.exit(f"burst: the denoiser's process ended with {child.exitcode}")
    return networks


def _compose(options: argparse.Namespace, settings: BurstSettings, pool: Any, deadline: float) -> None:
    from ..drawings import render_all
    from ..scenes import Composer
    from .pool import fill, read_jobs

    os.nice(10)  # the compiler of the denoiser, which the GPU waits for, goes first
    drawings = render_all(read_jobs(options.packed / "bundle.xz"), settings.size, options.workers)
    print(f"{len(drawings)} drawings, {deadline - time.monotonic():.0f} s left", flush=True)
    composer = Composer(drawings, settings.size, settings.seed, kinds=settings.kinds)
    for worker in fill(pool, composer, options.packed, options.workers):
        worker.join()
    print(f"{pool.ready.mean():.0%} composed, {deadline - time.monotonic():.0f} s left", flush=True)


def _autoencode(options: argparse.Namespace, settings: BurstSettings, pool: Any, sender: Any) -> None:
    import torch

    from . import autoencoder

    device = torch.device(options.device)
    if options.weights is None:
        features = options.packed / "features.safetensors"
        distance = autoencoder.packed_perceptual(features) if features.exists() else None
        model = autoencoder.train(pool, settings, options.autoencoder_seconds, device, options.output, distance)
        latents = autoencoder.encode_pool(model, pool, device)
        scale = 1 / float(latents[:4096].float().std())
    else:
        for path in options.weights.glob("vae-*"):
            (options.output / path.name).write_bytes(path.read_bytes())
        model = autoencoder.load(settings, [options.weights], device)
        latents = autoencoder.encode_pool(model, pool, device)
        scale = json.loads((options.weights / "facts.json").read_text(encoding="utf-8"))["scaling_factor"]
    np.save(options.state / "latents.npy", (latents.float() * scale).half().numpy())
    facts = {"scaling_factor": scale, "settings": settings.as_dict()}
    (options.output / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
    (options.state / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
    for path in options.output.glob("vae-*"):
        (options.state / path.name).write_bytes(path.read_bytes())
    sender.send("ready")


def _denoise(options: argparse.Namespace, settings: BurstSettings, pool: Any, ready: Any, deadline: float) -> None:
    import torch

    from . import denoiser
    from .clock import save_half

    device = torch.device(options.device)
    compiled = device.type == "cuda"
    width = text_width(options.packed)
    if options.weights is None:
        unet = denoiser.build(settings, width, device)
    else:
        unet = denoiser.load(settings, width, [options.weights], device, "unet")
    network = denoiser.warm_up(unet, settings, settings.unet_batch, width, device, compiled)
    print(f"denoiser is warm, {deadline - time.monotonic():.0f} s left", flush=True)
    pool.wait(1.0)
    np.savez(options.state / "captions.npz", tokens=pool.tokens, counts=pool.counts)
    captions = read_captions(options, device)
    print(f"captions are read, {deadline - time.monotonic():.0f} s left", flush=True)
    ready.recv()
    latents = torch.from_numpy(np.load(options.state / "latents.npy")).to(device)
    reserve = 12.0 if compiled else 1.0  # for the page of pictures
    seconds = max(deadline - time.monotonic() - reserve, 1.0)
    print(f"denoiser begins: {len(latents)} pictures, {len(captions.states)} captions, {seconds:.0f} s", flush=True)
    output = options.state if options.what == "both" else options.output
    denoiser.train(unet, network, latents, captions, settings, seconds, output, options.output / "log.jsonl")
    save_half(unet.state_dict(), options.state, "unet")
    page(options, settings, denoiser.as_network(unet, False), captions, device, "base.png", 25, settings.guidance_scale)


def distil(options: argparse.Namespace, settings: BurstSettings, networks: Any = None) -> None:
    """Train the few-step student of the denoiser in `--state`, `output` or `packed`."""
    deadline = time.monotonic() + options.seconds
    import torch

    from . import denoiser
    from . import distil as distillation
    from .clock import load_half

    device = torch.device(options.device)
    networks = networks or _ready_to_distil(options, settings)
    networks.begin(load_half([options.output, options.state, options.packed], "unet"))
    captions = read_captions(options, device)
    reserve = 10.0 if device.type == "cuda" else 1.0  # for the page of pictures
    seconds = max(deadline - time.monotonic() - reserve, 1.0)
    print(f"distillation begins: {len(captions.states)} captions, {seconds:.0f} s", flush=True)
    student = distillation.train(networks, captions, settings, seconds, options.output)
    page(options, settings, denoiser.as_network(student, False), captions, device, "student.png", settings.few_steps, 1)


def _ready_to_distil(options: argparse.Namespace, settings: BurstSettings) -> Any:
    import torch

    from .distil import Networks

    return Networks.warm(settings, text_width(options.packed), torch.device(options.device))


def text_width(packed: Path) -> int:
    config = json.loads((packed / "text_encoder" / "config.json").read_text(encoding="utf-8"))
    return int(config["hidden_size"])


def read_captions(options: argparse.Namespace, device: Any) -> Any:
    """The states of all captions that the pool has, and of none."""
    import torch

    from .denoiser import Captions
    from .text import CutTokenizer, text_states

    file = np.load(options.state / "captions.npz")
    tokens, counts = file["tokens"], torch.from_numpy(file["counts"].astype(np.int64))
    there = np.arange(tokens.shape[1]) < file["counts"][:, None]
    empty = CutTokenizer(options.packed, tokens.shape[2])([""])
    rows = torch.from_numpy(np.concatenate([tokens[there], empty]).astype(np.int64))
    first = counts.cumsum(0) - counts
    return Captions(text_states(options.packed, rows, device), first.to(device), counts.to(device))


def page(
    options: argparse.Namespace,
    settings: BurstSettings,
    network: Any,
    captions: Any,
    device: Any,
    name: str,
    steps: int,
    guidance_scale: float,
) -> None:
    """Draw the prompts of the recipe's settings file and some that combine things, as one PNG."""
    import torch
    from PIL import Image

    from latentdiff.interchange.png import image_grid, save_picture

    from . import autoencoder, sampling
    from .denoiser import process_of
    from .text import CutTokenizer, text_states

    prompts = json.loads((options.packed / "prompts.json").read_text(encoding="utf-8"))
    rows = torch.from_numpy(CutTokenizer(options.packed, settings.tokens)(prompts).astype(np.int64))
    states = text_states(options.packed, rows, device)
    generator = torch.Generator().manual_seed(0)
    side = settings.latent_size
    noise = torch.randn(len(prompts), settings.latent_channels, side, side, generator=generator).to(device)
    levels = sampling.Levels(process_of(settings), device)
    plan = sampling.trailing(steps)
    latents = sampling.sample(network, levels, noise, states, plan, guidance_scale, captions.empty)
    scale = json.loads((options.state / "facts.json").read_text(encoding="utf-8"))["scaling_factor"]
    vae = autoencoder.load(settings, [options.state, options.output, options.packed], device)
    pictures = autoencoder.decode(vae, latents / scale, device).numpy()
    save_picture(image_grid([Image.fromarray(picture) for picture in pictures], 8), options.output / name)


if __name__ == "__main__":
    main()
