"""Text to image by graphs and numpy alone, for what is asked for most: words, a size the model was trained on, seeds.

Whatever needs more is not tried: `open_light` gives None, and the pipeline in torch draws it.
"""

import os
import platform
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer

from latentdiff.interchange.fingerprint import WEIGHTS
from latentdiff.interchange.folders import check_pipeline_folder, read_json
from latentdiff.pipelines.batch.record import Machine
from latentdiff.pipelines.registry import DEFAULTS, DEFAULTS_KEY
from latentdiff.pipelines.runtime.choice import Runtime
from latentdiff.pipelines.runtime.engines import Engine
from latentdiff.pipelines.runtime.light.noise import BLOCK, NoiseSource
from latentdiff.pipelines.runtime.light.schedulers import KNOWN, Scheduler
from latentdiff.pipelines.runtime.places import TOKENS_SAY, folder_of, held, ready

COMPONENTS = {"unet", "vae", "scheduler", "text_encoder", "tokenizer"}
LATENTS_SCALE = np.float32(0.18215)
"""That the decoder's graph takes latents in, see `storage.onnx`."""


class TorchNeededError(Exception):
    """Something is asked for that is not done here."""


@dataclass(frozen=True)
class Words:
    """A tokenizer, and the graph that makes states of its tokens.

    Args:
        said: what `text_graph.write_text` wrote beside the graph.
    """

    said: dict[str, Any]
    engine: Engine

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_str(self.said["tokenizer"])

    def tokens(self, text: str) -> tuple[list[int], list[int]]:
        """The ids of a prompt, and its mask; L each.

        Raises:
            TorchNeededError: it is too long, and what is cut must be said.
        """
        ids, length = self.tokenizer.encode(text).ids, self.said["length"]
        free = length - len(ids)
        if free < 0:
            raise TorchNeededError(f"a prompt of {len(ids)} tokens")
        return ids + [self.said["padding"]] * free, [1] * len(ids) + [0] * free

    def states(self, texts: Sequence[str]) -> np.ndarray:
        """(P, L, D); each text is encoded once."""
        once = list(dict.fromkeys(texts))
        ids, masks = (np.array(rows, dtype=np.int64) for rows in zip(*map(self.tokens, once), strict=True))
        given = {"input_ids": ids, **({"attention_mask": masks} if self.said["masked"] else {})}
        states = np.asarray(self.engine(given)[0], dtype=np.float32)
        return states[[once.index(text) for text in texts]]


