"""Go on training the decoder alone, on a processor, while nothing else needs it; the latents stay what they are.

    python -m latentdiff.training.recipes.emoji.burst.refine WEIGHTS BUNDLE STATE [--features FEATURES]

WEIGHTS is what `base` left. The run begins, or goes on where it stopped, in STATE; every few minutes it leaves
`vae-*.safetensors` there, which has the place of the one in WEIGHTS. It can be paused and killed at any time.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from latentdiff.interchange.atomic import atomic_file

from .autoencoder import Distance, load, mean_psnr, packed_perceptual
from .clock import Log, averaged, optimizer, save_half
from .settings import BurstSettings

DRAWN = 2000  # drawings at most, to begin within a minute; others each time that the run is started
BORDER, WEIGHT = 2, 10.0  # pixels at the border that weigh more: padding spoils them, and a dot on white is seen
WARMUP = 100  # updates until the whole learning rate: the optimizer knows nothing of the weights in the beginning


class Refinement:
    """A decoder in training, its optimizer and average; all of it is one safetensors file in `state`."""

    def __init__(self, weights: Path, state: Path, rate: float, average: float) -> None:
        facts = json.loads((weights / "facts.json").read_text(encoding="utf-8"))
        self.settings, self.path = BurstSettings.read(facts["settings"]), state / "refinement.safetensors"
        self.model: Any = load(self.settings, [weights], torch.device("cpu"))
        self.model.requires_grad_(False)
        trained = (self.model.post_quant_conv, self.model.decoder)
        self.part = torch.nn.ModuleList([part for part in trained if part is not None]).requires_grad_(True)
        self.rate, self.adam = rate, optimizer(self.part, rate)
        self.average = EMAModel(self.part.parameters(), average, foreach=True)
        self.parameters = [p for group in self.adam.param_groups for p in group["params"]]
        size = self.settings.size
        self.weights = torch.full((size, size), WEIGHT)
        self.weights[BORDER:-BORDER, BORDER:-BORDER] = 1.0
        self.updates = 0
        if self.path.exists():
            self._read()

    def save(self) -> None:
        """The whole state, and the averaged weights in half precision beside it."""
        tensors: dict[str, Tensor] = {"updates": torch.tensor(self.updates)}
        for i, parameter in enumerate(self.parameters):
            moments = self.adam.state[parameter]
            tensors |= {f"{i}.weight": parameter.detach().contiguous(), f"{i}.step": moments["step"]}
            tensors |= {f"{i}.{name}": moments[name].contiguous() for name in ("exp_avg", "exp_avg_sq")}
        tensors |= {f"average.{i}": value.contiguous() for i, value in enumerate(self.average.shadow_params)}
        with atomic_file(self.path) as partial:
            save_file(tensors, partial)
        with averaged(self.part, self.average):
            save_half(self.model.state_dict(), self.path.parent, "vae")

    @torch.no_grad()
    def _read(self) -> None:
        tensors = load_file(self.path)
        self.updates = self.average.optimization_step = int(tensors["updates"])
        for i, parameter in enumerate(self.parameters):
            parameter.copy_(tensors[f"{i}.weight"])
            names = ("step", "exp_avg", "exp_avg_sq")
            self.adam.state[parameter] = {name: tensors[f"{i}.{name}"].clone() for name in names}
        for i, value in enumerate(self.average.shadow_params):
            value.copy_(tensors[f"average.{i}"])

    def update(self, pixels: Tensor, perceptual: Distance | None) -> Tensor:
        """One update on (B, 3, H, W) in [-1, 1], in bfloat16 where the processor has it; the L1 distance."""
        with torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported()):
            with torch.no_grad():
                latents = self.model.encode_moments(pixels).chunk(2, dim=1)[0]
            decoded = self.model.decode_latents(latents).float()
            error = (decoded - pixels).abs()
            distance = error.mean()
            loss = (error * self.weights).mean()
            if perceptual is not None:
                loss = loss + self.settings.perceptual_weight * perceptual(decoded, pixels)
        for group in self.adam.param_groups:
            group["lr"] = self.rate * min(1.0, (self.updates + 1) / WARMUP)
        self.adam.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.adam.step()
        self.updates += 1
        self.average.step(self.part.parameters())
        return distance.detach()


def psnr(run: Refinement, pixels: Tensor) -> float:
    """Mean PSNR in dB of the averaged weights, float32."""
    with averaged(run.part, run.average):
        return mean_psnr(run.model, pixels)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="refine", description="Go on training the decoder of the packaged model.")
    parser.add_argument("weights", type=Path)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("state", type=Path)
    parser.add_argument("--features", type=Path, help="of the perceptual distance, as pack wrote them")
    parser.add_argument("--rate", type=float, default=2e-4)
    parser.add_argument("--average", type=float, default=0.998)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--minutes", type=float, default=10_000.0)
    parser.add_argument("--save-every", type=float, default=300.0, help="seconds")
    options = parser.parse_args(arguments)
    for path in (options.weights / "facts.json", options.bundle):
        if not path.is_file():
            sys.exit(f"refine: {path} does not exist")
    options.state.mkdir(parents=True, exist_ok=True)
    from ..drawings import read_bundle, render_all
    from ..scenes import Composer

    run = Refinement(options.weights, options.state, options.rate, options.average)
    size, begin = run.settings.size, run.updates
    jobs = read_bundle(options.bundle)
    share = -(-len(jobs) // DRAWN)
    composer = Composer(render_all(jobs[begin % share :: share], size), size, seed=1)
    held = [job for job in jobs if job.split == "validation"]
    checked = Composer(render_all(held, size), size, split="validation") if held else composer
    perceptual = packed_perceptual(options.features) if options.features else None
    log = Log(options.state / "log.jsonl", "refinement")
    held_out = _pixels([checked(i).picture for i in range(64)])
    log(updates=begin, psnr=psnr(run, held_out))
    deadline, saved, running = time.monotonic() + options.minutes * 60, time.monotonic(), 0.0
    while time.monotonic() < deadline:
        first = run.updates * options.batch
        pixels = _pixels([composer(first + i).picture for i in range(options.batch)])
        running += 0.02 * (float(run.update(pixels, perceptual)) - running)
        if time.monotonic() - saved > options.save_every:
            saved = time.monotonic()
            run.save()
            log(updates=run.updates, samples=run.updates * options.batch, l1=running, psnr=psnr(run, held_out))
    run.save()
    log(updates=run.updates, samples=run.updates * options.batch, l1=running, psnr=psnr(run, held_out))


def _pixels(pictures: Sequence[Any]) -> Tensor:
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return pixels.contiguous(memory_format=torch.channels_last)


if __name__ == "__main__":
    main()
