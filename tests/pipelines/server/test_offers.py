"""What the page asks for besides pictures: models, LoRAs and trainings, and what it is refused."""

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from discs import save_discs
from loras import diffusers_lora
from safetensors.torch import load_file, save_file
from served import DRAW, answered, ask, made, near, serving, until
from tiny_clip import save_clip

from latentdiff.interchange.png import settings_of
from latentdiff.pipelines.server.child import last_lines
from latentdiff.pipelines.server.training import curves_in


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drawer: Any) -> Path:
    monkeypatch.chdir(tmp_path)
    drawer.save_pretrained("runs/birds")
    diffusers_lora(drawer, Path("runs"), text=False)
    save_discs(tmp_path / "runs/pictures")
    return Path("runs")


def post(url: str, values: Any) -> Any:
    status, found, _ = ask(url, values)
    assert status == 200, found
    return json.loads(found)


def test_models_in_folders(runs: Path, drawer: Any) -> None:
    save_file({"denoiser.conv_in.lora_A.default.weight": torch.ones(2, 4)}, runs / "trained.safetensors")  # of a run
    with serving(made(drawer), folders=[runs]) as served:
        offer = json.loads(ask(served.url + "/page")[1])
        assert [one["id"] for one in offer["models"]] == ["tiny", "emoji", "runs/birds"]
        assert (offer["folders"], offer["loras"]) == (["runs"], ["runs/pytorch_lora_weights.safetensors"])
        for typed in ("runs/birds", "birds", str(runs.absolute() / "birds")):
            assert post(served.url + "/page/model", {"model": typed})["id"] == "runs/birds"
        found = ask(served.url + DRAW, {"prompt": "a cup", "seed": 3, "model": "runs/birds"})
        assert near(answered([found]), drawer("a cup", seed=3).images[0])
        for typed, words in (
            ("../secret", "is not within runs"),
            ("nothing", "there is no"),
            ("pictures", "is no model"),
        ):
            status, message, _ = ask(served.url + "/page/model", {"model": typed})
            assert (status, words in message) == (400, True)


def test_links_out_of_the_folders_offer_nothing(runs: Path, drawer: Any, tmp_path: Path) -> None:
    drawer.save_pretrained("elsewhere/model")
    (runs / "linked").symlink_to(tmp_path / "elsewhere")
    (runs / "pytorch_lora_weights.safetensors").rename("elsewhere/lora.safetensors")
    (runs / "lora.safetensors").symlink_to(tmp_path / "elsewhere/lora.safetensors")
    with serving(made(drawer), folders=[runs]) as served:
        offer = json.loads(ask(served.url + "/page")[1])
        assert ([one["id"] for one in offer["models"]][2:], offer["loras"]) == (["runs/birds"], [])
        for typed in ("runs/linked/model", "linked/model"):
            assert ask(served.url + "/page/model", {"model": typed})[0] == 400
        assert ask(served.url + DRAW, {"prompt": "a cup", "lora": "runs/lora.safetensors"})[0] == 400


def test_a_lora_of_a_request(runs: Path, drawer: Any) -> None:
    """It acts in that picture and in no other."""
    from latentdiff import TextToImagePipeline

    worn = TextToImagePipeline.from_pretrained(runs / "birds")
    worn.set_progress_bar_config(disable=True)
    plain = worn("a cup", seed=1).images[0]
    worn.load_lora_weights(runs / "pytorch_lora_weights.safetensors", adapter_name="lora_0")
    worn.set_adapters(["lora_0"], [0.5])
    styled = worn("a cup", seed=1).images[0]
    name = "runs/pytorch_lora_weights.safetensors"
    with serving(made(drawer), folders=[runs]) as served:
        body = {"prompt": "a cup", "seed": 1, "model": post(served.url + "/page/model", {"model": "birds"})["id"]}
        drawn = [
            answered([ask(served.url + DRAW, {**body, **more})]) for more in ({}, {"lora": f"{name}:0.5"}, {"lora": []})
        ]
        for picture, wanted in zip(drawn, (plain, styled, plain), strict=True):
            assert (np.asarray(picture) == np.asarray(wanted)).all()
        assert not near(plain, styled)
        (record,) = (settings_of(drawn[1]) or {})["loras"]
        assert (record["file"], record["scale"]) == (name, 0.5)
        for lora in ("../x.safetensors", "birds/unet/diffusion_pytorch_model.safetensors", f"{name}:inf"):
            assert ask(served.url + DRAW, {**body, "lora": lora})[0] == 400
    with serving(made(drawer)) as served:
        assert "draws as it was started" in ask(served.url + DRAW, {"prompt": "a", "lora": name})[1]


