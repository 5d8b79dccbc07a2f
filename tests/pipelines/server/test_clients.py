"""OpenAI's own client library draws at our server."""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from latentdiff import ImageToImagePipeline, InpaintPipeline
from latentdiff.interchange.png import settings_of

openai = pytest.importorskip("openai")
COLOURS = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)


@pytest.fixture
def client(served: Any) -> Any:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0) as made:
        yield made


def opened(entry: Any) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(entry.b64_json)))


def near(found: Image.Image, wanted: Image.Image) -> bool:
    """But for last bits, which depend on the batch."""
    return bool(np.abs(np.asarray(found).astype(int) - np.asarray(wanted)).max() <= 1)


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def test_pictures_of_words(client: Any, drawer: Any) -> None:
    ours = {"seed": 3, "steps": 4, "guidance_scale": 2.0, "negative_prompt": "blue"}
    found = client.images.generate(prompt="a red cup", model="tiny", n=2, size="24x16", extra_body=ours)
    call = {"num_inference_steps": 4, "guidance_scale": 2.0, "negative_prompt": "blue", "height": 16, "width": 24}
    wanted = drawer(["a red cup"] * 2, seed=3, **call).images
    assert [entry.seed for entry in found.data] == [3, 4]
    for entry, image in zip(found.data, wanted, strict=True):
        assert near(opened(entry), image)
    assert found.size == "24x16"
    record = settings_of(opened(found.data[1])) or {}
    assert (record["prompts"], record["seed"], record["num_inference_steps"]) == (["a red cup"], 4, 4)
    assert (record["negative_prompt"], record["model"]) == ("blue", "tiny")


def test_what_other_clients_send_is_taken(client: Any) -> None:
    usual = {"quality": "high", "style": "vivid", "user": "me", "moderation": "low", "background": "auto"}
    found = client.images.generate(prompt="a cup", size="auto", response_format="url", **usual)
    assert found.data[0].url.startswith("data:image/png;base64,")
    found = client.images.generate(prompt="a cup", output_format="jpeg", output_compression=70)
    assert opened(found.data[0]).format == "JPEG"


def test_previews_come_before_pictures(client: Any, drawer: Any) -> None:
    more = {"seed": 1, "steps": 5, "n": 2}
    events = list(client.images.generate(prompt="a cup", stream=True, partial_images=2, extra_body=more))
    kinds = [event.type.removeprefix("image_generation.") for event in events]
    assert kinds == ["partial_image"] * 4 + ["completed"] * 2
    assert [event.partial_image_index for event in events[:4]] == [0, 0, 1, 1]
    assert opened(events[0]).size == (8, 8)
    for event, seed in zip(events[4:], (1, 2), strict=True):
        wanted = drawer("a cup", seed=seed, num_inference_steps=5).images[0]
        assert near(opened(event), wanted)


@pytest.mark.parametrize("kind", ["L", "RGBA", "theirs"])
def test_painting_within_a_mask(client: Any, drawer: Any, kind: str) -> None:
    """Masks are white where to paint, or, as OpenAI's, transparent; an opaque one with opacity is white there too."""
    image, mask = Image.fromarray(COLOURS), Image.new("L", (16, 16))
    mask.paste(255, (8, 0, 16, 16))
    sent = mask if kind == "theirs" else mask.convert(kind)
    if kind == "theirs":
        sent = image.copy()
        sent.putalpha(mask.point(lambda level: 255 - level))
    files = {"image": ("photo.png", png(image)), "mask": png(sent)}
    found = client.images.edit(prompt="a cup", **files, extra_body={"seed": 2, "steps": 4})
    call = {"num_inference_steps": 4, "seed": 2, "strength": 1.0}
    wanted = InpaintPipeline.from_pipe(drawer)("a cup", image=image, mask_image=mask, **call).images[0]
    assert (np.asarray(opened(found.data[0])) == np.asarray(wanted)).all()
    record = settings_of(opened(found.data[0])) or {}
    assert record["image"]["file"] == "photo.png"


def test_redrawing_a_picture(client: Any, drawer: Any) -> None:
    image = Image.fromarray(COLOURS)
    ours = {"seed": 2, "steps": 5, "strength": 0.6}
    events = list(client.images.edit(prompt="a cup", image=png(image), stream=True, partial_images=1, extra_body=ours))
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]
    redraw = ImageToImagePipeline.from_pipe(drawer)
    wanted = redraw("a cup", image=image, num_inference_steps=5, seed=2, strength=0.6).images[0]
    assert (np.asarray(opened(events[-1])) == np.asarray(wanted)).all()


def test_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").steps == 2
    with pytest.raises(openai.NotFoundError, match="there is no model 'dall-e-2' here"):
        client.images.generate(prompt="a cup", model="dall-e-2")


def test_errors_name_what_to_change(client: Any, tmp_path: Path) -> None:
    def refused(param: str | None, words: str, **body: Any) -> None:
        with pytest.raises(openai.BadRequestError, match=words) as found:
            client.images.generate(**{"prompt": "a cup", **body})
        assert found.value.param == param

    refused("prompt", "the prompt is empty", prompt=" ")
    refused("prompt", "101 characters are more than this server gives, 100", prompt="a" * 101)
    refused("n", "11 pictures are more", n=11)
    refused("size", "neither auto nor such as 128x128", size="large")
    sizes = "both sides must be multiples of 2, and width times height at most 1024, such as 16x16"
    for size in ("64x64", "17x16", "0x0", "2x0", "99999x99999"):
        refused("size", f"size: {size} cannot be drawn: {sizes}", size=size)
    refused("steps", "51 steps are more", extra_body={"steps": 51})
    refused(None, "unknown field 'guidance'; did you mean guidance_scale", extra_body={"guidance": 3})
    refused("seed", r"seed: it must be at least 0 \(got -1\)", extra_body={"seed": -1})
    refused("background", "'auto' or 'opaque' is expected", background="transparent")
    refused("strength", "/v1/images/edits", extra_body={"strength": 0.5})
    with pytest.raises(openai.BadRequestError, match="image is not a picture of a known format"):
        client.images.edit(prompt="a", image=b"no picture")
    with pytest.raises(openai.BadRequestError, match="image has 16 x 16 pixels and mask has 8 x 8"):
        client.images.edit(prompt="a", image=png(Image.fromarray(COLOURS)), mask=png(Image.new("L", (8, 8))))


def test_what_is_to_be_said_of_a_drawing_comes_with_it(client: Any, drawer: Any) -> None:
    """Each request hears it, however often it was said before, and nobody what is said of another's prompt."""
    long = "a red cup " * 9
    for _ in range(2):
        found = client.images.generate(prompt=long, size="32x16", extra_body={"seed": 1})
        size, cut = found.warnings
        assert "Drawing 32 x 16 pixels (width x height) with a model that was trained on 16 x 16" in size
        assert cut.startswith("The prompt is longer than the ")
        assert cut.endswith("this is left out: " + " ".join(long.split()[10:]))
    events = list(client.images.generate(prompt="a cup", size="32x16", stream=True, partial_images=1))
    assert [len(event.warnings) for event in events] == [1, 1]
    assert client.images.generate(prompt="a cup").warnings == []
