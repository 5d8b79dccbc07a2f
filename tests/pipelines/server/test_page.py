"""The page, in Chromium."""

import base64
import io
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from discs import save_discs
from loras import diffusers_lora
from PIL import ExifTags, Image
from served import hold, made, serving, until
from tiny_clip import save_clip
from tiny_codes import save_codes

from latentdiff import InpaintPipeline, TokenPipeline
from latentdiff.interchange.png import read_settings, settings_of

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
SHOTS = os.environ.get("LATENTDIFF_SCREENSHOTS")
DROP = """([content, name, place]) => {
  const bytes = Uint8Array.from(atob(content), (one) => one.charCodeAt(0)), dropped = new DataTransfer();
  dropped.items.add(new File([bytes], name, { type: "image/png" }));
  document.querySelector(place).dispatchEvent(new DragEvent("drop", { dataTransfer: dropped, bubbles: true }));
}"""


def test_the_page_is_served_and_asks_nothing_of_others(paged: Any) -> None:
    with urlopen(paged.url, timeout=60) as answer:
        text, policy = answer.read().decode(), answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    for mark in ("http://", "https://", "src=", "@import"):
        assert mark not in text


@pytest.fixture
def page(paged: Any) -> Iterator[Any]:
    with opened(paged.url) as page:
        yield page


@contextmanager
def opened(url: str) -> Iterator[Any]:
    """The page in Chromium, in which nothing fails."""
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(
            viewport={"width": 1280, "height": 900}, bypass_csp=True
        )  # or nothing is evaluated in it
        page.set_default_timeout(120_000)
        faults: list[str] = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(url)
        page.wait_for_function("info !== null")
        yield page
        browser.close()
    assert faults == []


def shot(page: Any, name: str) -> None:
    if SHOTS:
        page.screenshot(path=Path(SHOTS, f"{name}.png"))


def drawn(page: Any, count: int) -> None:
    page.click("#draw")
    page.wait_for_function(f"document.querySelectorAll('#gallery figure').length === {count} && running === null")


def download(page: Any, number: int = 0) -> Path:
    with page.expect_download() as coming:
        page.locator("#gallery a").nth(number).click()
    return Path(coming.value.path())


def png(image: Image.Image, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG", **options)
    return stream.getvalue()


def drop(page: Any, content: bytes, name: str, place: str) -> None:

    page.evaluate(DROP, [base64.b64encode(content).decode(), name, place])


@pytest.mark.slow
def test_drawing_and_drawing_again(page: Any, drawer: Any) -> None:
    page.fill("#prompt", "a red cup")
    page.fill("#steps", "4")
    page.fill("#count", "2")
    drawn(page, 2)
    shot(page, "drawn")
    first = download(page)
    said = read_settings(first) or {}
    image = drawer("a red cup", seed=said["seed"], num_inference_steps=4).images[0]
    assert np.abs(np.asarray(Image.open(first)).astype(int) - np.asarray(image)).max() <= 1
    page.fill("#prompt", "other")
    page.fill("#steps", "2")
    drop(page, first.read_bytes(), "first.png", "#main")
    page.wait_for_function("document.querySelector('#prompt').value === 'a red cup'")
    assert (page.input_value("#seed"), page.input_value("#steps")) == (str(said["seed"]), "4")
    page.fill("#count", "1")
    drawn(page, 3)
    again = read_settings(download(page)) or {}
    assert (again["seed"], again["prompts"]) == (said["seed"], ["a red cup"])


@pytest.mark.slow
def test_previews_and_stop(page: Any, paged: Any) -> None:
    page.fill("#prompt", "a red cup")
    page.fill("#steps", "50")
    page.click("#draw")
    page.wait_for_function("document.querySelector('#now img')?.src.startsWith('data:image/png')")
    shot(page, "preview")
    page.wait_for_function("running === null")
    held = hold(paged.service)
    page.fill("#steps", "2")
    page.click("#draw")
    page.wait_for_function("document.querySelector('#said').textContent.startsWith('Waiting')")
    until(lambda: len(paged.service.queue) == 1)
    job = paged.service.queue._waiting[0]
    page.click("#stop")
    page.wait_for_function("running === null")
    assert page.inner_text("#said") == "Stopped."
    until(lambda: job.unwanted)
    held.let_go.set()
    drawn(page, 2)


def paint_a_column(page: Any) -> None:
    """Of the mask, on the right of its middle."""
    page.fill("#brush", "40")
    page.locator("#mask").scroll_into_view_if_needed()
    box = page.locator("#mask").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.8, box["y"])
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.8, box["y"] + box["height"], steps=8)
    page.mouse.up()