def test_a_folder_without_a_lora(runs: Path, drawer: Any) -> None:
    with serving(made(drawer), folders=[runs]) as served:
        found = ask(served.url + DRAW, {"prompt": "a cup", "lora": "runs/pictures"})
    assert found[:2] == (400, "lora: there is no LoRA in runs/pictures; name its .safetensors file")


def test_a_lora_that_fits_in_part(runs: Path, drawer: Any) -> None:
    """Said of each picture, not at its loading only."""
    file = runs / "pytorch_lora_weights.safetensors"
    state = load_file(file)
    other = {name.replace("unet.", "unet.other_"): tensor.clone() for name, tensor in [*state.items()][:2]}
    save_file({**state, **other}, runs / "other.safetensors")
    with serving(made(drawer), folders=[runs]) as served:
        for _ in range(2):
            found = post(served.url + DRAW, {"prompt": "a cup", "lora": "runs/other.safetensors"})
            (said,) = found["warnings"]
            assert "The LoRA runs/other.safetensors fits this model in part only: 2 of its " in said
        assert post(served.url + DRAW, {"prompt": "a cup"})["warnings"] == []


def test_the_size_that_a_picture_is_drawn_at(paged: Any) -> None:
    size = paged.url + "/page/size"
    assert post(size, {"width": 17, "height": 19}) == {"width": 16, "height": 18}
    assert post(size, {"width": 4000, "height": 2000, "model": "tiny"}) == {"width": 22, "height": 12}
    assert ask(size, {"width": 0, "height": 8})[:2] == (400, "width: it must be at least 1 (got 0)")
    assert ask(size, {"width": 8})[:2] == (400, "height: it is missing")


def test_what_a_command_says_names_places_as_they_are_typed(runs: Path, drawer: Any) -> None:
    with serving(made(drawer), folders=[runs]) as served:
        training = served.page.training
        places = [runs.absolute() / "pictures/1.png", training._model("emoji"), f"{training._scratch.name}/sheet.png"]
        assert training._shown("\n".join(map(str, places))) == "runs/pictures/1.png\nemoji\nsheet.png"


def test_scores(runs: Path, drawer: Any) -> None:
    from latentdiff.metrics.clip import load_clip

    torch.manual_seed(1)  # with which the scores differ
    clip = str(save_clip(runs / "clip"))
    with serving(made(drawer, clip=clip)) as served:
        found = post(served.url + DRAW, {"prompt": "a cup", "n": 2, "seed": 1, "scores": True})["data"]
    images = drawer(["a cup"] * 2, seed=1).images
    wanted = (100 * load_clip(clip).cosines(images, ["a cup"] * 2).clamp(min=0)).tolist()
    assert [one["score"] for one in found] == pytest.approx(wanted, abs=0.5)
    assert wanted[0] > wanted[1] + 1 > 1
    with serving(made(drawer)) as served:
        assert "start the server with --clip" in ask(served.url + DRAW, {"prompt": "a", "scores": True})[1]


def test_trainings_that_cannot_be(runs: Path, drawer: Any) -> None:
    (runs / "out").symlink_to("/etc")
    good = {"data": "pictures", "model": "runs/birds", "output": "runs/new"}
    with serving(made(drawer), folders=[runs]) as served:
        start = served.url + "/page/training/start"

        def refused(words: str, **changes: Any) -> None:
            status, message, _ = ask(start, {**good, **changes})
            assert (status, words in message) == (400, True), message

        refused("data: ../x is not within runs", data="../x")
        refused("output: runs/out/new is not within runs", output="runs/out/new")
        refused("output: name a folder for the model within", output="runs")
        refused("there is no nothing within runs", model="nothing")
        refused("max_steps: ", max_steps=0)
        refused("method: ", method="dreambooth --output x")
        refused("unknown field 'push_to_hub'", push_to_hub="me/mine")
        assert json.loads(ask(served.url + "/page/training")[1]) == {"running": False}
        assert ask(served.url + "/page/training/samples/step-00000001.png")[0] == 404
    assert not (runs / "new").exists()


