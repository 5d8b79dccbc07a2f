"""Who may ask, what is refused, and what becomes of requests that are in the way of others."""

import base64
import http.client
import io
import json
import re
import signal
import threading
from functools import partial
from typing import Any

import numpy as np
import pytest
from PIL import Image
from served import DIGEST, DRAW, LIMITS, answered, ask, hold, made, near, serving, until
from tiny import tiny_pipeline

from latentdiff import ImageToImagePipeline, InpaintPipeline
from latentdiff.interchange.png import picture_bytes, settings_of
from latentdiff.pipelines.commands.remote import form_of
from latentdiff.pipelines.server.jobs import Failed, Finished, Job
from latentdiff.pipelines.server.model import ServedModel
from latentdiff.pipelines.server.service import Service
from latentdiff.pipelines.server.shelf import Shelf


def asked(url: str, body: Any) -> tuple[threading.Thread, list[Any]]:
    """A request on its way, and where its answer will be."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(ask(url, body)), daemon=True)
    thread.start()
    return thread, found


def asked_to_edit(
    url: str, pictures: dict[str, Image.Image], fields: dict[str, str]
) -> tuple[threading.Thread, list[Any]]:
    files = {name: (f"{name}.png", picture_bytes(one)) for name, one in pictures.items()}
    body, kind = form_of(fields, files)
    found: list[Any] = []
    thread = threading.Thread(
        target=lambda: found.append(ask(f"{url}/v1/images/edits", body, content_type=kind)), daemon=True
    )
    thread.start()
    return thread, found


def test_requests_that_wait_are_drawn_together_and_tell_nothing_of_each_other(served: Any) -> None:
    held = hold(served.service)
    prompts = ["a red cup", "a blue cup", "a green cup"]
    asking = [asked(served.url + DRAW, {"prompt": one, "seed": i}) for i, one in enumerate(prompts)]
    until(lambda: len(served.service.queue) == 3)
    held.let_go.set()
    for thread, _ in asking:
        thread.join(120)
    for (_, found), prompt in zip(asking, prompts, strict=True):
        entry = json.loads(found[0][1])["data"][0]
        content = base64.b64decode(entry["b64_json"])
        assert (settings_of(Image.open(io.BytesIO(content))) or {})["prompts"] == [prompt]
        assert sum(one.encode() in content for one in prompts) == 1
    metrics = ask(served.url + "/metrics")[1].decode()
    assert "latentdiff_batch_pictures_sum 4.0" in metrics
    assert "latentdiff_batch_pictures_count 2.0" in metrics
    assert 'latentdiff_requests_total{path="/v1/images/generations",status="200"} 3.0' in metrics


def test_edits_that_wait_are_drawn_together(served: Any, drawer: Any) -> None:
    """Each from its own picture, and within its own mask, as when drawn alone."""
    held = hold(served.service)
    noise = np.random.default_rng(1).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    images, masks = [Image.fromarray(one) for one in noise], [Image.new("L", (16, 16)) for _ in noise]
    masks[0].paste(255, (8, 0, 16, 16))
    masks[1].paste(255, (0, 0, 16, 8))
    found: list[Any] = []
    for files in [{"image": one} for one in images] + [{"image": images[i], "mask": masks[i]} for i in range(2)]:
        found.append(asked_to_edit(served.url, files, {"prompt": "a cup", "seed": str(len(found) % 2)}))
    until(lambda: len(served.service.queue) == 4)
    held.let_go.set()
    for thread, _ in found:
        thread.join(120)
    pictures = [answered(one) for _, one in found]
    redraw, inpaint = ImageToImagePipeline.from_pipe(drawer), InpaintPipeline.from_pipe(drawer)
    for i in range(2):
        alone = redraw("a cup", image=images[i], seed=i).images[0]
        assert near(pictures[i], alone)
        within = inpaint("a cup", image=images[i], mask_image=masks[i], seed=i, strength=1.0).images[0]
        assert near(pictures[2 + i], within)
    assert not near(pictures[0], pictures[1])
    assert "latentdiff_batch_pictures_count 3.0" in ask(served.url + "/metrics")[1].decode()


def test_several_models(drawer: Any) -> None:
    """The first draws what names none; requests for different ones are not mixed."""
    other = tiny_pipeline(layers_per_block=2)
    loaders = {name: partial(ServedModel, name, one, lambda: DIGEST, {}) for name, one in (("a", drawer), ("b", other))}
    service = Service(Shelf(loaders, kept=1), LIMITS)
    with serving(service) as served:
        assert [one["id"] for one in json.loads(ask(served.url + "/v1/models")[1])["data"]] == ["a", "b"]
        assert json.loads(ask(served.url + "/v1/models/b")[1])["steps"] == 2
        held = hold(service)
        asking = [asked(served.url + DRAW, {"prompt": "a cup", "seed": 1, **more}) for more in ({}, {"model": "b"})]
        until(lambda: len(service.queue) == 2)
        held.let_go.set()
        for thread, _ in asking:
            thread.join(120)
        for (_, found), pipeline, name in zip(asking, (drawer, other), "ab", strict=True):
            picture = answered(found)
            assert near(picture, pipeline("a cup", seed=1).images[0])
            assert (settings_of(picture) or {})["model"] == name
        status, message, _ = ask(served.url + DRAW, {"prompt": "a cup", "model": "c"})
        assert (status, message) == (404, "there is no model 'c' here; there is 'a' or 'b'")


def test_a_full_queue_says_when_to_come_again(served: Any) -> None:
    held = hold(served.service)
    waiting = [asked(served.url + DRAW, {"prompt": "a cup"}) for _ in range(4)]
    until(lambda: len(served.service.queue) == 4)
    status, message, headers = ask(served.url + DRAW, {"prompt": "a cup"})
    assert (status, int(headers["Retry-After"]) >= 1) == (429, True)
    assert "too many requests are waiting" in message
    held.let_go.set()
    for thread, found in waiting:
        thread.join(120)
        assert found[0][0] == 200


def test_who_hangs_up_is_not_drawn_for(served: Any) -> None:
    held = hold(served.service)
    connection = http.client.HTTPConnection(served.url.removeprefix("http://"))
    connection.request("POST", DRAW, json.dumps({"prompt": "a cup", "n": 3}))
    until(lambda: len(served.service.queue) == 3)
    job = served.service.queue._waiting[0]
    connection.close()
    until(lambda: job.unwanted)
    held.let_go.set()
    assert ask(served.url + DRAW, {"prompt": "a cup"})[0] == 200
    assert "latentdiff_pictures_total 1.0" in ask(served.url + "/metrics")[1].decode()


def test_a_drawing_that_nobody_wants_any_more_stops(service: Service) -> None:
    held = hold(service, num_inference_steps=50)
    held.job.cancel()
    held.let_go.set()
    until(lambda: len(service.queue) == 0)
    service.queue.close()
    assert not any(isinstance(event, Finished) for event in held.heard)


def test_a_request_that_takes_too_long_ends(drawer: Any) -> None:
    service = made(drawer, timeout=0.3)
    with serving(service) as served:
        held = hold(service)
        status, message, _ = ask(served.url + DRAW, {"prompt": "a cup"})
        assert (status, "not finished within 0.3 s" in message) == (504, True)
        found = ask(served.url + DRAW, {"prompt": "a cup", "stream": True})
        assert (found[0], b"event: error" in found[1]) == (200, True)
        held.let_go.set()


def test_a_request_that_cannot_be_drawn_spoils_no_other(service: Service) -> None:
    held = hold(service)
    heard: dict[str, list[Any]] = {"a cup": [], "\ud800": []}
    for prompt, events in heard.items():
        settings = service.shelf.get().settings({}, held.job.inputs, {})
        service.queue.submit(Job("TextToImagePipeline", settings, prompt, [0], events.append))
    held.let_go.set()
    service.queue.close()
    good, bad = heard.values()
    assert [type(event) for event in good] == [Finished]
    assert [type(event) for event in bad] == [Failed]


def test_a_stopping_server_finishes_what_it_took(service: Service) -> None:
    with serving(service) as served:
        held = hold(service)
        thread, found = asked(served.url + DRAW, {"prompt": "a cup"})
        until(lambda: len(service.queue) == 1)
        served.server.should_exit = True
        held.let_go.set()
        thread.join(120)
        assert found[0][0] == 200


@pytest.mark.parametrize(("grace", "asked_again"), [(0.2, 0), (120.0, 1)])
def test_a_stopping_server_tells_what_it_cannot_finish(
    service: Service,
    grace: float,
    asked_again: int,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with serving(service, grace=grace) as served:
        held = hold(service, num_inference_steps=50)
        half = http.client.HTTPConnection(served.url.removeprefix("http://"))
        half.putrequest("POST", DRAW)
        half.putheader("Content-Length", "100")
        half.endheaders(b"{")
        asking = [asked(served.url + DRAW, {"prompt": "a cup", "stream": stream}) for stream in (False, True)]
        until(lambda: len(service.queue) == 2)
        served.server.handle_exit(signal.SIGINT, None)
        for _ in range(asked_again):
            served.server.handle_exit(signal.SIGINT, None)
        for thread, _ in asking:
            thread.join(120)
        words = "the server is stopping"
        (status, message, _), (_, events, _) = (found[0] for _, found in asking)
        assert (status, words in message) == (503, True)
        assert words in events.decode()
        answer = half.getresponse()
        assert (answer.status, words in answer.read().decode()) == (503, True)
        held.let_go.set()
    assert caplog.text == ""
    if not asked_again:
        assert capsys.readouterr().out == "stopping; 3 drawings have 0.2 s; Ctrl-C again ends them\n"


def test_who_may_ask(service: Service) -> None:
    with serving(service, key="secret", hosts=("127.0.0.1",)) as served:
        models = served.url + "/v1/models"
        assert ask(models)[0] == 401
        assert ask(models, authorization="Bearer wrong")[0] == 401
        assert ask(models, authorization="Bearer secret")[0] == 200
        assert ask(models, authorization="Bearer secret", host="evil.example")[0] == 403
        assert ask(models, authorization="Bearer secret", origin="http://evil.example")[0] == 403
        assert ask(models, authorization="Bearer secret", origin=served.url)[0] == 200
        assert ask(served.url + "/health")[0] == 200
        assert ask(served.url + "/metrics")[0] == 401


def test_bodies_are_limited(served: Any) -> None:
    large = b'{"prompt": "' + b"a" * 2**16 + b'"}'
    assert ask(served.url + DRAW, large)[:2] == (413, "the request is larger than 0.0625 MiB, which is the most")
    chunks = iter([b"a" * 2**13] * 9)
    connection = http.client.HTTPConnection(served.url.removeprefix("http://"))
    connection.request("POST", DRAW, chunks, encode_chunked=True)
    assert connection.getresponse().status == 413


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"[]", "a JSON object is expected, not a list"),
        (b"\xff", "not JSON .it is not encoded in UTF-8"),
        (b'{"prompt": ["a"]}', r"prompt: text is expected \(got \['a'\]\)"),
        (b'{"prompt": "a", "seed": 9223372036854775807, "n": 2}', "too large"),
        (b'{"prompt": "a", "steps": "many"}', r"steps: a whole number is expected \(got 'many'\)"),
        (b'{"prompt": "a", "size": "0x16"}', "0x16 cannot be drawn: both sides must be multiples of 2"),
        (b'{"n": 1}', "^prompt: it is missing$"),
        (
            b'{"prompt": "a", "seed": 1%s}' % (b"0" * 400),
            r"^seed: it must be less than 9\d{18} \(got 1.{,50}\)$",
        ),
        (b'{"prompt": "a", "steps": 1%s}' % (b"0" * 400), "^steps: .{,50} steps are more than this server gives, 50$"),
        (b'{"prompt": "a", "guidance_scale": NaN}', r"^guidance_scale: a finite number is expected \(got nan\)$"),
        (b'{"prompt": "a", "stream": "so"}', r"^stream: true or false is expected \(got 'so'\)$"),
        (b'{"prompt": "\\ud800"}', "^prompt: it has characters that are no text"),
        (b'{"prompt": "a", "%s": 1}' % (b"x" * 9000), r"^unknown field 'xx.{,1000}$"),
        (b"[" * 60000, "not JSON that can be read .it is nested too deeply"),
    ],
)
def test_bodies_that_are_none(served: Any, body: bytes, words: str) -> None:
    status, message, _ = ask(served.url + DRAW, body)
    assert status == 400
    assert re.search(words, message)


def test_forms_that_are_none(served: Any) -> None:
    edits = served.url + "/v1/images/edits"
    assert ask(edits, {"prompt": "a"})[:2] == (
        400,
        "send a form (multipart/form-data) with image, prompt and, if you like, mask",
    )
    form = b'--x\r\ncontent-disposition: form-data; name="prompt"\r\n\r\na\r\n--x--\r\n'
    kind = "multipart/form-data; boundary=x"
    assert ask(edits, form, content_type=kind)[:2] == (400, "image is missing; send the picture to start from")
    assert ask(edits, b"--y", content_type="multipart/form-data")[0] == 400
