"""Damaged and hostile files for everything that reads a user's file, made by hypothesis from good ones.

    python tests/support/fuzz.py --seconds 300 --keep /tmp/found
    python tests/support/fuzz.py --only tables prompts --seed 7

Each reader may succeed, or raise ValueError, OSError or TypeError with a message that names the file. Anything else,
more than 2 GB of memory or more than 30 seconds is a fault: it is printed, and the exit status is 1.
"""

import argparse
import contextlib
import csv
import faulthandler
import io
import json
import logging
import os
import resource
import shutil
import stat
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import diffusers
import torch
import transformers
from fuzz_changes import change, changed_json, changed_text
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from kinds import make_model
from loras import diffusers_lora, sd_scripts_lora
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import clip_parts, tiny_pipeline
from tiny_codes import save_codes

from latentdiff import AutoencoderKL, TextToImagePipeline, TokenPipeline, UNet2DConditionModel, UNet2DModel
from latentdiff.cli import application
from latentdiff.interchange.embeddings import convert_embedding
from latentdiff.interchange.lora.formats import convert_lora
from latentdiff.interchange.packed import KEY as KEY_OF_PACKED
from latentdiff.interchange.png import KEY, read_settings
from latentdiff.interchange.single_file import OriginalSettings
from latentdiff.models import DalleAutoencoder
from latentdiff.pipelines.batch.prompt_files import read_prompts
from latentdiff.pipelines.batch.record import read_record
from latentdiff.pipelines.storage.converting import kind_of_source
from latentdiff.text.load import load_text_encoder
from latentdiff.training.data.load import load_pictures
from latentdiff.training.settings import AutoencoderSettings, DenoiserSettings

SECONDS, MEMORY = 30, 2 * 10**9
ALLOWED = (ValueError, OSError, TypeError)
Read = Callable[[], Any]


