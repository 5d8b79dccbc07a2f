"""The files of DALL-E's discrete autoencoder, against what the released code gives for the same weights.

Its code was run beside ours: logits of random weights agree to 3e-15 in float64, every code is the same, and pictures
to 1e-7. Here the names and shapes are written down once more, and some of the numbers that it gave for `weights`.
"""

import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from latentdiff.interchange.fingerprint import codes_digest
from latentdiff.models import DalleAutoencoder, TokenTransformer
from latentdiff.pipelines import UnconditionalTokenPipeline
from latentdiff.training.starting_networks import load_autoencoder

HID, CODES, VECTOR = 8, 16, 4
LOGITS = [
    0.342951,
    0.670353,
    0.448875,
    -0.701147,
    0.164783,
    -0.075812,
    1.410504,
    -0.215775,
    1.954959,
    -0.764526,
    1.359921,
    0.591000,
    0.995829,
    1.438346,
    0.649497,
    -1.082487,
]
"""Of the code at the first place."""
PICTURE = [
    0.386429,
    0.386346,
    0.387780,
    0.388780,
    0.384319,
    0.383509,
    0.383552,
    0.383120,
    0.783698,
    0.783049,
    0.782194,
    0.782193,
    0.783023,
    0.782995,
    0.782777,
    0.783984,
    0.139518,
    0.138477,
    0.138032,
    0.139119,
    0.140277,
    0.140213,
    0.141137,
]
"""In [0, 1], every 17th value of what `CODE_GRID` shows."""
CODE_GRID = torch.tensor([[[3, 15]]])


def pixels() -> Tensor:
    """(1, 3, 8, 16) in [-1, 1]"""
    return torch.sin(torch.arange(3 * 8 * 16, dtype=torch.float64) * 1.7).float().view(1, 3, 8, 16)


def conv(name: str, inside: int, out: int, size: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.w": (out, inside, size, size), f"{name}.b": (out,)}


def weights(part: str) -> dict[str, Tensor]:
    """Of the "encoder" or the "decoder", by the released names."""
    is_encoder = part == "encoder"
    widths = [HID, 2 * HID, 4 * HID, 8 * HID]
    shapes = conv("blocks.input", 3, HID, 7) if is_encoder else conv("blocks.input", CODES, VECTOR, 1)
    before = HID if is_encoder else VECTOR
    for group, width in enumerate(widths if is_encoder else widths[::-1], 1):
        for block in (1, 2):
            name = f"blocks.group_{group}.block_{block}"
            if before != width:
                shapes |= conv(f"{name}.id_path", before, width, 1)
            sides = (3, 3, 3, 1) if is_encoder else (1, 3, 3, 3)
            channels = (before, width // 4, width // 4, width // 4, width)
            for i, side in enumerate(sides):
                shapes |= conv(f"{name}.res_path.conv_{i + 1}", channels[i], channels[i + 1], side)
            before = width
    shapes |= conv("blocks.output.conv", before, CODES if is_encoder else 6, 1)
    found = {}
    for i, (name, shape) in enumerate(sorted(shapes.items())):
        values = torch.sin(torch.arange(math.prod(shape), dtype=torch.float64) ** 1.5 * 0.7 + 1.3 * i)
        scale = 2 / math.prod(shape[1:]) ** 0.5 if len(shape) > 1 else 0.3
        found[name] = (values * scale).float().reshape(shape)
    return found


def both(changes: dict[str, Tensor | None] | None = None) -> dict[str, Tensor]:
    """In one file."""
    found = {f"{part}.{name}": tensor for part in ("encoder", "decoder") for name, tensor in weights(part).items()}
    return {name: tensor for name, tensor in {**found, **(changes or {})}.items() if tensor is not None}


def save_module(part: str, file: Path, monkeypatch: pytest.MonkeyPatch, odd: Any = None) -> None:
    """A module pickled whole, as OpenAI's are, of classes that are gone when it is read.

    odd: what it holds besides.
    """
    names = ("encoder.Encoder", "encoder.EncoderBlock", "decoder.Decoder", "decoder.DecoderBlock", "utils.Conv2d")
    classes: dict[str, Any] = {}
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "dall_e", types.ModuleType("dall_e"))
        for name in names:
            module, kind = f"dall_e.{name.split('.')[0]}", name.split(".")[1]
            patch.setitem(sys.modules, module, sys.modules.get(module) or types.ModuleType(module))
            classes[kind] = type(kind, (nn.Module,), {"__module__": module})
            setattr(sys.modules[module], kind, classes[kind])
        top = classes[part.title()]()
        top.device, top.odd = torch.device("cpu"), odd
        for name, tensor in weights(part).items():
            add(top, name, tensor, classes["Conv2d"], classes[f"{part.title()}Block"])
        group = top.blocks.group_1
        group.pool = nn.MaxPool2d(2) if part == "encoder" else nn.Upsample(scale_factor=2)
        group.block_2.id_path, group.block_2.res_path.relu_1 = nn.Identity(), nn.ReLU()
        torch.save(top, file)


def add(module: nn.Module, name: str, tensor: Tensor, conv_class: Any, block_class: Any) -> None:
    head, _, rest = name.partition(".")
    if not rest:
        module.register_parameter(head, nn.Parameter(tensor, requires_grad=False))
        return
    if not hasattr(module, head):
        kind = conv_class if rest in ("w", "b") else block_class if head.startswith("block_") else nn.Sequential
        module.add_module(head, kind())
    add(getattr(module, head), rest, tensor, conv_class, block_class)


@torch.no_grad()
def check(model: DalleAutoencoder) -> None:
    """Raises AssertionError unless it gives what the released code gives."""
    logits = model.quantize.proj(model.encode_moments(pixels()))  # (1, K, 1, 2)
    torch.testing.assert_close(logits[0, :, 0, 0], torch.tensor(LOGITS), atol=2e-5, rtol=2e-5)
    assert torch.equal(model.encode_to_indices(pixels()), logits.argmax(1))
    shown = (model.decode_from_indices(CODE_GRID) + 1) / 2
    torch.testing.assert_close(shown.clamp(0, 1).flatten()[::17], torch.tensor(PICTURE), atol=2e-5, rtol=2e-5)


def test_the_released_files_are_read_without_the_code_that_made_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {part: tmp_path / f"{part}.pkl" for part in ("encoder", "decoder")}
    for part, file in files.items():
        save_module(part, file, monkeypatch)
    with pytest.raises(ValueError, match="is a pickle, which is only read if asked for"):
        DalleAutoencoder.from_single_file(files["encoder"], decoder=files["decoder"])
    model = DalleAutoencoder.from_single_file(files["encoder"], decoder=files["decoder"], allow_pickle=True)
    check(model)
    assert not [name for name in sys.modules if name.startswith("dall_e")]
    with pytest.raises(ValueError, match=r"decoder\.pkl: there is no encoder of DALL-E's"):
        DalleAutoencoder.from_single_file(files["decoder"], decoder=files["encoder"], allow_pickle=True)
    with pytest.raises(ValueError, match=r"encoder\.pkl: there is no decoder of DALL-E's"):
        DalleAutoencoder.from_single_file(files["encoder"], allow_pickle=True)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("harm-was-done"),))


