"""Folders of damaged and hostile pictures, rows and captions, with what in them is good and what is not."""

import io
import json
import os
import random
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms

Named = Iterator[tuple[str, bytes]]


def noise(seed: int, width: int = 48, height: int = 40, mode: str = "RGB") -> Image.Image:
    """A picture that does not compress, so that a cut file lacks pixels."""
    channels = len(Image.new(mode, (1, 1)).getbands())
    array = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.frombytes(mode, (width, height), array.tobytes())


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(width: int, height: int, colour: int, depth: int, data: bytes, *more: tuple[bytes, bytes]) -> bytes:
    """A PNG of these parts, whether they fit or not."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), *more, (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    whole = (struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d)) for kind, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(whole)


def deep_png(colour: int, channels: int) -> bytes:
    """Sixteen bits a channel, 24 x 20: 5000 above, 60000 below."""
    values = np.full((20, 24 * channels), 60000, dtype=">u2")
    values[:10] = 5000
    return png(24, 20, colour, 16, b"".join(b"\0" + row.tobytes() for row in values))


def unusual() -> Named:
    """Pictures that must be taken, though many a loader stumbles over them."""
    for mode in ("1", "L", "LA", "P", "RGBA", "I;16"):
        source = Image.fromarray(np.arange(2400, dtype=np.uint16).reshape(40, 60) * 27) if mode == "I;16" else noise(1)
        yield f"mode-{mode.replace(';', '')}.png", encode(source if mode == "I;16" else source.convert(mode))
    for mode in ("CMYK", "L", "RGB"):
        yield f"mode-{mode}.jpg", encode(noise(2).convert(mode), "JPEG")
    for mode in ("CMYK", "L", "RGBA", "I;16", "F"):
        deep = {"I;16": np.uint16, "F": np.float32}.get(mode)
        source = noise(3).convert("L" if deep else mode)
        image = Image.fromarray(np.asarray(source).astype(deep)) if deep else source
        yield f"mode-{mode.replace(';', '')}.tif", encode(image, "TIFF")
    for colour, channels in ((0, 1), (2, 3), (4, 2), (6, 4)):
        yield f"deep-{colour}.png", deep_png(colour, channels)
    yield "transparent-palette.png", encode(noise(4).convert("P"), transparency=3)
    yield "transparent-colour.png", encode(noise(5), transparency=(1, 2, 3))
    for turn in range(10):  # 0 and 9 are not orientations
        exif = Image.Exif()
        exif[0x0112] = turn
        yield f"turned-{turn}.jpg", encode(noise(10 + turn), "JPEG", exif=exif)
    yield "broken-exif.jpg", encode(noise(20), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage")
    yield "broken-profile.jpg", encode(noise(21).convert("CMYK"), "JPEG", icc_profile=b"no profile")
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    yield "wrong-profile.jpg", encode(noise(22).convert("CMYK"), "JPEG", icc_profile=profile)
    frames = [noise(30 + i) for i in range(3)]
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        yield f"frames.{kind.lower()}", encode(frames[0], kind, save_all=True, append_images=frames[1:])
    for kind, suffix in (("PNG", "jpg"), ("JPEG", "png"), ("WEBP", "jpg"), ("GIF", "png"), ("BMP", "webp")):
        yield f"really-{kind.lower()}.{suffix}", encode(noise(40), kind)
    yield "progressive.jpg", encode(noise(41), "JPEG", progressive=True)
    yield "long.png", encode(noise(42, 8, 600))
    yield "wide.png", encode(noise(43, 600, 8))
    yield "smallest.png", encode(noise(44, 8, 8))
    yield "more-behind.png", encode(noise(45)) + b"trailing bytes" * 50
    odd = (
        "space d",
        "new\nline",
        "per%20cent",
        "quote'\"s",
        "ünïcödé",
        "猫",
        "😀",
        "-dash",
        "semi;colon",
        "back\\slash",
    )
    for i, name in enumerate(
        (*odd, "tab\t", "hash#", "quest?ion", "bell\x07", "esc\x1b[31m", "star*", "{brace}", "$HOME")
    ):
        yield f"{name}.png", encode(noise(50 + i))


def spoilt() -> Named:
    """Files that are no pictures, or not whole, or made to do harm."""
    for kind, suffix in (
        ("PNG", "png"),
        ("JPEG", "jpg"),
        ("WEBP", "webp"),
        ("BMP", "bmp"),
        ("TIFF", "tif"),
        ("GIF", "gif"),
    ):
        content = encode(noise(70), kind)
        for percent in (1, 10, 50, 90):
            yield f"cut-{percent}.{suffix}", content[: len(content) * percent // 100]
    for i, position in enumerate((0.2, 0.5, 0.8)):
        content = bytearray(encode(noise(71)))
        content[int(len(content) * position)] ^= 0xFF
        yield f"flipped-{i}.png", bytes(content)
    for suffix in ("png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff"):
        yield f"empty.{suffix}", b""
    for i, length in enumerate((1, 8, 100, 5000)):
        yield f"random-{i}.png", random.Random(i).randbytes(length)
    texts = {
        "html": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="64" height="64"><rect/></svg>',
        "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n",
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n(evil) run\nshowpage\n%%EOF\n",
        "pdf": b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n",
        "zip": b"PK\x03\x04" + bytes(100),
        "zeros": bytes(4096),
        "pickle": b"\x80\x04cos\nsystem\n(S'true'\ntR.",
        "xbm": b"#define im_width 64\n#define im_height 64\nstatic char im_bits[] = {0x00};\n",
        "tga": struct.pack("<BBBHHBHHHHBB", 0, 0, 2, 0, 0, 0, 0, 0, 64, 64, 24, 0) + bytes(64 * 64 * 3),
    }
    for name, content in texts.items():
        yield f"no-{name}.png", content
    yield "bomb-header.png", png(60_000, 60_000, 2, 8, b"\0")
    yield "bomb-grey.png", png(20_000, 20_000, 0, 1, bytes(20_000 * 2501))
    yield "bomb-long.png", png(2**31 - 1, 8, 0, 8, b"\0")
    yield "bomb-square.png", png(2**31 - 1, 2**31 - 1, 6, 16, b"\0")
    yield (
        "bomb.gif",
        b"GIF89a" + struct.pack("<HH", 65535, 65535) + b"\0\0\0," + bytes(4) + b"\xff\xff\xff\xff\0\x02\0;",
    )
    yield "bomb.bmp", encode(noise(72), "BMP")[:18] + struct.pack("<ii", 100_000, 100_000) + bytes(200)
    yield "bomb.jpg", _resized_jpeg(65_500, 65_500)
    yield "lies.png", png(64, 64, 2, 8, b"\0")
    yield "nothing.png", png(0, 0, 2, 8, b"")
    yield "text-bomb.png", png(16, 16, 0, 8, bytes(17 * 16), (b"zTXt", b"a\0\0" + zlib.compress(bytes(2**27))))
    for width, height in ((1, 1), (7, 7), (1, 600), (600, 7)):
        yield f"tiny-{width}-{height}.png", encode(noise(73, width, height))
    not_numbers = Image.fromarray(np.full((32, 32), np.nan, dtype=np.float32))
    yield "not-numbers.tif", encode(not_numbers, "TIFF")


def _resized_jpeg(width: int, height: int) -> bytes:
    content = bytearray(encode(noise(74), "JPEG"))
    start = content.index(b"\xff\xc0") + 5
    content[start : start + 4] = struct.pack(">HH", height, width)
    return bytes(content)


def bad_captions() -> list[Any]:
    """Values of a caption column that are no captions."""
    wrong_types = [None, 3, 1.5, True, {}, {"a": "b"}, [], [None], [""], [3], ["a", 3], [["a"]]]
    return [*wrong_types, "", "   ", "\n", "a\0b", ["fine", "a\0b"], "a" * 20_001, "word " * 200_000, "\ud800 alone"]


def bad_names(outside: Path) -> list[Any]:
    """Values of file_name that are no file of the folder. `outside` lies beside it."""
    leaving = [f"../{outside.name}", str(outside), f"sub/../../{outside.name}", f"./sub/.././../{outside.name}"]
    system = ["/etc/passwd", "/dev/zero", "/dev/stdin", "/proc/self/mem", "../../../../../../../../etc/passwd"]
    strange = [
        "",
        ".",
        "..",
        "/",
        "sub",
        "sub/",
        "\0",
        "a\0.png",
        "\ud800.png",
        "x" * 5000,
        "a/" * 3000,
        "*.png",
        "~/x.png",
    ]
    remote = [
        "file:///etc/passwd",
        "http://localhost/x.png",
        "\\\\host\\x.png",
        "C:\\x.png",
        "good-0.png/x",
    ]
    return [*leaving, *system, *strange, *remote, None, 3, True, [], {}, ["good-0.png"], "missing.png", "GOOD-0.PNG"]


BAD_LINES = (
    b"{", b"}", b"null", b"3", b'"good-0.png"', b"[]", b'["good-0.png", "a"]', b"true", b"NaN", b"{]", b"not json",
    b'{"file_name": "good-0.png", "text": "unfinished', b"{'file_name': 'good-0.png'}", b"\xff\xfe\xfd", b"\0\0\0\0",
    b'{"file_name": "good-0.png", "text": "latin \xe9"}', b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000,
    b'{"text": "no name"}', b"{}", b'{"file_name": "good-0.png"} {"file_name": "good-1.png"}',
)  # fmt: skip
BAD_WEIGHTS = (-1, "much", [], {}, True, float("nan"), float("inf"), -0.5, 10**400)


def row(name: Any, text: Any = "a picture", **more: Any) -> bytes:
    """A line of ``metadata.jsonl``."""
    return json.dumps({"file_name": name, "text": text, **more}).encode()


def hostile_folder(parent: Path) -> tuple[Path, list[str], list[str]]:
    """A folder with ``metadata.jsonl`` and more than 200 damaged or hostile inputs among some good pictures.

    Returns:
        The folder, the names of the pictures in it that can be used, and for each input that cannot, what its message
        begins with: the file's name, or "metadata.jsonl, line 7". Both are relative to the folder.
    """
    folder, outside = parent / "hostile", parent / "outside.png"
    (folder / "sub").mkdir(parents=True)
    outside.write_bytes(encode(noise(99)))
    lines: list[bytes] = []
    good: list[str] = []
    bad: list[str] = []

    def add_good(name: str, content: bytes, text: Any) -> None:
        (folder / name).write_bytes(content)
        lines.append(row(name, text))
        good.append(name)

    def add_bad(line: bytes) -> None:
        lines.append(line)
        bad.append(f"metadata.jsonl, line {len(lines)}")

    for i in range(20):
        add_good(f"good-{i}.png", encode(noise(100 + i)), [f"number {i}", "ein Bild, 一張圖"])
    for name, content in unusual():
        add_good(name, content, "line one\nline two\u2028 word" * 3)
    for name, content in spoilt():
        (folder / name).write_bytes(content)
        lines.append(row(name))
        bad.append(name)
    for line in [*BAD_LINES, *map(row, [*bad_names(outside), *_make_traps(folder, outside)])]:
        add_bad(line)
    wrong = [{"text": text} for text in bad_captions()] + [{"weight": weight} for weight in BAD_WEIGHTS]
    for i, fields in enumerate(wrong):
        (folder / f"wrong-{i}.png").write_bytes(encode(noise(200 + i)))
        add_bad(row(f"wrong-{i}.png", **fields))
    add_good("last.png", encode(noise(400)), "word " * 500)
    lines += [b"", row("last.png", "the same picture, said otherwise"), b"  "]
    (folder / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines))
    return folder, good, bad


def _make_traps(folder: Path, outside: Path) -> list[str]:
    """Things with a picture's name that are no files, or lie elsewhere."""
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")  # whoever opens it waits for ever
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "loop-a.png").symlink_to("loop-b.png")
    (folder / "loop-b.png").symlink_to("loop-a.png")
    (folder / "dangling.png").symlink_to("nowhere.png")
    (folder / "out.png").symlink_to(outside)
    (folder / "out-folder").symlink_to(outside.parent)
    (folder / "up").symlink_to("..")
    through = [f"{way}/{outside.name}" for way in ("out-folder", "up", "up/up")]
    return ["folder.png", "pipe.png", "loop.png", "loop-a.png", "loop-b.png", "dangling.png", "out.png", *through]