class Seeds:
    """Good files of every kind, and readers of changed ones."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.place = folder, folder / "changed"
        torch.manual_seed(0)
        self.pipeline = tiny_pipeline("clip")
        self.pipeline.save_pretrained(folder / "model")
        self.clip = clip_parts()
        make_model("sd1", self.clip).save_single_file(folder / "model.safetensors")
        weights = load_file(folder / "model.safetensors")
        vae = {name: tensor for name, tensor in weights.items() if name.startswith("first_stage_model.")}
        save_file(vae, folder / "vae.safetensors", {"format": "pt"})
        torch.save({"state_dict": vae, "global_step": 3}, folder / "vae.ckpt")
        save_file(weights, folder / "bare.safetensors", {"modelspec.prediction_type": "v"})
        diffusers_lora(self.pipeline, folder / "lora", use_dora=True)
        sd_scripts_lora(self.pipeline, folder / "kohya.safetensors")
        convert_lora(folder / "lora", folder / "peft", "peft")
        tiny_pipeline().save_single_file(folder / "packed.safetensors")
        with safe_open(folder / "packed.safetensors", "np") as stream:
            self.packed = stream.metadata()[KEY_OF_PACKED]
        save_file({"<new>": torch.ones(2, 16)}, folder / "word.safetensors")
        torch.save({"string_to_param": {"*": torch.ones(2, 16)}, "name": "word"}, folder / "word.pt")
        save_codes(folder)
        self.make_tables()
        self.make_texts()
        arguments = ["generate", "a red thing", "--model", str(folder / "model"), "-o", str(folder / "a.png")]
        application()([*arguments, "--steps", "1"], standalone_mode=False)
        self.record = read_settings(folder / "a.png") or {}

    def make_tables(self) -> None:
        data = self.folder / "data"
        data.mkdir()
        rows = [{"file_name": f"{i}.png", "text": f"number {i}", "weight": 1.5, "split": "train"} for i in range(3)]
        for i in range(3):
            Image.effect_noise((16, 16), 50).save(data / f"{i}.png")
        (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        with (data / "metadata.csv").open("w") as stream:
            table = csv.DictWriter(stream, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), data / "metadata.parquet")
        pictures = [{"image": {"bytes": (data / f"{i}.png").read_bytes(), "path": None}, "text": "a"} for i in range(3)]
        datasets.Dataset.from_list(pictures).save_to_disk(self.folder / "saved")
        import tarfile

        with tarfile.open(data / "a.tar", "w") as archive:
            for i in range(3):
                archive.add(data / f"{i}.png", f"{i}.png")
                archive.add(data / "metadata.csv", f"{i}.txt")

    def make_texts(self) -> None:
        rows = [{"prompt": "a red thing", "seed": 3, "steps": 2, "guidance": 2.5, "file_name": "a/b.png"}]
        (self.folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (self.folder / "prompts.csv").write_text("prompt,seed,file_name\na red thing,3,a.png\n")
        (self.folder / "prompts.txt").write_text("a red thing\n# no\nanother\n")
        (self.folder / "settings.yaml").write_text("data: x\noutput: y\nresolution: 64\nblock_out_channels: [32, 64]\n")
        (self.folder / "original.yaml").write_text(
            "model: {params: {parameterization: v, timesteps: 1000, linear_start: 1e-4, image_size: 64, "
            "unet_config: {params: {num_heads: 8}}, first_stage_config: {params: {ddconfig: {resolution: 256}}}}}"
        )

    # Each method below changes files and returns the reader.

    def folders(self, draw: Any) -> Read:
        folder = self.changed_folder(draw, "model")
        return lambda: TextToImagePipeline.from_pretrained(folder)

    def codes(self, draw: Any) -> Read:
        if draw(st.booleans()):
            file = change(draw, self.folder / "dalle.pkl", self.place / "dalle.pkl")
            return lambda: DalleAutoencoder.from_single_file(file, allow_pickle=True)
        folder = self.changed_folder(draw, "words")
        return lambda: TokenPipeline.from_pretrained(folder)

    def networks(self, draw: Any) -> Read:
        """One network or tokenizer, without the checks of a pipeline's folder."""
        name, read = draw(st.sampled_from([("unet", UNet2DConditionModel.from_pretrained), ("text_encoder", None)]))
        name = draw(st.sampled_from(["text_encoder", "tokenizer"])) if read is None else name
        model = self.place / "model"
        shutil.copytree(self.folder / "model", model, copy_function=os.link)
        file = draw(st.sampled_from(sorted(path for path in (model / name).iterdir() if path.is_file())))
        change(draw, self.folder / "model" / name / file.name, file)
        return lambda: load_text_encoder(model) if read is None else read(model / name)

    def single_files(self, draw: Any) -> Read:
        name = draw(st.sampled_from(["model.safetensors", "bare.safetensors"]))
        file = change(draw, self.folder / name, self.place / name)
        return lambda: TextToImagePipeline.from_single_file(file, tokenizer=self.clip["tokenizer"])

    def packed_files(self, draw: Any) -> Read:
        """Of our own layout, with other bytes, tensors or metadata, or with a changed file inside."""
        file = self.place / "packed.safetensors"
        if draw(st.booleans()):
            change(draw, self.folder / "packed.safetensors", file)
        else:
            tensors = load_file(self.folder / "packed.safetensors")
            content = json.loads(self.packed)
            name = draw(st.sampled_from(sorted(content["texts"])))
            text = changed_text(draw, content["texts"][name].encode()).decode(errors="replace")
            content["texts"][name] = text
            content = content if draw(st.booleans()) else changed_json(draw, content)
            save_file(tensors, file, {KEY_OF_PACKED: json.dumps(content)})
        kind: Any = draw(st.sampled_from([TextToImagePipeline, AutoencoderKL]))
        return lambda: kind.from_single_file(file)

    def network_files(self, draw: Any) -> Read:
        name = draw(st.sampled_from(["vae.safetensors", "vae.ckpt", "model.safetensors"]))
        file = change(draw, self.folder / name, self.place / name)
        kind: Any = draw(st.sampled_from([AutoencoderKL, UNet2DModel]))
        return lambda: kind.from_single_file(file, allow_pickle=True)

    def changed_folder(self, draw: Any, name: str) -> Path:
        """A copy of a folder with one changed file."""
        copy = self.place / name
        shutil.copytree(self.folder / name, copy, copy_function=os.link)
        file = draw(st.sampled_from(sorted(path for path in copy.rglob("*") if path.is_file())))
        change(draw, self.folder / name / file.relative_to(copy), file)
        return copy

    def loras(self, draw: Any) -> Read:
        name = draw(st.sampled_from(["lora", "peft", "kohya.safetensors"]))
        file = self.place / name
        if name in ("lora", "peft"):
            self.changed_folder(draw, name)
        else:
            change(draw, self.folder / name, file)

        def read() -> None:
            convert_lora(file, self.place / "out.safetensors", "kohya", overwrite=True)

        def use() -> None:
            try:
                self.pipeline.load_lora_weights(file)
            finally:
                self.pipeline.unload_lora_weights()

        return draw(st.sampled_from([read, use]))

    def embeddings(self, draw: Any) -> Read:
        name = draw(st.sampled_from(["word.safetensors", "word.pt"]))
        file = change(draw, self.folder / name, self.place / name)

        def read() -> None:
            convert_embedding(file, self.place / "out.safetensors", allow_pickle=True, overwrite=True)

        def use() -> None:
            self.pipeline.load_textual_inversion(file, allow_pickle=True)
            self.pipeline.unload_textual_inversion()

        return draw(st.sampled_from([read, use]))

    def records(self, draw: Any) -> Read:
        file = self.place / "a.png"
        if draw(st.booleans()):
            change(draw, self.folder / "a.png", file)
        else:
            with Image.open(self.folder / "a.png") as image:
                from PIL.PngImagePlugin import PngInfo

                info = PngInfo()
                info.add_text(KEY, json.dumps(changed_json(draw, self.record)))
                image.save(file, pnginfo=info)
        return lambda: read_record(file)

    def tables(self, draw: Any) -> Read:
        shutil.copytree(self.folder / "data", self.place / "data", copy_function=os.link)
        names = ["metadata.jsonl", "metadata.csv", "metadata.parquet", "a.tar", "0.txt"]
        name = draw(st.sampled_from(names))
        for other in names:
            if other != name:
                (self.place / "data" / other).unlink(missing_ok=True)
        source = self.folder / "data" / ("metadata.csv" if name == "0.txt" else name)
        file = change(draw, source, self.place / "data" / name)
        return lambda: load_pictures(str(file if name == "a.tar" else file.parent))

    def saved_datasets(self, draw: Any) -> Read:
        folder = self.changed_folder(draw, "saved")
        return lambda: load_pictures(str(folder))

    def sources(self, draw: Any) -> Read:
        """What `latentdiff convert` takes a file or folder for."""
        name = draw(st.sampled_from(["model", "lora", "peft", "vae.safetensors", "vae.ckpt", "word.pt", "a.png"]))
        if (self.folder / name).is_dir():
            self.changed_folder(draw, name)
        else:
            change(draw, self.folder / name, self.place / name)
        return lambda: kind_of_source(str(self.place / name), allow_pickle=True)

    def prompts(self, draw: Any) -> Read:
        name = draw(st.sampled_from(["prompts.jsonl", "prompts.csv", "prompts.txt"]))
        file = change(draw, self.folder / name, self.place / name)
        return lambda: read_prompts(file)

    def yaml_files(self, draw: Any) -> Read:
        name = draw(st.sampled_from(["settings.yaml", "original.yaml"]))
        file = change(draw, self.folder / name, self.place / name)
        if name == "original.yaml":
            return lambda: OriginalSettings.read(file)
        kind: Any = draw(st.sampled_from([AutoencoderSettings, DenoiserSettings]))
        return lambda: kind.load(file)


