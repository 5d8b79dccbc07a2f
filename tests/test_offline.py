"""Everything that needs no network must work where there is none."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tiny import tiny_pipeline

SCRIPT = """
import socket, sys

def blocked(*_, **__):
    raise SystemError("the network was asked")

socket.socket.connect = socket.socket.connect_ex = blocked
socket.create_connection = socket.getaddrinfo = blocked

import torch
from PIL import Image
from latentdiff import TextToImagePipeline, ImageToImagePipeline
from latentdiff.training.cli import launched

folder, pictures, output = sys.argv[1:]
pipeline = TextToImagePipeline.from_pretrained(folder)
image = pipeline("a red thing", seed=0).images[0]
ImageToImagePipeline.from_pipe(pipeline)("a cup", image=image, seed=0)
launched(["finetune", "--model", folder, "--data", pictures, "--output", output, "max_steps=1", "batch_size=2",
          "sample_every=1", "method=full", "mixed_precision=no"], standalone_mode=False)
again = TextToImagePipeline.from_pretrained(output)
again("a red thing", seed=0).images[0].save(output + "/drawn.png")
again.save_pretrained(output + "/copy")
"""


def test_loads_draws_finetunes_and_saves_with_the_network_blocked(tmp_path: Path) -> None:
    from PIL import Image

    tiny_pipeline().save_pretrained(tmp_path / "model")
    (tmp_path / "pictures").mkdir()
    for i, colour in enumerate(("red", "blue", "green", "yellow")):
        Image.new("RGB", (16, 16), colour).save(tmp_path / f"pictures/{i}.png")
        (tmp_path / f"pictures/{i}.txt").write_text(f"a {colour} thing")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *(str(tmp_path / part) for part in ("model", "pictures", "tuned"))],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "the network was asked" not in done.stderr
    assert (tmp_path / "tuned/copy/model_index.json").is_file()
    assert (tmp_path / "tuned/drawn.png").is_file()


CACHED = """
import sys
from latentdiff import TextToImagePipeline

pipeline = TextToImagePipeline.from_pretrained("someone/model")
pipeline("a red thing", seed=0).images[0].save(sys.argv[1])
TextToImagePipeline.from_pretrained("someone/model", revision="main")
single = TextToImagePipeline.from_single_file("someone/single/model.safetensors", tokenizer=pipeline.tokenizer)
assert (single.unet.conv_in.weight == pipeline.unet.conv_in.weight).all()
try:
    TextToImagePipeline.from_pretrained("someone/else")
except OSError as error:
    assert "someone/else" in str(error), error
else:
    raise SystemExit("a model that is not there was loaded")
"""


def in_cache(cache: Path, repository: str, folder: Path) -> None:
    """Lay a folder into the hub's local cache, as a download would."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    place = cache / f"models--{repository.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs/main").write_text(commit)
    shutil.copytree(folder, place / "snapshots" / commit)


def test_models_in_the_hubs_local_cache_are_found_offline(tmp_path: Path) -> None:
    pipeline = tiny_pipeline("clip")
    pipeline.save_pretrained(tmp_path / "model")
    (tmp_path / "single").mkdir()
    pipeline.save_single_file(tmp_path / "single/model.safetensors")
    in_cache(tmp_path / "cache", "someone/model", tmp_path / "model")
    in_cache(tmp_path / "cache", "someone/single", tmp_path / "single")
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CACHED, str(tmp_path / "drawn.png")],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "drawn.png").is_file()
