"""SDXL's refiner behind a server: it draws what ``generate --refiner`` draws."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from served import DRAW, LIMITS, answered, ask, serving
from tiny_sdxl import tiny_refiner, tiny_sdxl

from latentdiff.interchange.png import settings_of
from latentdiff.pipelines.commands.serve import ServedLoading, ServingOptions, offers_of
from latentdiff.pipelines.server.service import Service
from latentdiff.pipelines.server.shelf import Shelf

Run = Callable[..., int]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("refined")
    base = tiny_sdxl()
    base.save_pretrained(folder / "base")
    tiny_refiner(base).save_pretrained(folder / "refiner")
    return folder


def service_of(models: Path, **loading: Any) -> Service:
    offers = offers_of(ServedLoading(model=str(models / "base"), **loading), ServingOptions())
    return Service(Shelf({name: load for name, (_, load) in offers.items()}), LIMITS)


@pytest.fixture(scope="module")
def refined(models: Path) -> Iterator[Any]:
    service = service_of(models, refiner=str(models / "refiner"), denoising_end=0.5)
    with serving(service, hosts=("127.0.0.1",)) as running:
        yield running
    service.queue.close(wait=False)


def same(one: Any, other: Any) -> bool:
    return bool((np.asarray(one) == np.asarray(other)).all())


def test_a_server_refines_as_generate_does(models: Path, refined: Any, run: Run) -> None:
    base, refiner = str(models / "base"), str(models / "refiner")
    asked = ["a car", "--steps", 4, "--seed", 1, "--negative-prompt", "sun", "--aesthetic-score", 9, "--separate"]
    here = ["--model", base, "--refiner", refiner]
    assert run("generate", *asked, *here, "--denoising-end", 0.5, "-n", 2, "-o", "here.png") == 0
    assert run("generate", *asked, "--server", refined.url, "-n", 2, "-o", "there.png") == 0
    for number in (1, 2):
        with Image.open(f"here-{number}.png") as one, Image.open(f"there-{number}.png") as other:
            assert same(one, other)
            drawn = [settings_of(picture) or {} for picture in (one, other)]
            for name in ("refiner_digest", "denoising_end", "aesthetic_score"):
                assert drawn[0][name] == drawn[1][name]
            assert (drawn[1]["model"], drawn[1]["refiner"]) == ("base", "refiner")  # no folders of that disk
    assert run("replay", "there-1.png", "--model", base, "--refiner", refiner) == 0
    Image.linear_gradient("L").resize((16, 16)).convert("RGB").save("in.png")
    more = ["--image", "in.png", "--strength", 0.9, "--denoising-end", 0.6]
    assert run("generate", *asked, *here, *more, "-o", "here.png") == 0
    assert run("generate", *asked, *more, "--server", refined.url, "-o", "there.png") == 0
    with Image.open("here.png") as one, Image.open("there.png") as other:
        assert same(one, other)


def test_a_servers_refiner_is_taught_the_words_of_its_base_model(models: Path, run: Run) -> None:
    torch.manual_seed(0)
    save_file({"clip_l": torch.randn(2, 16), "clip_g": torch.randn(2, 24)}, "x.safetensors")
    loading = {"refiner": str(models / "refiner"), "embedding": ["x.safetensors:<x>"]}
    asked = ["a <x>", "--steps", 4, "--seed", 1]
    here = ["--model", models / "base", "--refiner", loading["refiner"], "--embedding", "x.safetensors:<x>"]
    assert run("generate", *asked, *here, "-o", "here.png") == 0
    service = service_of(models, **loading)
    with serving(service, hosts=("127.0.0.1",)) as running:
        assert run("generate", *asked, "--server", running.url, "-o", "there.png") == 0
    service.queue.close(wait=False)
    with Image.open("here.png") as one, Image.open("there.png") as other:
        assert same(one, other)


def test_previews_go_on_with_the_refiner(refined: Any) -> None:
    body = {"prompt": "a car", "steps": 4, "seed": 1, "stream": True, "partial_images": 3}
    lines = ask(refined.url + DRAW, body)[1].decode().splitlines()
    found = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    assert [(one.get("step"), one.get("steps")) for one in found] == [(1, 4), (2, 4), (3, 4), (None, None)]


def test_what_cannot_be(models: Path, refined: Any, drawer: Any, tmp_path: Path) -> None:
    plain = service_of(models)
    with serving(plain, hosts=("127.0.0.1",)) as running:
        for body, why in (
            ({"denoising_end": 0.5}, "denoising_end: no refiner draws here"),
            ({"aesthetic_score": 9}, "aesthetic_score: SDXL's refiner takes it"),
            ({"negative_prompt": "sun", "guidance_scale": 1}, "negative_prompt: it acts by guidance"),
            ({"partial_images": 2}, "partial_images come in a stream"),
            ({"output_compression": 50}, "output_compression is of jpeg and webp"),
        ):
            status, message, _ = ask(running.url + DRAW, {"prompt": "a car", "steps": 4, **body})
            assert (status, why in message) == (400, True), message
    plain.queue.close(wait=False)
    assert answered([ask(refined.url + DRAW, {"prompt": "a car", "steps": 4, "aesthetic_score": 9})])
    drawer.save_pretrained(tmp_path / "other")
    refiner = str(models / "refiner")
    for model, loading, why in (
        (tmp_path / "other", {"refiner": refiner}, "--refiner is for SDXL, and other are of other kinds"),
        (models / "base", {"denoising_end": 0.5}, "--denoising-end needs --refiner"),
        (models / "base", {"refiner": str(tmp_path / "other")}, "is not a model of SDXL"),
    ):
        with pytest.raises(ValueError, match=why):
            offers_of(ServedLoading(model=str(model), **loading), ServingOptions())
