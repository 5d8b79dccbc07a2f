"""Cards of models: what they say, whose text they leave alone; and the upload, to a hub of the test's own."""

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from huggingface_hub import ModelCard
from PIL import Image

from latentdiff.training.card.card import push_model, update_evaluation, write_model_card
from latentdiff.training.card.kinds import autoencoder_kind, short_captions, text_to_image_kind
from latentdiff.training.data import CaptionedPicture

SETTINGS = {
    "data": "/home/somebody/secret/pictures",
    "output": Path("/home/somebody/runs/mine"),
    "model": "emoji",
    "learning_rate": 1e-4,
    "sample_prompts": ("a `tick`", "a blue cup"),
    "report_to": (),
    "caption": None,
    "perceptual_network": "~/weights/lpips.safetensors",
    "caption_column": "text: with a colon",
}


def write(folder: Path, **changes: Any) -> str:
    given: dict[str, Any] = {
        "kind": text_to_image_kind(("a `tick`", "a blue cup")),
        "settings": SETTINGS,
        "figures": {"loss": 0.123456789, "held_out": 1},
        "pictures": 1234,
        "steps": 400,
    }
    write_model_card(folder, **{**given, **changes})
    return (folder / "README.md").read_text(encoding="utf-8")


def test_a_card_names_the_folder_as_it_was_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = write(Path("runs/full"))
    assert "--model runs/full -o" in text
    assert 'TextToImagePipeline.from_pretrained("runs/full")' in text
    assert "# full" in text


