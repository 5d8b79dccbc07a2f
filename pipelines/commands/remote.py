"""``latentdiff generate --server URL``: a server draws, and this program, without torch, writes what it gives."""

import base64
import json
import math
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, Request, build_opener

import typer

from latentdiff.interchange.atomic import atomic_file
from latentdiff.interchange.user_files import MAX_PICTURE, read_bytes
from latentdiff.pipelines.batch.drawing_options import BATCH, Plain
from latentdiff.terminal import say

SENT = {"negative_prompt", "guidance_scale", "guidance_rescale", "prompt_weights", "strength"}
SENT |= {"denoising_end", "aesthetic_score", "negative_aesthetic_score"}
OTHERWISE = {"num_inference_steps", "height", "width", "image", "mask", "seed", "model"}
"""Options that are sent under other names."""
HERE = {"output", "separate", "overwrite"}
"""Options that are this program's own."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
TRIES = 5
"""How often a server is asked that says that it has too much to do."""


def draw_at(
    server: str,
    prompts: Sequence[str],
    count: int,
    options: Sequence[Plain],
    files: Sequence[Path],
    model: str | None = None,
) -> None:
    """Let a server draw `count` pictures of each prompt, and write them.

    Args:
        options: the command's.
        files: one for each picture, or one for all.
        model: of the server's; None: its first.

    Raises:
        OSError: no server answers.
        ValueError: an option that servers do not have, or what the server says.
    """
    started = time.perf_counter()
    if not prompts:
        raise typer.BadParameter('say what to draw, for instance "a red car"', param_hint="PROMPT")
    given = {
        name: value for group in options for name, value in group if value != type(group).model_fields[name].default
    }
    for name in sorted(given.keys() - SENT - OTHERWISE - HERE):
        flag = {"lora": "--lora", "classes": "--class", "reranker": "--clip"}.get(name, f"--{name.replace('_', '-')}")
        raise ValueError(f"{flag}: a server draws as it was started, and does not take this option; leave it out")
    seed = int.from_bytes(os.urandom(4)) if given.get("seed") is None else given["seed"]
    body = body_of(given) | ({} if model is None else {"model": model})
    asked = [
        {**body, "prompt": prompt, "seed": seed + i * count + first, "n": min(BATCH, count - first)}
        for i, prompt in enumerate(prompts)
        for first in range(0, count, BATCH)
    ]
    pictures: dict[str, tuple[str, bytes]] = {
        name: (given[name].name, read_bytes(given[name], MAX_PICTURE)) for name in ("image", "mask") if name in given
    }
    address = address_of(server)
    with ThreadPoolExecutor(min(BATCH, len(asked))) as pool:
        answers = list(pool.map(lambda one: ask(address, one, pictures), asked))
    contents = [base64.b64decode(entry["b64_json"]) for answer in answers for entry in answer["data"]]
    write(contents, files, columns=count if len(prompts) > 1 and count > 1 else math.isqrt(len(contents) - 1) + 1)
    names = str(files[0]) if len(files) == 1 else f"{files[0]} to {files[-1]}"
    seeds = f"seed {seed}" if len(contents) == 1 else f"seeds {seed} to {seed + len(contents) - 1}"
    say(f"{names}: {seeds}, {time.perf_counter() - started:.1f} s")
    for warning in dict.fromkeys(one for answer in answers for one in answer.get("warnings", [])):
        say(warning, err=True)
    report([entry for answer in answers for entry in answer["data"]])


def body_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a request. Raises ValueError for half a size."""
    body = {name: given[name] for name in sorted(SENT & given.keys())}
    if "num_inference_steps" in given:
        body["steps"] = given["num_inference_steps"]
    if ("width" in given) != ("height" in given):
        raise ValueError("--width and --height go together where a server draws")
    if "width" in given:
        body["size"] = f"{given['width']}x{given['height']}"
    return body


def report(entries: Sequence[Mapping[str, Any]]) -> None:
    """Say which pictures are black, and why; exit status 1 if some are spoilt."""
    for i, entry in enumerate(entries, 1):
        if entry.get("withheld"):
            say(f"picture {i}: withheld by the model's safety checker; it is black", err=True)
        if entry.get("not_finite"):
            say(f"picture {i}: it is black, for a network gave values that are not finite", err=True)
    if any(entry.get("not_finite") for entry in entries):
        raise typer.Exit(1)


