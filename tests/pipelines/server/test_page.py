"""The page, in Chromium."""

import base64
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import pytest
from PIL import Image
from served import hold, made, serving, until

from latentdiff import InpaintPipeline
from latentdiff.interchange.png import read_settings, settings_of

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
SHOTS = os.environ.get("LATENTDIFF_SCREENSHOTS")
DROP = """([content, name, place]) => {
  const bytes = Uint8Array.from(atob(content), (one) => one.charCodeAt(0)), dropped = new DataTransfer();
  dropped.items.add(new File([bytes], name, { type: "image/png" }));
  document.querySelector(place).dispatchEvent(new DragEvent("drop", { dataTransfer: dropped, bubbles: true }));
}"""


def test_the_page_is_served_and_asks_nothing_of_others(served: Any) -> None:
    with urlopen(served.url, timeout=60) as answer:
        text, policy = answer.read().decode(), answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    for mark in ("http://", "https://", "src=", "@import"):
        assert mark not in text


@pytest.fixture
def page(served: Any) -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        opened = browser.new_page(
            viewport={"width": 1280, "height": 900}, bypass_csp=True
        )  # or nothing is evaluated in it
        opened.set_default_timeout(120_000)
        faults: list[str] = []
        opened.on("pageerror", lambda error: faults.append(str(error)))
        opened.goto(served.url)
        opened.wait_for_function("info !== null")
        yield opened
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
def test_previews_and_stop(page: Any, served: Any) -> None:
    page.fill("#prompt", "a red cup")
    page.fill("#steps", "50")
    page.click("#draw")
    page.wait_for_function("document.querySelector('#now img')?.src.startsWith('data:image/png')")
    shot(page, "preview")
    page.wait_for_function("running === null")
    held = hold(served.service)
    page.fill("#steps", "2")
    page.click("#draw")
    page.wait_for_function("document.querySelector('#said').textContent.startsWith('Waiting')")
    until(lambda: len(served.service.queue) == 1)
    job = served.service.queue._waiting[0]
    page.click("#stop")
    page.wait_for_function("running === null")
    assert page.inner_text("#said") == "Stopped."
    until(lambda: job.unwanted)
    held.let_go.set()
    drawn(page, 2)


@pytest.mark.slow
def test_painting_within_a_mask(page: Any, drawer: Any) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    stream = io.BytesIO()
    image.save(stream, "PNG")
    drop(page, stream.getvalue(), "photo.png", "#start")
    page.wait_for_function("document.querySelector('#mask').width === 16")
    box = page.locator("#mask").bounding_box()
    page.fill("#brush", "40")
    page.mouse.move(box["x"] + box["width"] * 0.8, box["y"])
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.8, box["y"] + box["height"], steps=8)
    page.mouse.up()
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
def test_errors_are_said_in_words(page: Any, served: Any) -> None:
    page.fill("#prompt", "a" * 101)
    page.click("#draw")
    page.wait_for_function("document.querySelector('#said').className === 'error'")
    assert "101 characters are more than this server gives" in page.inner_text("#said")
    drop(page, b"nothing", "notes.txt", "#main")
    page.wait_for_function("document.querySelector('#said').textContent.includes('no settings of latentdiff')")


@pytest.mark.slow
def test_the_page_asks_for_the_password(page: Any, drawer: Any) -> None:
    with serving(made(drawer), key="secret", page=True) as served:
        strict = page.context.browser.new_page()  # with the page's own policy
        strict.goto(served.url)
        strict.wait_for_selector("#password", state="visible", timeout=120_000)
        strict.fill("#password", "secret")
        strict.press("#password", "Tab")
        strict.wait_for_selector("#model:has-text('tiny')", timeout=120_000)
        strict.fill("#prompt", "a red cup")
        strict.click("#draw")
        strict.wait_for_selector("#gallery figure img", timeout=120_000)
