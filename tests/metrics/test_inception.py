"""The FID Inception network: its patched pools, and other people's numbers for the same weights."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from latentdiff.metrics import inception
from latentdiff.metrics.inception import BlockA, BlockE, FidInception, LastBlock, load_inception


def numbers(*shape: int) -> Tensor:
    """Numbers that look random and are the same everywhere, float32."""
    count = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return torch.sin(count.square() * 0.7 + 0.3).float().view(shape)


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """All of the network's tensors, by formula."""
    tensors = FidInception().network.state_dict()
    for name, tensor in tensors.items():
        if tensor.ndim == 4:
            tensor.copy_(numbers(*tensor.shape) * (4 / tensor[0].numel()) ** 0.5)
        elif tensor.is_floating_point():
            tensor.fill_(1.0 if name.endswith(("running_var", "bn.weight")) else 0.0)
    return tensors


def test_of_other_code(weights: dict[str, Tensor], tmp_path: Path) -> None:
    """pytorch-fid 0.3.0's InceptionV3 (without its resizing and scaling) with these weights and this picture."""
    save_file(weights, tmp_path / "weights.safetensors")
    model = load_inception(tmp_path / "weights.safetensors")
    with torch.no_grad():
        features = model(numbers(1, 3, 299, 299))
    assert features.shape == (1, 2048)
    expected = torch.tensor(
        [0.831544, 0.143211, 0.055703, 1.281707, 0.0, 0.03462, 0.381137, 0.118153, 0.178495, 0.834512, 0.146952]
    )
    torch.testing.assert_close(features[0, ::200], expected, rtol=1e-3, atol=1e-4)


def test_pools_count_inside_only() -> None:
    """At a corner the mean of 4 pixels is taken, not of 9; the last block takes the maximum."""
    for block, corner in ((BlockA(8, pool_features=4), 2.5), (BlockE(8), 2.5), (LastBlock(8), 4.0)):
        seen: list[Tensor] = []
        block.eval().branch_pool.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        picture = torch.zeros(1, 8, 5, 5)
        picture[..., :2, :2] = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        with torch.no_grad():
            block(picture)
        torch.testing.assert_close(seen[-1][0, :, 0, 0], torch.full((8,), corner))


def test_files(weights: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with pytest.raises(FileNotFoundError, match=r"pt_inception-2015-12-05-6726825d\.pth there"):
        load_inception()
    cached = tmp_path / "hub" / "checkpoints" / inception.FILE_NAME
    cached.parent.mkdir(parents=True)
    torch.save({name: t for name, t in weights.items() if not name.endswith("num_batches_tracked")}, cached)
    stem = load_inception().network.Conv2d_1a_3x3.conv.weight
    torch.testing.assert_close(stem, weights["Conv2d_1a_3x3.conv.weight"])

    torch.save({"fc.weight": weights["fc.weight"]}, tmp_path / "part.pth")
    with pytest.raises(ValueError, match=r"part\.pth does not hold the FID Inception weights.*such as Conv2d_1a"):
        load_inception(tmp_path / "part.pth")
    (tmp_path / "other.pth").write_bytes(b"not weights at all")
    with pytest.raises(ValueError, match=r"other\.pth cannot be read as weights"):
        load_inception(tmp_path / "other.pth")
    with pytest.raises(FileNotFoundError, match=r"none\.pth: no such file"):
        load_inception(tmp_path / "none.pth")


class Runs:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("this must not run",)


def test_nothing_is_unpickled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"weight": Runs()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        load_inception(tmp_path / "evil.pth")
    assert "this must not run" not in capsys.readouterr().out
