"""Changed copies of good files, drawn by hypothesis: other values, other tensors, other bytes."""

import contextlib
import io
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import load, save

ODD = [
    "",
    " ",
    ".",
    "..",
    "../x",
    "/etc/passwd",
    "\0",
    "\x1b[31m",
    "é\u0301",
    "a" * 5000,
    "linear",
    "nan",
    "-1",
    "None",
]
NUMBERS = [0, -1, 1, 2, 3, 7, 8, 64, 10**6, 10**9, 2**31, 2**63, 10**30, 0.5, 1e308, float("inf"), float("nan")]
SCALARS = st.one_of(
    st.none(), st.booleans(), st.sampled_from(NUMBERS), st.sampled_from(ODD), st.text(max_size=8), st.integers()
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
)
CHUNKS = [b"", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"9" * 5000, b"[" * 20_000, b'{"a":' * 20_000, b"\x80", b"&a [*a]"]


def changed_bytes(draw: Any, content: bytes) -> bytes:
    """Cut, overwritten, doubled or with something put in."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, max(0, len(content) - 1)))
        end = min(len(content), start + draw(st.sampled_from([0, 1, 4, 100])))
        how = draw(st.sampled_from(["cut", "replace", "replace", "double"]))
        if how == "cut":
            content = content[:start]
        elif how == "double":
            content = content[:end] + content[start:]
        else:
            content = content[:start] + draw(st.sampled_from(CHUNKS) | st.binary(max_size=8)) + content[end:]
    return content


def changed_json(draw: Any, value: Any) -> Any:
    """One place in nested lists and dictionaries replaced, removed, renamed or added."""
    if isinstance(value, dict) and value and draw(st.integers(0, 5)):
        key = draw(st.sampled_from(sorted(value)))
        how = draw(st.sampled_from(["into", "into", "into", "replace", "remove", "rename", "add"]))
        rest = {name: one for name, one in value.items() if name != key}
        if how == "into":
            return value | {key: changed_json(draw, value[key])}
        if how == "replace":
            return value | {key: draw(VALUES)}
        if how == "add":
            return value | {draw(st.text(max_size=6)): draw(VALUES)}
        return rest if how == "remove" else rest | {draw(st.sampled_from(ODD) | st.text(max_size=6)): value[key]}
    if isinstance(value, list) and value and draw(st.booleans()):
        at = draw(st.integers(0, len(value) - 1))
        return [*value[:at], changed_json(draw, value[at]), *value[at + 1 :]]
    return draw(VALUES)


def changed_text(draw: Any, content: bytes) -> bytes:
    """JSON with other values, or any other text with other bytes."""
    if draw(st.booleans()):
        with contextlib.suppress(ValueError):
            return json.dumps(changed_json(draw, json.loads(content))).encode()
    return changed_bytes(draw, content)


def changed_tensors(draw: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    tensors = dict(tensors)
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(tensors) or ["a"]))
        old = tensors.pop(name, torch.zeros(1))
        how = draw(st.sampled_from(["remove", "rename", "shape", "type", "values", "transpose"]))
        if how == "rename":
            tensors[draw(st.sampled_from(ODD[:9])) + name] = old
        elif how == "shape":
            tensors[name] = torch.ones(draw(st.lists(st.sampled_from([0, 1, 2, 3, 16, 64]), max_size=4)))
        elif how == "type":
            kinds = [torch.int8, torch.int64, torch.bool, torch.bfloat16, torch.float64, torch.float8_e4m3fn]
            tensors[name] = old.to(draw(st.sampled_from(kinds)))
        elif how == "values":
            tensors[name] = torch.full(old.shape, draw(st.sampled_from([float("nan"), float("inf"), 1e30])))
        elif how == "transpose":
            tensors[name] = old.movedim(0, -1).contiguous() if old.ndim else old.reshape(1)
    return tensors


def changed_weights(draw: Any, content: bytes) -> bytes:
    """A safetensors file with other tensors, another header, or other bytes."""
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    how = draw(st.sampled_from(["tensors", "tensors", "header", "metadata", "bytes"]))
    if how == "tensors":
        return save(changed_tensors(draw, load(content)), header.get("__metadata__"))
    if how == "bytes":
        return changed_bytes(draw, content)
    if how == "header":
        header = changed_json(draw, header)
    else:
        said = dict(header.get("__metadata__") or {"modelspec.prediction_type": "v"})
        key = draw(st.sampled_from([*sorted(said), "modelspec.resolution", "lora_adapter_metadata", "latentdiff"]))
        said[key] = changed_text(draw, said.get(key, "{}").encode()).decode(errors="replace")
        header["__metadata__"] = said
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def changed_pickle(draw: Any, content: bytes) -> bytes:
    if draw(st.booleans()):
        return changed_bytes(draw, content)
    saved = torch.load(io.BytesIO(content), weights_only=True)
    leaves = st.one_of(SCALARS, st.builds(torch.zeros, st.sampled_from([(1,), (2, 16), (0,), ()])))
    state = saved.get("state_dict", saved)
    key = draw(st.sampled_from(sorted(map(str, state))))
    old = state.get(key)
    if isinstance(old, torch.Tensor) and old.ndim and draw(st.booleans()):
        state[key] = draw(st.sampled_from([old.movedim(0, -1), old[:1], old.to_sparse(), old.half()]))
    else:
        state[key] = draw(st.recursive(leaves, lambda inner: st.dictionaries(st.text(max_size=4), inner, max_size=3)))
    saved = draw(st.sampled_from([saved, state, {"state_dict": saved}, [saved], {**saved, "global_step": "x"}]))
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    return buffer.getvalue()


CHANGES: dict[str, Callable[[Any, bytes], bytes]] = {".safetensors": changed_weights}
CHANGES |= dict.fromkeys((".ckpt", ".pt"), changed_pickle) | dict.fromkeys((".json", ".jsonl"), changed_text)


def change(draw: Any, source: Path, target: Path) -> Path:
    """Put a changed copy of a file at `target`, or something that is no file."""
    with contextlib.suppress(FileNotFoundError):
        target.unlink()
    how = draw(st.sampled_from(["change"] * 20 + ["pipe", "device", "loop", "folder", "sparse", "empty", "nothing"]))
    if how == "pipe":
        os.mkfifo(target)
    elif how in ("device", "loop"):
        target.symlink_to("/dev/zero" if how == "device" else target)
    elif how == "folder":
        target.mkdir()
    elif how in ("sparse", "empty"):
        with target.open("wb") as stream:
            stream.truncate(2**40 if how == "sparse" else 0)
    elif how == "change":
        target.write_bytes(CHANGES.get(source.suffix, changed_bytes)(draw, source.read_bytes()))
    return target