def hostile_beside(parent: Path) -> tuple[Path, list[str], list[str]]:
    """The like with caption files beside the pictures; see `hostile_folder`."""
    folder, outside = parent / "beside", parent / "outside"
    folder.mkdir(parents=True)
    outside.mkdir()
    (outside / "secret.png").write_bytes(encode(noise(99)))
    (outside / "secret.txt").write_text("secret")
    captions: dict[str, bytes] = {
        "plain": b"a picture\n", "marked": b"\xef\xbb\xbfa picture", "utf16": "ein Bild".encode("utf-16"),
        "utf16-big": b"\xfe\xff" + "ein Bild".encode("utf-16-be"), "lines": b"one\r\ntwo\r\n", "cat": "一隻貓".encode(),
    }  # fmt: skip
    wrong: dict[str, bytes] = {
        "latin": b"caf\xe9", "nul": b"a\0b", "wordless": b"", "blank": b" \n\t ", "endless": b"word " * 200_000,
        "utf16-unmarked": "ein Bild".encode("utf-16-le"), "utf16-cut": "ein Bild".encode("utf-16")[:-1],
        "binary": bytes(range(256)),
    }  # fmt: skip
    good, bad = [], []
    for i, (name, text) in enumerate({**captions, **wrong}.items()):
        (folder / f"{name}.png").write_bytes(encode(noise(i)))
        (folder / f"{name}.txt").write_bytes(text)
        (good if name in captions else bad).append(f"{name}.png")
    for name in ("uncaptioned", "pipe", "folder", "linked", "looping", "own"):
        (folder / f"{name}.png").write_bytes(encode(noise(50 + len(bad))))
        bad.append(f"{name}.png")
    os.mkfifo(folder / "pipe.txt")
    (folder / "folder.txt").mkdir()
    (folder / "linked.txt").symlink_to(outside / "secret.txt")
    (folder / "looping.txt").symlink_to("looping.txt")
    (folder / "own.caption").write_text("a caption")
    bad.remove("own.png")
    good.append("own.png")
    for name, content in [*spoilt(), *unusual()]:
        (folder / name).write_bytes(content)
        (folder / name).with_suffix(".txt").write_text("a picture")
    good += [name for name, _ in unusual()]
    bad += [name for name, _ in spoilt()]
    (folder / "stranger.png").symlink_to(outside / "secret.png")
    (folder / "stranger.txt").write_text("a picture")
    (folder / "outside").symlink_to(outside)
    (folder / "trap.png").mkdir()
    os.mkfifo(folder / "waiting.png")
    (folder / "sub").mkdir()
    for name in (".hidden.png", "._resource.png", "sub/deep.png", "sub/deep.txt"):
        (folder / name).write_bytes(b"deep" if name.endswith("txt") else encode(noise(60)))
    return folder, [*good, "sub/deep.png"], [*bad, "stranger.png", "trap.png", "waiting.png"]


