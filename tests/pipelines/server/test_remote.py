"""``latentdiff generate --server``, and what ``latentdiff serve`` and ``latentdiff app`` refuse."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from served import made, serving

from latentdiff import ImageToImagePipeline
from latentdiff.interchange.png import read_settings
from latentdiff.pipelines.commands.serve import listen

Run = Callable[..., int]
OPTIONS = ["--steps", "3", "--guidance", "2", "--seed", "5"]
CALL = {"num_inference_steps": 3, "guidance_scale": 2.0}


def same(file: str, image: Image.Image) -> bool:
    return bool((np.asarray(Image.open(file)) == np.asarray(image)).all())


def test_a_picture(served: Any, drawer: Any, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    server = ["--server", f"{served.url}/v1/"]
    assert run("generate", "a red cup", *server, *OPTIONS, "--width", "24", "--height", "16", "-o", "cup.png") == 0
    assert same("cup.png", drawer("a red cup", seed=5, height=16, width=24, **CALL).images[0])
    assert (read_settings(Path("cup.png")) or {})["seed"] == 5
    assert "cup.png: seed 5" in capsys.readouterr().out


def test_a_grid_and_files(served: Any, drawer: Any, run: Run) -> None:
    server = ["--server", served.url.removeprefix("http://")]
    assert run("generate", "a cup", "red", "a b", "-n", "2", *server, *OPTIONS, "-o", "cups.png") == 0
    drawn = [drawer(prompt, seed=5 + i, **CALL).images[0] for i, prompt in enumerate(["a cup"] * 2 + ["red"] * 2)]
    grid = Image.open("cups.png")
    assert grid.size == (16 * 2 + 2, 16 * 3 + 4)
    for i, image in enumerate(drawn):
        corner = (i % 2 * 18, i // 2 * 18)
        part = np.asarray(grid.crop((*corner, corner[0] + 16, corner[1] + 16))).astype(int)
        assert np.abs(part - np.asarray(image)).max() <= 1
    said = read_settings(Path("cups.png")) or {}
    assert (said["prompts"], said["count"], said["columns"], said["seed"]) == (["a cup", "red", "a b"], 2, 2, 5)
    assert run("generate", "a cup", "-n", "10", "--separate", *server, *OPTIONS, "-o", "one.png") == 0
    assert [(read_settings(Path(f"one-{i:02}.png")) or {})["seed"] for i in (1, 10)] == [5, 14]


def test_what_a_server_says_of_a_drawing(served: Any, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """Once, though it is drawn by two requests."""
    size = ["--width", "32", "--height", "16"]
    assert run("generate", "a cup", "-n", "10", "--server", served.url, *size, "--steps", "1", "-o", "cups.png") == 0
    assert capsys.readouterr().err.count("Drawing 32 x 16 pixels") == 1


def test_from_a_picture(served: Any, drawer: Any, run: Run) -> None:
    Image.effect_noise((16, 16), 90).convert("RGB").save("photo.png")
    options = ["--image", "photo.png", "--strength", "0.7", "--server", served.url, *OPTIONS, "-o", "new.png"]
    assert run("generate", "a cup", *options) == 0
    redraw = ImageToImagePipeline.from_pipe(drawer)
    assert same("new.png", redraw("a cup", image=Image.open("photo.png"), strength=0.7, seed=5, **CALL).images[0])


def test_what_is_refused(service: Any, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def refused(words: str, *options: str) -> None:
        assert run("generate", "a cup", *options, "-o", "no.png") == 2
        assert words in capsys.readouterr().err
        assert not Path("no.png").exists()

    with serving(service, key="secret") as served:
        server = ["--server", served.url]
        refused("the key is missing or wrong", *server)
        monkeypatch.setenv("LATENTDIFF_API_KEY", "secret")
        refused("--lora: a server draws as it was started", *server, "--lora", "x.safetensors")
        refused("--filmstrip: a server draws", *server, "--filmstrip", "strip.png")
        refused("--width and --height go together", *server, "--width", "16")
        refused("17x16 cannot be drawn: both sides must be multiples of 2", *server, "--width", "17", "--height", "16")
        refused("there is no model 'other' here", *server, "--model", "other")
        refused("there is no model 'emoji' here", *server, "--model", "emoji")  # though it is the default elsewhere
    refused("no server answers at", *server)
    refused("is no address such as", "--server", "file:///etc/passwd")


def test_a_busy_server_is_asked_again(drawer: Any, run: Run) -> None:
    with serving(made(drawer, places=1)) as served:
        prompts = [letter * 2 for letter in "abcde"]
        assert run("generate", *prompts, "--server", served.url, *OPTIONS, "-o", "all.png") == 0
        assert (read_settings(Path("all.png")) or {})["prompts"] == prompts


def test_what_servers_refuse(run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LATENTDIFF_API_KEY", raising=False)

    def refused(words: str, *options: object) -> None:
        assert run(*options) == 2
        assert words in capsys.readouterr().err

    refused("others could draw here; set a key", "serve", "--host", "0.0.0.0")
    refused("or with --password", "app", "--host", "0.0.0.0")
    refused("no such folder", "serve", "./nothing")
    refused("two models are called emoji", "serve", "--model", "emoji", "--model", "emoji")
    refused("a CLIP is open_clip:NAME/PRETRAINED", "serve", "--clip", "./nothing")
    refused("--folder nothing: no such folder", "app", "--folder", "nothing")
    folders = [Path(name).absolute() for name in ("a/runs", "b/runs")]
    for folder in folders:
        folder.mkdir(parents=True)
    refused("another one is called runs too", "app", "--folder", folders[0], "--folder", folders[1])
    with listen("127.0.0.1", 0) as taken:
        refused("say another --port", "serve", "--port", taken.getsockname()[1])


def test_a_client_loads_little(served: Any, tmp_path: Path) -> None:
    """Else a warm server would draw faster than its client begins."""
    program = (
        "import atexit, sys; from latentdiff import cli;"
        "names = ('torch', 'fastapi', 'uvicorn', 'yaml', 'latentdiff.training', 'latentdiff.pipelines.commands.serve');"
        "atexit.register(lambda: print([name for name in names if name in sys.modules])); cli.main()"
    )
    command = ["generate", "a cup", "--server", served.url, "--steps", "2", "-o", str(tmp_path / "cup.png")]
    found = subprocess.run([sys.executable, "-c", program, *command], check=True, capture_output=True, text=True)
    assert found.stdout.splitlines()[-1] == "[]"
    assert (tmp_path / "cup.png").is_file()