def write(contents: Sequence[bytes], files: Sequence[Path], columns: int) -> None:
    """PNGs as they came, each into its file; or all as one grid, with a record of all."""
    if any(not content.startswith(b"\x89PNG") for content in contents):
        raise ValueError("the server gave something that is no PNG; is it one of latentdiff's?")
    if len(files) == len(contents):
        for file, content in zip(files, contents, strict=True):
            with atomic_file(file) as partial:
                partial.write_bytes(content)
        return
    from latentdiff.interchange.picture_files import picture_of
    from latentdiff.interchange.png import image_grid, save_picture, settings_of
    from latentdiff.pipelines.batch.record import Batch, Drawn, Record, record_of

    images = [picture_of(content, "what the server gave")[0] for content in contents]
    records = [Record.model_validate(settings_of(image)) for image in images]
    batches: list[Batch] = []
    drawn = []
    for i, record in enumerate(records):
        if record.batches[0] not in batches:
            batches.append(record.batches[0])
        place = (batches.index(record.batches[0]), record.pictures[0][1])
        drawn.append(Drawn(images[i], place, withheld=bool(record.withheld)))
    whole = record_of(records[0], batches, drawn, records[0].machine, columns=columns)
    save_picture(image_grid(images, columns), files[0], whole.dump())


def address_of(server: str) -> str:
    """Raises ValueError for what is no address of a web server."""
    parts = urlsplit(server if "//" in server else f"http://{server}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"--server {server} is no address such as http://127.0.0.1:8000")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/v1')}/v1"


def ask(address: str, body: Mapping[str, Any], pictures: Mapping[str, tuple[str, bytes]]) -> dict[str, Any]:
    """What the server answers; while it has too much to do, it is asked again.

    Raises:
        OSError: it does not answer.
        ValueError: it refuses, in its words.
    """
    content, kind = form_of(body, pictures) if pictures else (json.dumps(body).encode(), "application/json")
    headers = {"Content-Type": kind}
    if key := os.environ.get("LATENTDIFF_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    url = f"{address}/images/{'edits' if pictures else 'generations'}"
    opener = build_opener(ProxyHandler({}) if urlsplit(url).hostname in LOOPBACK else ProxyHandler())
    for left in reversed(range(TRIES)):
        try:
            with opener.open(Request(url, content, headers)) as answer:
                return json.load(answer)
        except HTTPError as error:
            if error.code == 429 and left:
                time.sleep(min(float(error.headers.get("Retry-After") or 1), 30.0))
                continue
            raise ValueError(f"{address}: {words_of(error)}") from None
        except URLError as error:
            raise OSError(f"no server answers at {address} ({error.reason}); start one: latentdiff serve") from None
    raise AssertionError("unreachable")


def words_of(error: HTTPError) -> str:
    """What a server says of its refusal."""
    try:
        said = json.loads(error.read())["error"]["message"]
    except (ValueError, LookupError, TypeError, OSError):
        return f"the server answered {error.code} {error.reason}"
    return f"{said}; the key goes into LATENTDIFF_API_KEY" if error.code == 401 else str(said)


def form_of(body: Mapping[str, Any], pictures: Mapping[str, tuple[str, bytes]]) -> tuple[bytes, str]:
    """A request with pictures as multipart/form-data, and what it is."""
    boundary = secrets.token_hex(16)
    parts = [(f'name="{name}"', str(value).encode()) for name, value in body.items()]
    for name, (file, content) in pictures.items():
        safe = file.encode("ascii", "replace").decode().replace('"', "_")
        parts.append((f'name="{name}"; filename="{safe}"', content))
    lines = [
        f"--{boundary}\r\nContent-Disposition: form-data; {head}\r\n\r\n".encode() + value + b"\r\n"
        for head, value in parts
    ]
    return b"".join([*lines, f"--{boundary}--\r\n".encode()]), f"multipart/form-data; boundary={boundary}"