class LightPipeline:
    """What a `TextToImagePipeline` with this runtime draws, and as much of it as the commands ask for.

    Args:
        folder: of the graphs.
        usual: loads the pipeline in torch, which draws again, and says, what went wrong here.
    """

    hold: Any = None
    device = SimpleNamespace(type="cpu")

    def __init__(
        self, folder: Path, runtime: Runtime, index: dict[str, Any], scheduler: Path, usual: Callable[[], Any]
    ) -> None:
        self.runtime, self.usual = runtime, usual
        self.registered = index.get(DEFAULTS_KEY) or {}
        self.defaults = {**DEFAULTS, **self.registered}
        self.unet = SimpleNamespace(runtime=runtime, config=read_json(folder / "unet" / "config.json"))
        self.autoencoder = read_json(folder / "vae_decoder" / "config.json")
        self.channels = int(self.autoencoder["latent_channels"])
        self.factor = 2 ** (len(self.autoencoder["block_out_channels"]) - 1)
        self.scheduler_class = index["scheduler"][1]
        self.scheduler_config = read_json(scheduler)
        self.scheduler = self.scheduler_of(self.defaults["num_inference_steps"])
        self.threads = usable_threads()
        self.check()
        names = {"text_encoder": "float32"} | {one: runtime.precision_of(one) for one in ("unet", "vae_decoder")}
        with ThreadPoolExecutor(len(names)) as pool:
            opened = {
                name: pool.submit(runtime.kind.open, folder / name / runtime.kind.file, precision, self.threads)
                for name, precision in names.items()
            }
        engines = {name: one.result() for name, one in opened.items()}
        self.denoise, self.decode = engines["unet"], engines["vae_decoder"]
        self.words = Words(read_json(folder / "text_encoder" / TOKENS_SAY), engines["text_encoder"])
        if set(self.denoise.inputs) != {"sample", "timestep", "encoder_hidden_states"}:
            raise TorchNeededError("a UNet with further conditions")

    def check(self) -> None:
        """Raises TorchNeededError for networks whose calls have more to them."""
        unet = self.unet.config
        if not unet["in_channels"] == unet["out_channels"] == self.channels or unet.get("sample_size") is None:
            raise TorchNeededError("a UNet of another kind")
        height, width = self.picture_size(None, None)
        if self.channels * (height // self.factor) * (width // self.factor) < BLOCK:
            raise TorchNeededError("pictures of a few pixels")

    @property
    def machine(self) -> Machine:
        """Where it draws, for a record."""
        processor = platform.machine() or "unknown"
        return Machine(device="cpu", processor=processor, threads=self.threads, torch=torch_version())

    def scheduler_of(self, steps: int) -> Scheduler:
        """Raises TorchNeededError if it has options that are not known here."""
        try:
            return KNOWN[self.scheduler_class](self.scheduler_config, steps)
        except (KeyError, NotImplementedError) as error:
            raise TorchNeededError(f"the scheduler: {error}") from error

    def picture_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Height and width to draw: those of training.

        Raises:
            TorchNeededError: others are asked for.
        """
        size = self.unet.config["sample_size"]
        own = [side * self.factor for side in ([size, size] if isinstance(size, int) else size)]
        if height not in (None, own[0]) or width not in (None, own[1]):
            raise TorchNeededError("another size")
        return own[0], own[1]

    def check_request(
        self,
        prompts: Iterable[str],
        height: int | None,
        width: int | None,
        steps: int | None,
        negative: str | None,
        guidance: float | None = None,
    ) -> None:
        """Raises TorchNeededError for what is not drawn here, or warned of."""
        self.picture_size(height, width)
        for text in {*prompts, negative or ""}:
            self.words.tokens(text)
        if guidance is not None and guidance > 1 >= self.defaults["guidance_scale"]:
            raise TorchNeededError("guidance of a distilled model that was made for none")
        if steps is not None and steps != self.defaults["num_inference_steps"]:
            if self.defaults["guidance_scale"] <= 1:
                raise TorchNeededError("other steps than a distilled model was made for")
            self.scheduler_of(steps)

    def __call__(
        self,
        prompt: Sequence[str],
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | None = None,
        *,
        seed: Sequence[int],
    ) -> Any:
        """Pictures of prompts, each with its seed: ``images`` and so on, as a `TextToImagePipeline` gives them."""
        defaults = self.defaults
        steps = defaults["num_inference_steps"] if num_inference_steps is None else num_inference_steps
        scale = defaults["guidance_scale"] if guidance_scale is None else guidance_scale
        height, width = self.picture_size(height, width)
        scheduler, sources = self.scheduler_of(steps), [NoiseSource(one) for one in seed]
        shape = (1, self.channels, height // self.factor, width // self.factor)

        def noise() -> np.ndarray:
            return np.concatenate([source.draw(shape) for source in sources])

        latents = noise() * scheduler.scale
        negatives = [negative_prompt or ""] * len(prompt) if scale > 1 else []
        states = self.words.states([*negatives, *prompt])
        for i in progress(steps):
            seen = scheduler.scaled(latents, i)
            prediction = self.predict(seen, scheduler.timesteps[i], states)
            if negatives:  # Ho & Salimans 2022, Eq. 6, as in diffusion.guidance
                without, with_prompt = np.split(prediction, 2)
                prediction = without + np.float32(scale) * (with_prompt - without)
            latents = scheduler.step(prediction, i, latents, noise)
        pixels = np.asarray(self.decode({"latent_sample": latents / LATENTS_SCALE})[0], dtype=np.float32)
        if not np.isfinite(pixels).all():
            named = {"height": height, "width": width, "num_inference_steps": steps, "guidance_scale": scale}
            return self.usual()(list(prompt), negative_prompt=negative_prompt, seed=list(seed), **named)
        levels = ((pixels / 2 + np.float32(0.5)).clip(0, 1) * 255).round().astype(np.uint8)
        images = [Image.fromarray(one) for one in levels.transpose(0, 2, 3, 1)]
        return SimpleNamespace(images=images, nsfw_content_detected=None, nan_detected=None)

    def predict(self, latents: np.ndarray, timestep: Any, states: np.ndarray) -> np.ndarray:
        """(B, C, h, w) -> (B, C, h, w); with twice as many states (2B, C, h, w)."""
        sample = np.concatenate([latents] * (len(states) // len(latents)))
        given = {"sample": sample, "timestep": np.array([timestep], dtype=np.float32), "encoder_hidden_states": states}
        return np.asarray(self.denoise(given)[0], dtype=np.float32)


def open_light(place: Path, runtime: Runtime, usual: Callable[[], Any]) -> LightPipeline | None:
    """What draws from a folder without torch; None if its graphs are not there yet, or it is of another kind.

    Raises:
        FileNotFoundError, ValueError: the folder is damaged.
    """
    index = check_pipeline_folder(place)
    parts = {name for name, value in index.items() if isinstance(value, list) and value[1] is not None}
    variants = [match["variant"] for file in place.glob("*/*") if (match := WEIGHTS.fullmatch(file.name))]
    if index.get("_class_name") != "StableDiffusionPipeline" or parts != COMPONENTS or any(variants):
        return None
    folder = folder_of(place, runtime)
    hold = None if place in folder.parents else held(folder)
    if not ready(folder) or not (folder / "text_encoder").is_dir() or not (folder / "vae_decoder").is_dir():
        return None
    try:
        pipeline = LightPipeline(folder, runtime, index, place / "scheduler" / "scheduler_config.json", usual)
    except TorchNeededError:
        return None
    pipeline.hold = hold  # as long as it draws
    return pipeline


def torch_version() -> str:
    """``torch.__version__``, which says more than the package's version, without importing torch."""
    spec = find_spec("torch")
    file = Path(spec.origin).with_name("version.py") if spec and spec.origin else None
    said = file and file.is_file() and re.search(r"^__version__ = '([^']+)'", file.read_text(), re.MULTILINE)
    return said[1] if said else version("torch")


def usable_threads() -> int:
    """As many as the user says, or the processor has for this process."""
    said = os.environ.get("OMP_NUM_THREADS", "")
    if said.isdecimal() and int(said) > 0:
        return int(said)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def progress(steps: int) -> Iterable[int]:
    """The steps, with a bar where somebody watches."""
    if not sys.stderr.isatty():
        return range(steps)
    from tqdm import tqdm

    return tqdm(range(steps), leave=False)