READERS = [name for name in vars(Seeds) if not name.startswith(("_", "make", "changed"))]


@dataclass
class Run:
    """Examples of each reader, and the faults that they showed."""

    seeds: Seeds
    keep: Path | None
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(READERS, 0))
    refused: dict[str, int] = field(default_factory=lambda: dict.fromkeys(READERS, 0))
    faults: dict[str, str] = field(default_factory=dict)

    def some(self, reader: str, number: int, count: int) -> None:
        """Some examples of a reader."""

        @seed(number)
        @settings(
            max_examples=count,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(st.data())
        def examples(data: Any) -> None:
            self.one(reader, data.draw)

        examples()

    def one(self, reader: str, draw: Any) -> None:
        shutil.rmtree(self.seeds.place, ignore_errors=True)
        self.seeds.place.mkdir()
        read = getattr(self.seeds, reader)(draw)
        self.counts[reader] += 1
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                read()
        except ALLOWED as error:
            self.refused[reader] += 1
            named = str(self.seeds.place) in str(error) or "setting '" in str(error)
            if not named:
                self.fault(reader, f"{type(error).__name__} without the file's name", error)
        except Exception as error:
            self.fault(reader, type(error).__name__, error)
        finally:
            faulthandler.cancel_dump_traceback_later()

    def fault(self, reader: str, what: str, error: Exception) -> None:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if "latentdiff" in frame.filename or "/pipelines/" in frame.filename]
        last = own[-1] if own else frames[-1]
        key = f"{reader}: {what} at {Path(last.filename).name}:{last.lineno}"
        if key in self.faults:
            return
        self.faults[key] = f"{error!s}"[:600]
        print(f"FAULT {key}\n    {self.faults[key]}", flush=True)
        if self.keep is not None:
            self.keep.mkdir(parents=True, exist_ok=True)
            kept = Path(tempfile.mkdtemp(prefix=f"{reader}-", dir=self.keep))
            shutil.copytree(self.seeds.place, kept, symlinks=True, ignore=odd_files, dirs_exist_ok=True)
            (kept / "traceback.txt").write_text("".join(traceback.format_exception(error)))


