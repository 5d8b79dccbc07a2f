"""How long a training on very many pictures takes to start, and how much memory each process then has.

    python benchmarks/many_pictures.py --rows 20000000

Simulated: shards with one real picture each and a table that says that they have very many, as a survey would have left
it. The start is that of a training: the table is opened, a part held out, views and order made; then samples are read.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

SHARDS = 2000
DEALT = 2000  # samples that are read


def make(folder: Path, rows: int) -> None:
    """Shards below ``folder/shards``, and the table of their pictures."""
    import io
    import tarfile

    import pyarrow as pa
    import pyarrow.compute as pc
    from PIL import Image

    from latentdiff.training.data import source
    from latentdiff.training.data.large import LargeSurvey
    from latentdiff.training.data.load import table_key
    from latentdiff.training.data.picture_table import ROWS, schema
    from latentdiff.training.data.source import Wanted

    shards = folder / "shards"
    shards.mkdir(parents=True)
    encoded = io.BytesIO()
    Image.effect_noise((64, 64), 60).convert("RGB").save(encoded, "jpeg")
    info = tarfile.TarInfo("0.jpg")
    info.size = encoded.tell()
    for number in range(SHARDS):
        with tarfile.open(shards / f"{number:05}.tar", "w") as archive:
            archive.addfile(info, io.BytesIO(encoded.getvalue()))
    survey = LargeSurvey(folder / "manifest.jsonl", {"data": str(shards), "split": "train"}, tables(folder), set())
    survey.take(source.Source(f"{shards}/"))
    writer: Any = survey._writer
    random = np.random.default_rng(0)
    from latentdiff.training.data.captioned_picture import PartReader

    writer.readers = [PartReader(str(shards / f"{number:05}.tar"), 0, 0) for number in range(SHARDS)]
    shapes = np.array([(1024, 768), (768, 1024), (512, 512), (1920, 1080)], dtype=np.int32)
    for start in range(0, rows, ROWS):
        count = min(ROWS, rows - start)
        numbers = np.arange(start, start + count)
        text = pc.cast(pa.array(numbers), pa.string())
        captions = pc.binary_join_element_wise("a photograph of the thing with the number", text, "in a wide room", " ")
        sizes = shapes[random.integers(0, 4, count)]
        columns = {
            "name": pc.binary_join_element_wise(str(shards / "00000.tar"), text, "/"),
            "captions": pa.ListArray.from_arrays(pa.array(np.arange(count + 1, dtype=np.int32)), captions),
            "digest": pa.FixedSizeBinaryArray.from_buffers(
                pa.binary(32), count, [None, pa.py_buffer(random.bytes(32 * count))]
            ),
            "weight": pa.array(np.ones(count)),
            "loss_weight": pa.array(np.ones(count)),
            "width": pa.array(sizes[:, 0]),
            "height": pa.array(sizes[:, 1]),
            "reader": pa.array((numbers * SHARDS // rows).astype(np.int32)),
            "start": pa.array(np.full(count, 512)),
            "length": pa.array(np.full(count, info.size)),
            "has_sides": pa.array(random.random(count) < 0.1),
        }
        writer._writer.write_batch(pa.RecordBatch.from_pydict(columns, schema()))
    writer.count = rows
    settings = settings_of(folder)
    key = table_key(settings.data, Wanted.of(settings), None)
    assert key is not None
    survey.finish(source.Source(f"{shards}/"), key, 0.1)
    empty = table_key(settings.data, Wanted.of(settings, "validation"), None)
    assert empty is not None


def tables(folder: Path) -> Path:
    return folder / "run" / "training" / "pictures"


def settings_of(folder: Path) -> Any:
    from latentdiff.training.settings import DenoiserSettings

    return DenoiserSettings(
        data=str(folder / "shards"), output=str(folder / "run"), autoencoder="x", resolution=64, buckets=True
    )


def make_caches(folder: Path, rows: int) -> None:
    """The latents of two views of each picture, as shards without content and the index that a filling leaves."""
    from latentdiff.interchange.shared_cache import INDEX
    from latentdiff.training.batch.key_index import KEY, KeyIndex, write_index

    store, each, nbytes, start = folder / "latents", 2000, 2 * 4 * 32 * 32 * 2, 200_000
    store.mkdir()
    sizes = {f"{number:032x}.safetensors": start + each * nbytes for number in range(-(-2 * rows // each))}
    for name, size in sizes.items():
        with (store / name).open("wb") as file:
            file.truncate(size)
    kinds = [[name, "float16", [2, 4, 32, 32]] for name in sizes]
    random, old = np.random.default_rng(1), None
    for first in range(0, 2 * rows, 1 << 22):
        numbers = range(first, min(first + (1 << 22), 2 * rows))
        keys = random.bytes(KEY * len(numbers)).hex()
        places = (number // each << 48 | start + number % each * nbytes for number in numbers)
        more = {keys[2 * KEY * i : 2 * KEY * (i + 1)]: place for i, place in enumerate(places)}
        write_index(store / INDEX, sizes, kinds, old, more)
        old = KeyIndex.read(store / INDEX)
    (folder / "keys").write_text("\n".join(list(more)[:DEALT]))


def open_caches(folder: Path, say: Callable[[str], None]) -> None:
    from latentdiff.training.batch.cache import TensorStore
    from latentdiff.training.batch.random_choices import views_digest
    from latentdiff.training.data import prepare_splits
    from latentdiff.training.data.picture_table import Joined

    store = TensorStore(folder / "latents")
    what = views_digest(settings_of(folder), Joined(*prepare_splits(settings_of(folder))), 8)
    assert what is not None
    if not store.holds(what):
        store.note(what)
    say(f"a cache of {len(store):,} latents is opened, and known to hold all")
    began = time.perf_counter()
    for key in (folder / "keys").read_text().split():
        store[key]
    say(f"{DEALT} of them were read, {1e3 * (time.perf_counter() - began) / DEALT:.2f} ms each")


def memory() -> dict[str, float]:
    """Gigabytes of this process: its own, with what it maps of files, and the most so far."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    names = {"own": "RssAnon", "with files": "VmRSS", "most": "VmHWM"}
    return {name: int(lines[line].split()[0]) / 1e6 for name, line in names.items()}