@pytest.mark.slow
def test_painting_within_a_mask(page: Any, drawer: Any) -> None:
    """On a picture that its EXIF turns upside down: what is painted is painted on what the page shows."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3
    drop(page, png(image.rotate(180), exif=exif), "photo.png", "#start")
    page.wait_for_function("document.querySelector('#mask').width === 16")
    paint_a_column(page)
    mask = page.evaluate("maskBlob().then((blob) => blob.arrayBuffer()).then((one) => [...new Uint8Array(one)])")
    painted = Image.open(io.BytesIO(bytes(mask))).convert("L")
    values = np.asarray(painted)
    assert (values[:, :8] == 0).all()
    assert (values[2:14, 12:14] == 255).all()
    page.fill("#prompt", "a cup")
    page.fill("#steps", "3")
    shot(page, "mask")
    drawn(page, 1)
    found = Image.open(download(page))
    said = settings_of(found) or {}
    assert (said["image"]["file"], said["mask"]["file"]) == ("photo.png", "mask.png")
    call = {"seed": said["seed"], "num_inference_steps": 3, "strength": 1.0}
    wanted = InpaintPipeline.from_pipe(drawer)("a cup", image=image, mask_image=painted, **call).images[0]
    assert (np.asarray(found) == np.asarray(wanted)).all()


@pytest.mark.slow
def test_codes_are_drawn_within_a_mask_and_know_no_strength(tmp_path: Path) -> None:
    save_codes(tmp_path)
    service = made(TokenPipeline.from_pretrained(tmp_path / "words"))
    with serving(service, hosts=("127.0.0.1",), folders=()) as running, opened(running.url) as page:
        drop(page, png(Image.effect_noise((16, 16), 90).convert("RGB")), "photo.png", "#start")
        page.wait_for_function("document.querySelector('#mask').width === 16")
        page.fill("#prompt", "a cup")
        page.click("#draw")
        page.wait_for_selector("#said:has-text('paint over what is to be drawn anew')")
        paint_a_column(page)
        assert not page.locator("#strength").is_visible()
        assert page.is_disabled("#steps")
        drawn(page, 1)
        said = settings_of(Image.open(download(page))) or {}
        assert "strength" not in said
        assert said["num_inference_steps"] == 64  # a step for each code, above the limit
    service.queue.close(wait=False)


@pytest.mark.slow
def test_a_picture_brings_its_size_and_a_drawing_its_warnings(page: Any) -> None:
    drop(page, png(Image.effect_noise((40, 20), 90).convert("RGB")), "wide.png", "#start")
    page.wait_for_function("document.querySelector('#width').value === '22'")
    assert page.input_value("#height") == "12"
    assert "It has 40×20 pixels and is drawn at 22×12." in page.inner_text("#fitting")
    page.fill("#prompt", "a red cup")
    page.fill("#steps", "7")
    page.fill("#strength", "0.15")  # the least that leaves a step
    assert (page.get_attribute("#strength", "min"), page.inner_text("#share")) == ("0.15", "15 %")
    drawn(page, 1)
    assert page.locator("#gallery .warning").count() == 0
    page.select_option("#width", "32")
    drawn(page, 2)
    assert "32×12" in page.inner_text("#gallery figure:first-child")
    assert "⚠ Drawing 32 x 12 pixels" in page.inner_text("#gallery .warning")
    shot(page, "warning")
    page.click("#away")
    assert (page.input_value("#width"), page.input_value("#height")) == ("16", "16")


@pytest.mark.slow
def test_errors_are_said_in_words(page: Any, paged: Any) -> None:
    page.fill("#prompt", "a" * 101)
    page.click("#draw")
    page.wait_for_function("document.querySelector('#said').className === 'error'")
    assert "101 characters are more than this server gives" in page.inner_text("#said")
    drop(page, b"nothing", "notes.txt", "#main")
    page.wait_for_function("document.querySelector('#said').textContent.includes('no settings of latentdiff')")


@pytest.mark.slow
def test_the_page_asks_for_the_password(page: Any, drawer: Any) -> None:
    with serving(made(drawer), key="secret", folders=()) as guarded:
        strict = page.context.browser.new_page()  # with the page's own policy
        strict.goto(guarded.url)
        strict.wait_for_selector("#password", state="visible", timeout=120_000)
        strict.fill("#password", "secret")
        strict.press("#password", "Tab")
        strict.wait_for_selector("#model:has-text('tiny')", timeout=120_000)
        strict.fill("#prompt", "a red cup")
        strict.click("#draw")
        strict.wait_for_selector("#gallery figure img", timeout=120_000)


@pytest.mark.slow
def test_steps_models_and_loras(drawer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    drawer.save_pretrained("runs/birds")
    diffusers_lora(drawer, Path("runs"), text=False)
    torch.manual_seed(1)  # with which the scores differ
    service = made(drawer, clip=str(save_clip(tmp_path / "clip")))
    with serving(service, folders=[Path("runs")]) as served, opened(served.url) as page:
        page.select_option("#model", "runs/birds")
        page.wait_for_function("info.id === 'runs/birds'")
        page.select_option("#lora", "runs/pytorch_lora_weights.safetensors")
        page.fill("#lora-scale", "0.5")
        page.fill("#prompt", "a red cup")
        page.fill("#steps", "6")
        page.fill("#count", "3")
        page.check("#scores")
        drawn(page, 3)
        page.locator("#gallery button", has_text="steps").first.click()
        assert page.locator("#gallery .strip img").count() == 6
        shot(page, "strip")
        best = read_settings(download(page)) or {}
        scores = [(read_settings(download(page, i)) or {})["scores"][0] for i in range(3)]
        assert scores == sorted(set(scores), reverse=True)
        assert (best["model"], best["loras"][0]["scale"]) == ("runs/birds", 0.5)
        page.select_option("#model", "tiny")
        page.wait_for_function("info.id === 'tiny'")
        page.select_option("#lora", "")
        page.locator("#gallery button", has_text="use settings").first.click()
        page.wait_for_function("document.querySelector('#said').textContent === 'Settings taken over.'")
        assert page.input_value("#model") == "runs/birds"
        assert (page.input_value("#lora"), page.input_value("#lora-scale")) == (best["loras"][0]["file"], "0.5")
        page.select_option("#model", "tiny")
        page.wait_for_function("info.id === 'tiny'")
        draw_with_another(page)


def draw_with_another(page: Any) -> None:
    """A model whose place is typed: nothing else draws instead of it, and a drawing waits until it is loaded."""
    page.fill("#count", "1")
    page.uncheck("#scores")
    page.select_option("#model", label="another, within the folders ...")
    page.click("#draw")
    page.wait_for_selector("#said:has-text('Name a model')")
    page.fill("#typed", "/etc")
    page.press("#typed", "Enter")
    page.wait_for_function("document.querySelector('#said').textContent.includes('/etc is not within runs')")
    assert page.locator("#typed").is_visible()
    held: list[Any] = []
    page.route("**/page/model", lambda route: held.append(route))
    page.fill("#typed", "runs/birds")
    page.click("#draw")
    page.wait_for_function("running !== null")
    assert page.inner_text("#said") == "Loading runs/birds ..."
    held[0].continue_()
    page.wait_for_function("document.querySelectorAll('#gallery figure').length === 4 && running === null")
    assert "runs/birds, seed" in page.locator("#gallery figure").first.inner_text()
    assert (read_settings(download(page)) or {})["model"] == "runs/birds"


@pytest.mark.slow
def test_fine_tuning(drawer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page is closed meanwhile; opened again it shows curves and samples, and the result draws."""
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    drawer.save_pretrained("runs/birds")
    save_discs(tmp_path / "runs" / "discs")
    with serving(made(drawer), folders=[Path("runs")]) as served:
        with opened(served.url) as page:
            page.click("#to-train")
            page.fill("#data", "runs/discs")
            page.select_option("#base", "runs/birds")
            page.select_option("#method", "full")
            page.click("#begin")
            assert "in which folder" in page.inner_text("#told")
            for name, value in {"output": "runs/new", "max-steps": "10", "batch": "2", "every": "5"}.items():
                page.fill(f"#{name}", value)
            page.click("#begin")
            page.wait_for_selector("#told:has-text('Training runs/new on runs/discs ...')")
        with opened(served.url) as page:
            page.click("#to-train")
            page.wait_for_selector("#told:has-text('Finished.')", timeout=300_000)
            fields = {"data": "runs/discs", "base": "runs/birds", "method": "full", "output": "runs/new"}
            fields |= {"max-steps": "10", "batch": "2", "every": "5", "rate": ""}
            assert {name: page.input_value(f"#{name}") for name in fields} == fields
            page.wait_for_function("[...document.querySelectorAll('#samples img')].some((one) => one.naturalWidth > 0)")
            assert page.locator("#plot path[data-curve=loss]").get_attribute("d").startswith("M")
            assert page.locator("#plot path[data-curve=val_loss]").count() == 1
            shot(page, "trained")
            page.set_viewport_size({"width": 400, "height": 900})
            page.wait_for_function("document.querySelector('#plot text').getBoundingClientRect().height > 10")
            shot(page, "narrow")
            page.click("#try")
            page.wait_for_function("info.id === 'runs/new'")
            page.fill("#prompt", "a red thing")
            drawn(page, 1)
            assert (read_settings(download(page)) or {})["model"] == "runs/new"