def odd_files(folder: str, names: list[str]) -> list[str]:
    """What cannot be kept: pipes, and files of holes."""
    found = {name: os.lstat(os.path.join(folder, name)) for name in names}
    return [name for name, info in found.items() if stat.S_ISFIFO(info.st_mode) or info.st_size > 2**30]


def limit_memory() -> None:
    """Let allocations fail that take this process more than `MEMORY` above what it has."""
    status = Path("/proc/self/status")
    if status.exists():
        size = next(line for line in status.read_text().splitlines() if line.startswith("VmSize"))
        resource.setrlimit(resource.RLIMIT_AS, (int(size.split()[1]) * 1024 + MEMORY,) * 2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=READERS, default=READERS)
    parser.add_argument("--keep", type=Path, help="a folder for the files that showed a fault")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    datasets.disable_progress_bars()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as temporary:
        run = Run(Seeds(Path(temporary)), arguments.keep)
        limit_memory()
        until, number = time.monotonic() + arguments.seconds, arguments.seed
        while time.monotonic() < until:
            for reader in arguments.only:
                run.some(reader, number, 10)
            number += 1
    for reader in arguments.only:
        print(f"{reader}: {run.counts[reader]} examples, {run.refused[reader]} refused")
    print(
        f"{len(run.faults)} faults, seeds {arguments.seed} to {number - 1}, {resource.getrusage(0).ru_maxrss >> 10} MiB"
    )
    return 1 if run.faults else 0


if __name__ == "__main__":
    sys.exit(main())