def hostile_csv(parent: Path) -> tuple[Path, list[str], list[str]]:
    """The like with ``metadata.csv``; see `hostile_folder`."""
    folder = parent / "table"
    folder.mkdir(parents=True)
    lines: list[tuple[bytes, bool]] = [
        (b"{},a picture", True), (b'{},"with, a comma"', True), (b'{},"said ""so"""', True), (b'"{}",quoted', True),
        (b"{},caf\xe9", False), (b'{},"never closed', False), (b"{},still here", True), (b'{},"closed" badly', False),
        (b'{},a 5" nail', True), (b"{},too,many,fields,by,far", False), (b"{}", False), (b"{},", False),
        (b"{},a\0b", False), (b"{},'single, quotes'", False), (b"{},tab\there", True),
        (b"{}," + b"x" * 200_000, False), (b"{},after", True),
        (b'{},"' + b"y" * 1_000_000 + b'"', False), (b"{},=cmd|' /C calc'!A0", True), (b"{},fine,2.5", True),
        (b"{},bad,heavy", False), ("{},ünïcödé 猫".encode(), True), (b'{},"', False), (b"{},the last", True),
    ]  # fmt: skip
    good, bad, written = [], [], [b"file_name,text,weight"]
    for i, (line, is_good) in enumerate(lines):
        name = f"{i}.png"
        (folder / name).write_bytes(encode(noise(i)))
        written.append(line.replace(b"{}", name.encode()))
        (good.append(name) if is_good else bad.append(f"metadata.csv, line {len(written)}"))
    (folder / "metadata.csv").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(written) + b"\r\n")
    return folder, good, bad


def state(folder: Path) -> dict[str, tuple[Any, ...]]:
    """What the folder holds, to compare with later: kinds, sizes, times of change and contents."""
    found: dict[str, tuple[Any, ...]] = {}
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(parent, name)
            info = path.lstat()
            plain = path.is_file() and not path.is_symlink()
            found[str(path)] = (info.st_mode, info.st_size, info.st_mtime_ns, path.read_bytes() if plain else b"")
    return found
