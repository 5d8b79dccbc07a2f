"""Picture files that may be anything."""

import hashlib
import os
import struct
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image

from latentdiff.interchange.picture_files import read_picture, to_pictures
from latentdiff.interchange.png import KEY, read_settings


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of nothing that claims a size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(b"\0" * 10)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + body


def test_a_picture_and_its_digest(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    Image.new("RGBA", (3, 2), (255, 0, 0, 9)).save(file)
    image, digest = read_picture(file)
    assert (image.size, image.mode) == ((3, 2), "RGBA")
    assert digest == hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_bomb_of_pixels(tmp_path: Path) -> None:
    file = tmp_path / "bomb.png"
    file.write_bytes(png(100_000, 100_000))
    with pytest.raises(ValueError, match=r"bomb\.png has more pixels than Pillow's limit"):
        read_picture(file)
    assert read_settings(file) is None


def test_a_bomb_of_text(tmp_path: Path) -> None:
    file = tmp_path / "bomb.png"
    text = zlib.compress(b"[" * (2**20 * 80), 9)
    file.write_bytes(png(1, 1, (b"iTXt", KEY.encode() + b"\0\1\0\0\0" + text)))
    assert file.stat().st_size < 2**18
    with pytest.raises(ValueError, match=r"bomb\.png is damaged or was made to do harm: .*[Tt]oo [Ll]arge"):
        read_picture(file)
    assert read_settings(file) is None


def test_settings_that_nest_without_end(tmp_path: Path) -> None:
    file = tmp_path / "deep.png"
    file.write_bytes(png(1, 1, (b"tEXt", KEY.encode() + b"\0" + b"[" * 100_000)))
    assert read_settings(file) is None


def test_what_is_no_picture(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "run.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n")
    for name in ("text.png", "run.png"):
        with pytest.raises(ValueError, match=rf"{name} is not a picture of a known format"):
            read_picture(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_picture(tmp_path / "missing.png")
    with pytest.raises(FileNotFoundError, match="is a folder"):
        read_picture(tmp_path)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.png")
        with pytest.raises(ValueError, match=r"pipe\.png is a pipe or a device, not a regular file"):
            read_picture(tmp_path / "pipe.png")


def test_a_truncated_picture(tmp_path: Path) -> None:
    file = tmp_path / "half.png"
    Image.effect_noise((64, 64), 50).save(file)
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"half\.png is damaged"):
        read_picture(file)


def test_tensors_to_pictures() -> None:
    levels = torch.arange(256, dtype=torch.float32)
    grey = (levels / 127.5 - 1).reshape(1, 1, 16, 16)
    (picture,) = to_pictures(grey)
    assert picture.mode == "L"
    assert list(picture.tobytes()) == list(range(256))
    colours = torch.tensor([[-1.0, 0.0, 1.0], [3.0, -3.0, float("nan")]])[:, :, None, None].expand(2, 3, 2, 4)
    first, second = to_pictures(colours.half())
    assert (first.size, first.mode) == ((4, 2), "RGB")
    assert first.getpixel((3, 1)) == (0, 128, 255)
    assert second.getpixel((0, 0)) == (255, 0, 128)