def test_what_a_card_says(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    text = write(folder, base_model="somebody/some-model")
    card = ModelCard(text)
    assert card.data.library_name == "diffusers"
    assert card.data.pipeline_tag == "text-to-image"
    assert card.data.base_model == "somebody/some-model"
    assert {"latentdiff", "text-to-image"} <= set(card.data.tags)
    assert "# mine" in text
    assert "from somebody/some-model on 1,234 pictures in 400 optimizer steps" in text
    assert 'pipeline("a blue cup", seed=0)' in text  # the first prompt would need quoting in a shell
    assert 'latentdiff generate "a blue cup" --model mine -o' in text
    assert "THIS_FOLDER" not in text
    assert 'from_pretrained("me/mine")' in write(folder, settings={**SETTINGS, "push_to_hub": "me/mine"})
    assert "StableDiffusionPipeline" in text
    assert "| loss | 0.123457 |" in text
    block = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert block == {
        "data": "pictures",
        "output": "mine",
        "model": "emoji",
        "learning_rate": 1e-4,
        "sample_prompts": ["a `tick`", "a blue cup"],
        "report_to": [],
        "perceptual_network": "lpips.safetensors",
        "caption_column": "text: with a colon",
    }
    assert "somebody/secret" not in text
    assert "/home" not in text
    assert [file.name for file in folder.iterdir()] == ["README.md"]


def test_an_autoencoder_and_a_folder_as_base(tmp_path: Path) -> None:
    base = tmp_path / "runs" / "base"
    base.mkdir(parents=True)
    text = write(tmp_path / "out", kind=autoencoder_kind("kl"), base_model=str(base), figures={})
    data = ModelCard(text).data
    assert data.pipeline_tag is None
    assert data.base_model is None  # the hub takes ids only
    assert "from base on" in text
    assert "AutoencoderKL.from_pretrained" in text
    assert "generate" not in text
    assert str(tmp_path) not in text
    assert "diffusers' class of this name" in text
    text = write(tmp_path / "fsq", kind=autoencoder_kind("fsq"), settings={"kind": "fsq"}, figures={})
    assert "import FSQModel" in text
    assert "diffusers' class" not in text


def test_text_of_somebody_else_survives(tmp_path: Path) -> None:
    first = write(tmp_path)
    edited = first.replace("library_name: diffusers", "library_name: diffusers\nlicense: mit\nmine: 1")
    edited = (
        edited.replace("<!-- latentdiff: model", "# My title\n\nBefore.\n\n<!-- latentdiff: model", 1) + "\nAfter.\n"
    )
    (tmp_path / "README.md").write_text(edited, encoding="utf-8")
    second = write(tmp_path, steps=800, figures={"loss": 0.5})
    assert update_evaluation(tmp_path, "## Evaluation\n\nfirst")
    assert update_evaluation(tmp_path, "## Evaluation\n\nsecond \\1")
    third = write(tmp_path, steps=900)
    for text in (second, third):
        data = ModelCard(text).data
        assert (data.license, data.get("mine"), data.library_name) == ("mit", 1, "diffusers")
        assert text.count("# My title\n\nBefore.\n") == text.count("\nAfter.\n") == 1
        assert f"# {tmp_path.name}" not in text
    assert "in 800 optimizer steps" in second
    assert "| loss | 0.5 |" in second
    assert "in 900 optimizer steps" in third
    assert "400 optimizer steps" not in third
    assert third.count("## Evaluation") == 1
    assert "second \\1" in third
    assert write(tmp_path, steps=900) == third


def test_the_card_of_somebody_else_is_not_touched(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "grid.png")
    for content in (b"# Mine\n", b"\xff\xfe not text", b""):
        (tmp_path / "README.md").write_bytes(content)
        write_model_card(
            tmp_path,
            kind=text_to_image_kind(),
            settings={},
            figures={},
            pictures=1,
            steps=1,
            sample_grid=tmp_path / "grid.png",
        )
        assert not update_evaluation(tmp_path, "text")
        assert (tmp_path / "README.md").read_bytes() == content
    assert not (tmp_path / "samples.png").exists()
    assert "README.md was not written by latentdiff" in caplog.text
    (tmp_path / "none").mkdir()
    assert not update_evaluation(tmp_path / "none", "text")
    assert not list((tmp_path / "none").iterdir())


def test_a_pipe_in_the_place_of_a_card(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "README.md")  # whoever opens it waits for ever
    assert not update_evaluation(tmp_path, "text")


@pytest.mark.parametrize("front", ["license: [mit", "- a list", "model-index:\n- name: x"])
def test_front_matter_that_cannot_be_read(tmp_path: Path, front: str, caplog: pytest.LogCaptureFixture) -> None:
    text = write(tmp_path).replace("library_name: diffusers", front, 1)
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    assert write(tmp_path, steps=900) == text
    assert not update_evaluation(tmp_path, "## Evaluation")
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == text
    assert "README.md cannot be read" in caplog.text


def test_marks_of_editors_and_in_settings(tmp_path: Path) -> None:
    odd = {"caption": "<!-- latentdiff: end of model -->", "sample_prompts": ("<!-- latentdiff: model",)}
    first = write(tmp_path, settings=odd)
    (tmp_path / "README.md").write_text(f"\ufeff{first}", encoding="utf-8")
    assert write(tmp_path, settings=odd) == first
    assert first.count("## Settings") == first.count("library_name:") == 1


def test_sample_grid(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, grid = tmp_path / "model", tmp_path / "grid.png"
    for colour in ("red", "blue"):
        Image.new("RGB", (4, 4), colour).save(grid)
        assert "![Samples](samples.png)" in write(folder, sample_grid=grid)
        assert Image.open(folder / "samples.png").getpixel((0, 0)) == Image.open(grid).getpixel((0, 0))
    other = tmp_path / "other"
    other.mkdir()
    (other / "samples.png").write_bytes(b"mine")
    assert "samples.png" not in write(other, sample_grid=grid)
    assert (other / "samples.png").read_bytes() == b"mine"
    assert "samples.png was not written by latentdiff" in caplog.text


class Hub(BaseHTTPRequestHandler):
    """As much of a hub as an upload of small files needs."""

    repositories: ClassVar[list[dict[str, Any]]] = []
    files: ClassVar[dict[str, bytes]] = {}

    def answer(self, value: Any, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.answer({"id": "me/mine", "sha": "0" * 40, "siblings": []})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != "Bearer hf_good":
            self.answer({"error": "Invalid credentials in Authorization header"}, 401)
        elif self.path == "/api/repos/create":
            self.repositories.append(json.loads(body))
            self.answer({"url": f"http://{self.headers['Host']}/me/mine", "id": "me/mine"})
        elif "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            self.answer({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]})
        elif "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            self.answer(
                {"commitUrl": f"http://{self.headers['Host']}/me/mine/commit/1", "commitOid": "1", "success": True}
            )
        else:
            self.answer({})

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    Hub.repositories.clear()
    Hub.files.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder like a trained model's."""
    folder = tmp_path / "mine"
    for name in (
        "model_index.json",
        "README.md",
        "unet/config.json",
        "training/settings.yaml",
        "training/checkpoints/step-1/state.json",
        "evaluation/evaluation.json",
        "evaluation/samples/000000.png",
        "evaluation/pictures.jsonl",
        ".partial-1/x",
        "unet/.partial-file",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{{}} {name}", encoding="utf-8")
    return folder


def push_elsewhere(folder: Path, endpoint: str, token: str, home: Path) -> "subprocess.CompletedProcess[str]":
    """In a process of its own: whether the hub may be asked is settled when its library is imported."""
    code = (
        "import sys; from pathlib import Path; from latentdiff.training.card.card import push_model\n"
        "folder, token = sys.argv[1:]\n"
        "try: print(push_model(Path(folder), 'me/mine', private=True, token=token))\n"
        "except OSError as error: sys.exit(f'{type(error).__name__}: {error}')"
    )
    environment = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
    }
    return subprocess.run(
        [sys.executable, "-c", code, str(folder), token], env=environment, capture_output=True, text=True
    )


def test_push(model: Path, hub: str, tmp_path: Path) -> None:
    done = push_elsewhere(model, hub, "hf_good", tmp_path / "home")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{hub}/me/mine/commit/1"
    made = Hub.repositories[0]
    assert (made["name"], made["organization"]) == ("mine", "me")
    assert made.get("private") is True or made.get("visibility") == "private"
    assert set(Hub.files) == {"model_index.json", "README.md", "unet/config.json", "evaluation/evaluation.json"}
    assert Hub.files["unet/config.json"] == b"{} unet/config.json"


def test_push_refused_and_out_of_reach(model: Path, hub: str, tmp_path: Path) -> None:
    refused = push_elsewhere(model, hub, "hf_bad", tmp_path / "home")
    assert refused.returncode == 1
    assert "mine was not uploaded to me/mine: the hub says: " in refused.stderr
    assert "401" in refused.stderr
    assert not Hub.files
    gone = push_elsewhere(model, "http://127.0.0.1:9", "hf_good", tmp_path / "home")
    assert "is there a network?" in gone.stderr


def test_push_that_cannot_be(model: Path, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="HF_HUB_OFFLINE is set"):
        push_model(model, "me/mine")
    with pytest.raises(ValueError, match="write owner/name"):
        push_model(model, "mine")
    with pytest.raises(FileNotFoundError, match="holds no model"):
        push_model(tmp_path, "me/mine")


def test_the_caption_that_a_card_draws_is_short_and_needs_no_escaping() -> None:
    captions = ("x" * 61, 'a "quoted" cup', "two\nlines", "a green pear", "a cup")
    assert short_captions([CaptionedPicture("0.png", bytes, captions)]) == ["a green pear"]
    assert short_captions([]) == []