def start(folder: Path) -> None:
    """A training's start, measured."""
    began = time.perf_counter()
    import torch

    from latentdiff.training.batch.random_choices import PictureOrder, ViewChoice
    from latentdiff.training.data import prepare_splits, read_pixels
    from latentdiff.training.data.picture_table import PictureTable, of_sides, weights

    def say(what: str) -> None:
        figures = ", ".join(f"{name} {value:.2f}" for name, value in memory().items())
        print(
            f"{time.perf_counter() - began:7.2f} s, {time.process_time():.2f} of the processor: {what}; GB: {figures}",
            flush=True,
        )

    say("torch and the package are imported")
    settings = settings_of(folder)
    pictures, held_out = prepare_splits(settings)
    assert isinstance(pictures, PictureTable)
    say(f"{len(pictures):,} pictures, {len(held_out)} held out")
    of_sides(pictures)
    open_caches(folder, say)
    views = ViewChoice(settings, pictures, 8)
    order = PictureOrder(weights(pictures), 64, 0, views.buckets)
    say("views and order")
    order.update(0)
    say("the first update's pictures")
    order.update(100_000)
    say("those of update 100,000")
    then = time.perf_counter()
    for step in range(0, 100_000, 100_000 // DEALT * 64):
        for index in order.update(step):
            picture, view = replace(pictures[index], digest=""), views.pick(index, torch.rand(3))  # it is made up
            read_pixels(picture, view.width, view.height, view.crop, view.flip)
    say(f"{DEALT} samples were read, {1e3 * (time.perf_counter() - then) / DEALT:.2f} ms each")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000_000)
    parser.add_argument("--folder", help="for 4 GB that pass")
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.start:
        return start(options.start)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        began = time.perf_counter()
        make(Path(folder), options.rows)
        size = sum(file.stat().st_size for file in tables(Path(folder)).iterdir())
        make_caches(Path(folder), options.rows)
        print(f"made in {time.perf_counter() - began:.0f} s; the table has {size / 1e9:.2f} GB", flush=True)
        for _ in range(2):
            subprocess.run([sys.executable, __file__, "--start", folder], check=True)
    return None


if __name__ == "__main__":
    main()
