"""Encoded pictures to tensors: modes, orientation, transparency, depth, crops."""

import pickle
from pathlib import Path

import hostile
import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from latentdiff.training.data import CaptionedPicture, read_pixels
from latentdiff.training.data.captioned_picture import FileReader, PartReader
from latentdiff.training.data.decode import decode


class Content:
    """Reads what it was given; a class, so that it can be pickled."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def __call__(self) -> bytes:
        return self.content


def of(content: bytes) -> CaptionedPicture:
    return CaptionedPicture("here", Content(content), ("words",))


def test_transparent_is_white() -> None:
    clear = Image.new("RGBA", (40, 20), (255, 0, 0, 0))
    pixels = read_pixels(of(hostile.encode(clear)), 16, 16)
    assert pixels.shape == (3, 16, 16)
    assert pixels.dtype == torch.float32
    assert (pixels == 1).all()
    palette = Image.new("P", (16, 16), 0)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.paste(1, (0, 0, 16, 8))
    pixels = read_pixels(of(hostile.encode(palette, transparency=0)), 16, 16)
    torch.testing.assert_close(pixels[:, 0, 0], torch.tensor([-1.0, -1.0, 1.0]))
    assert (pixels[:, -1] == 1).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int) -> None:
    upright = Image.new("RGB", (32, 16), "white")
    upright.paste("red", (0, 0, 8, 8))
    upright.paste("blue", (24, 8, 32, 16))
    turns = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # of Image.Transpose, that undo what EXIF tells to do
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(turns[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = decode(hostile.encode(stored, exif=exif)).image
    assert decoded.size == (32, 16)
    assert decoded.getpixel((3, 3)) == (255, 0, 0)
    assert decoded.getpixel((28, 12)) == (0, 0, 255)


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    for colour, channels in ((0, 1), (2, 3), (4, 2), (6, 4)):
        image = decode(hostile.deep_png(colour, channels)).image
        above, below = 5000 / 257, 60000 / 257
        if channels in (2, 4):  # on white, by its own alpha
            above, below = (value * value / 255 + 255 - value for value in (above, below))
        assert np.asarray(image)[0, 0] == pytest.approx([above] * 3, abs=1.5)
        assert np.asarray(image)[-1, -1] == pytest.approx([below] * 3, abs=1.5)
    deep = Image.fromarray(np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16))
    grey = np.asarray(decode(hostile.encode(deep, "TIFF")).image)[..., 0].astype(int)
    assert (grey[0, 0], grey[-1, -1]) == (0, 255)
    assert grey[32, 0] == pytest.approx(128, abs=1)
    shares = Image.fromarray(np.full((16, 16), 0.5, dtype=np.float32))
    assert np.asarray(decode(hostile.encode(shares, "TIFF")).image)[0, 0, 0] == pytest.approx(128, abs=1)


def test_cmyk_and_first_frame() -> None:
    red = Image.new("RGB", (32, 32), (200, 30, 30)).convert("CMYK")
    pixel = np.asarray(decode(hostile.encode(red, "JPEG", quality=95)).image)[16, 16]
    assert pixel == pytest.approx([200, 30, 30], abs=8)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()  # of RGB: no use for CMYK
    pixel = np.asarray(decode(hostile.encode(red, "JPEG", quality=95, icc_profile=profile)).image)[16, 16]
    assert pixel == pytest.approx([200, 30, 30], abs=8)
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("green", "red")]
    decoded = decode(hostile.encode(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True))
    assert decoded.animated
    assert decoded.image.getpixel((8, 8)) == (0, 128, 0)


def test_crop_and_flip() -> None:
    wide = Image.new("RGB", (60, 20), "black")
    wide.paste("white", (20, 0, 40, 20))
    picture = of(hostile.encode(wide))
    assert read_pixels(picture, 16, 16).mean() > 0.9
    assert read_pixels(picture, 16, 16, (0.0, 0.5)).mean() < -0.9
    assert read_pixels(picture, 16, 16, (1.0, 0.5)).mean() < -0.9
    whole = read_pixels(picture, 48, 16)
    assert whole.shape == (3, 16, 48)
    assert whole[0, 8, 24] == 1
    assert whole[0, 8, 2] == whole[0, 8, -3] == -1
    noisy = of(hostile.encode(hostile.noise(0)))
    torch.testing.assert_close(read_pixels(noisy, 16, 24, flip=True), read_pixels(noisy, 16, 24).flip(-1))
    enlarged = read_pixels(of(hostile.encode(hostile.noise(1, 8, 9))), 64, 64, (0.3, 1.0))
    assert enlarged.shape == (3, 64, 64)
    assert enlarged.abs().max() <= 1


@pytest.mark.parametrize("content", [b"", b"no picture at all", b"\x89PNG\r\n\x1a\n and then nothing"])
def test_unreadable_picture_is_named(content: bytes) -> None:
    with pytest.raises(ValueError, match="here: cannot be read as a picture"):
        read_pixels(of(content), 16, 16)


def test_readers_survive_pickling(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(b"0123456789")
    for reader, content in ((FileReader(str(file)), b"0123456789"), (PartReader(str(file), 2, 3), b"234")):
        again = pickle.loads(pickle.dumps(reader))
        assert again() == content
        assert again.stamp() == reader.stamp()
    with pytest.raises(ValueError, match="cut off"):
        PartReader(str(file), 8, 5)()
    with pytest.raises(ValueError, match=r"gone\.png: cannot be read"):
        read_pixels(CaptionedPicture("gone.png", FileReader(str(tmp_path / "gone.png")), ("a",)), 8, 8)