def test_samples_of_others_are_not_shown(runs: Path, drawer: Any) -> None:
    """Neither links among them nor other names."""
    with serving(made(drawer), folders=[runs]) as served:
        training = served_training(served)
        samples = runs.absolute() / "new/training/samples"
        samples.mkdir(parents=True)
        (samples / "step-00000001.png").write_bytes(b"a picture")
        (samples / "step-00000002.png").symlink_to("/etc/passwd")
        (samples / "notes.txt").write_text("x")
        training.output = runs.absolute() / "new"
        found = {name: ask(f"{served.url}/page/training/samples/{name}") for name in os.listdir(samples)}
        assert {name: one[0] for name, one in found.items()} == {
            "step-00000001.png": 200,
            "step-00000002.png": 404,
            "notes.txt": 404,
        }
        assert ask(f"{served.url}/page/training/samples/..%2F..%2Fstep-00000001.png")[0] == 404


def served_training(served: Any) -> Any:
    assert served.page is not None
    return served.page.training


@pytest.mark.slow
def test_a_fine_tuning_is_stopped_and_goes_on(runs: Path, drawer: Any) -> None:
    with serving(made(drawer), folders=[runs]) as served:
        url = served.url + "/page/training"

        def state() -> Any:
            return json.loads(ask(url)[1])

        post(f"{url}/look", {"data": "pictures", "model": "runs/birds"})
        assert ask(f"{url}/look", {"data": "pictures"})[0] == 409
        until(lambda: not state()["running"], 300)
        looked = state()
        assert "12 pictures" in looked["said"], looked["said"]
        assert ask(f"{url}/samples/{looked['samples'][0]}")[1].startswith(b"\x89PNG")
        values = {"data": "pictures", "model": "runs/birds", "output": "new", "max_steps": 100000, "sample_every": 5}
        post(f"{url}/start", {**values, "batch_size": 2})
        until(lambda: len(state()["curves"].get("loss", [])) > 1 or not state()["running"], 300)
        assert state()["running"], state()["said"]
        assert (state()["stopping"], state()["draws"]) == (False, False)
        assert post(f"{url}/stop", {})["stopping"]
        until(lambda: not state()["running"], 300)
        stopped = state()
        assert (stopped["ended"], stopped["output"], stopped["draws"]) == ("stopped", "runs/new", True)
        assert "holds the model as it is now, unfinished" in stopped["said"]
        reached = stopped["curves"]["loss"][-1][0]
        post(f"{url}/start", {**values, "batch_size": 2, "max_steps": reached + 3})
        until(lambda: not state()["running"], 300)
        ended = state()
        assert (ended["ended"], ended["curves"]["loss"][-1][0] >= reached) == ("finished", True), ended["said"]
        assert ended["samples"]
        assert "runs/new" in [one["id"] for one in json.loads(ask(served.url + "/page")[1])["models"]]
        post(f"{url}/start", {**values, "max_steps": 200000})
        time.sleep(1)
    assert not served_training(served).running


def test_curves_of_a_file_that_a_stop_has_torn(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    rows = [{"step": i, "loss": 1 / (i + 1)} for i in range(1201)]
    text = "\n".join(
        json.dumps(row) for row in [*rows, {"step": 5, "val_loss": 0.5}, {"step": 6, "val_loss": float("nan")}]
    )
    file.write_text(text + '\n[1]\n{"step": 7, "lo')
    found = curves_in(file)
    assert found["val_loss"] == [(5, 0.5)]
    assert (len(found["loss"]), found["loss"][1]) == (401, (3, 0.25))
    assert curves_in(tmp_path / "nothing") == {}


def test_what_a_command_says_is_shown_as_a_terminal_does() -> None:
    assert last_lines("a\n 10 %|#\r 50 %|##\r\x1b[32m90 %\x1b[0m\x07\nb") == "a\n90 %\\x07\nb"
    assert last_lines("\n".join(map(str, range(500)))).splitlines()[0] == "300"