def test_nothing_in_a_pickled_module_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_module("encoder", tmp_path / "encoder.pkl", monkeypatch, Evil())
    with pytest.raises(ValueError, match="holds more than tensors, which could run code"):
        DalleAutoencoder.from_single_file(tmp_path / "encoder.pkl", allow_pickle=True)
    assert not (tmp_path / "harm-was-done").exists()
    loop = nn.Sequential()
    loop._modules["again"] = loop
    torch.save(loop, tmp_path / "loop.pkl")
    with pytest.raises(ValueError, match=r"loop\.pkl: its modules are in one another without end"):
        DalleAutoencoder.from_single_file(tmp_path / "loop.pkl", allow_pickle=True)


def test_it_is_an_autoencoder_with_codes_for_a_prior(tmp_path: Path) -> None:
    save_file(both(), tmp_path / "dalle.safetensors")
    model = DalleAutoencoder.from_single_file(tmp_path / "dalle.safetensors")
    check(model)
    transformer = TokenTransformer(CODES, 2, "raster", 1, 2, 8, autoencoder_digest=codes_digest(model))
    UnconditionalTokenPipeline(transformer, model).save_pretrained(tmp_path / "folder")
    pipeline = UnconditionalTokenPipeline.from_pretrained(tmp_path / "folder")
    check(pipeline.vqvae)
    assert pipeline(seed=0).images[0].size == (16, 16)
    assert load_autoencoder(str(tmp_path / "folder")).codes == CODES
    learned = model.train()(pixels(), sample_posterior=True)
    learned.sample.square().mean().backward()
    assert model.encoder.conv_in.weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"decoder.blocks.input.b": None}, r"decoder\.blocks\.input\.b is missing"),
        ({"encoder.blocks.more": torch.zeros(2)}, r"encoder\.blocks\.more has no place in a DalleAutoencoder"),
        ({"encoder.blocks.output.conv.b": torch.zeros(3)}, r"should have the shape \[16\], and has \[3\]"),
        ({"decoder.blocks.output.conv.b": torch.full((6,), math.nan)}, "not finite"),
        ({"encoder.blocks.input.w": torch.zeros(8)}, r"blocks\.input\.w has the shape \[8\]"),
        ({"decoder.blocks.input.w": torch.zeros(4, 15, 1, 1)}, r"should have the shape \[16, 4\]"),
    ],
)
def test_what_is_not_whole_is_refused(tmp_path: Path, changes: dict[str, Tensor | None], said: str) -> None:
    save_file(both(changes), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=said):
        DalleAutoencoder.from_single_file(tmp_path / "a.safetensors")


def test_a_config_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"latent_channels=8 must be 16, of the last level"):
        DalleAutoencoder(block_out_channels=(8, 16), latent_channels=8)
    with pytest.raises(ValueError, match="unknown config key 'act_fn'"):
        DalleAutoencoder(act_fn="relu")
