"""Cached latents are the autoencoder's own, under a key that changes with whatever they depend on."""

import random
import re
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import diffusers
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from lives import forks, kill, live, start, wait
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from latentdiff import AutoencoderKL, VQModel
from latentdiff.codec import Codec
from latentdiff.training.batch import filling
from latentdiff.training.batch.cache import TensorStore, digest
from latentdiff.training.batch.filling import ShardWriter
from latentdiff.training.batch.latents import LatentCache, codec_digest, encode, key_of
from latentdiff.training.data import CaptionedPicture, from_dataset, read_pixels
from latentdiff.training.data.captioned_picture import View

Wanted = list[tuple[CaptionedPicture, View]]
LEVELS = {
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}


def own_accelerator() -> Accelerator:
    """Of a forked process, which must not take its parent's."""
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=True)


def pixels_of(picture: CaptionedPicture, view: View) -> Tensor:
    return read_pixels(picture, view.width, view.height, view.crop, view.flip)[None]


def filled(folder: Path, wanted: Wanted, autoencoder: Any, accelerator: Accelerator, **options: Any) -> LatentCache:
    cache = LatentCache(folder, autoencoder)
    cache.fill(wanted, autoencoder, accelerator, **options)
    return cache


def changed(autoencoder: Any, name: str) -> str:
    """The encoder's digest after a small change of one weight, which is then taken back."""
    weight = autoencoder.get_parameter(name).data
    weight.view(-1)[0] += 1e-3
    result = codec_digest(Codec(autoencoder))
    weight.view(-1)[0] -= 1e-3
    return result


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("library", ["ours", "diffusers"])
def test_mean_and_deviation_of_the_posterior(
    wanted: Wanted, autoencoder: AutoencoderKL, accelerator: Accelerator, tmp_path: Path, library: str, workers: int
) -> None:
    model = autoencoder if library == "ours" else diffusers.AutoencoderKL(**LEVELS, latent_channels=4)
    cache = filled(tmp_path / "cache", wanted, model, accelerator, batch_size=3, num_workers=workers)
    for picture, view in wanted:
        moments = cache[picture, view]
        assert moments.shape == (2, 4, view.height // 2, view.width // 2)
        assert moments.dtype == torch.float16
        with torch.no_grad():
            posterior = model.encode(pixels_of(picture, view)).latent_dist
        torch.testing.assert_close(moments[0].float(), posterior.mean[0], atol=1e-5, rtol=1e-3)
        torch.testing.assert_close(moments[1].float(), posterior.std[0], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("library", ["ours", "diffusers"])
def test_latents_of_a_codebook_have_no_deviation(
    wanted: Wanted, accelerator: Accelerator, tmp_path: Path, library: str
) -> None:
    model = (VQModel if library == "ours" else diffusers.VQModel)(**LEVELS, latent_channels=4, num_vq_embeddings=8)
    cache = filled(tmp_path / "cache", wanted, model, accelerator)
    for picture, view in wanted:
        with torch.no_grad():
            latents = model.encode(pixels_of(picture, view)).latents[0]
        torch.testing.assert_close(cache[picture, view][0].float(), latents, atol=1e-5, rtol=1e-3)
        assert not cache[picture, view][1].any()


def test_key_changes_with_picture_and_view(wanted: Wanted) -> None:
    picture = wanted[0][0]
    view = View(16, 16)
    others = [View(16, 24), View(24, 16), View(16, 16, (0.5, 0.4)), View(16, 16, (0.4, 0.5)), View(16, 16, flip=True)]
    keys = {key_of(picture, view), key_of(wanted[1][0], view), *(key_of(picture, other) for other in others)}
    assert len(keys) == 7
    moved = replace(picture, name="elsewhere.png", captions=("another caption",), weight=3.0)
    assert key_of(moved, View(16, 16)) == key_of(picture, view), "only its bytes count"


def test_key_of_a_dataset_row_changes_with_its_bytes() -> None:
    def digests(colour: str) -> list[str]:
        features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
        columns = {"image": [Image.new("RGB", (8, 8), colour)], "text": ["a square"]}
        (picture,) = from_dataset(datasets.Dataset.from_dict(columns, features=features))
        return [digest(picture.read().hex()) for _ in range(2)]

    assert len({*digests("red"), *digests("red")}) == 1
    assert digests("blue") != digests("red")


def test_folder_changes_with_the_encoder_and_nothing_else(autoencoder: AutoencoderKL) -> None:
    first = codec_digest(Codec(autoencoder))
    assert changed(autoencoder, "encoder.conv_in.weight") != first
    assert changed(autoencoder, "quant_conv.bias") != first
    assert changed(autoencoder, "decoder.conv_out.weight") == first
    assert changed(autoencoder, "post_quant_conv.weight") == first
    for key, value in {"scaling_factor": 0.5, "shift_factor": 0.1, "sample_size": 64, "out_channels": 4}.items():
        autoencoder.register_to_config(**{key: value})
        assert codec_digest(Codec(autoencoder)) == first, key
    assert codec_digest(Codec(autoencoder.bfloat16())) != first
    autoencoder.float().register_to_config(norm_num_groups=2)
    assert codec_digest(Codec(autoencoder)) != first


def test_folder_survives_saving(autoencoder: AutoencoderKL, tmp_path: Path) -> None:
    autoencoder.save_pretrained(tmp_path)
    assert codec_digest(Codec(AutoencoderKL.from_pretrained(tmp_path))) == codec_digest(Codec(autoencoder))


def test_only_what_is_missing_is_encoded(
    wanted: Wanted,
    autoencoder: AutoencoderKL,
    accelerator: Accelerator,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    filled(tmp_path / "cache", wanted[:5] * 2, autoencoder, accelerator)
    filled(tmp_path / "cache", wanted, autoencoder, accelerator)
    filled(tmp_path / "cache", wanted[::-1], autoencoder, accelerator)
    said = [record.getMessage() for record in caplog.records if "to encode" in record.getMessage()]
    assert said == ["5 pictures to encode, 0 are there already", "7 pictures to encode, 5 are there already"]
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 2


def test_encoding_says_how_far_it_is_and_what_an_interruption_leaves(
    wanted: Wanted,
    autoencoder: AutoencoderKL,
    accelerator: Accelerator,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr("latentdiff.training.loop.estimate.FIRST_LINE", 0.0)
    picture, view = wanted[0]
    views = [(picture, replace(view, flip=flip)) for flip in (False, True)]
    filled(tmp_path, views, autoencoder, accelerator, batch_size=1)
    assert "2 views of 1 pictures, as they are and mirrored, to encode" in caplog.text
    assert re.search(r"1 of 2 views of .* encoded, about [\d.]+ seconds left", caplog.text)
    pixels = iter([pixels_of(*wanted[i]) for i in range(2)])

    def interrupted(*_given: object) -> Tensor:
        for some in pixels:
            return encode(Codec(autoencoder), some)
        raise KeyboardInterrupt

    monkeypatch.setattr("latentdiff.training.batch.latents.encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        filled(tmp_path / "other", wanted[:5], autoencoder, accelerator, batch_size=1)
    assert "stopped while encoding; 2 of 5 pictures are encoded and kept" in caplog.text


def test_state_of_the_run_does_not_depend_on_what_was_cached(
    wanted: Wanted, autoencoder: AutoencoderKL, accelerator: Accelerator, tmp_path: Path
) -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(1)
        filled(tmp_path / "cache", wanted, autoencoder, accelerator)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()


def test_dropout_is_off_while_encoding_and_on_again_after(
    wanted: Wanted, autoencoder: AutoencoderKL, accelerator: Accelerator, tmp_path: Path
) -> None:
    autoencoder.encoder.conv_in = torch.nn.Sequential(autoencoder.encoder.conv_in, torch.nn.Dropout(0.5))
    calm = filled(tmp_path / "calm", wanted, autoencoder.eval(), accelerator)
    autoencoder.encoder.train()
    trained = filled(tmp_path / "trained", wanted, autoencoder, accelerator)
    assert all(torch.equal(calm[key], trained[key]) for key in wanted)
    assert autoencoder.encoder.training
    assert not autoencoder.decoder.training


def test_a_batch_lost_to_an_interruption_is_made_again_as_it_was() -> None:
    keys = [digest(i) for i in range(40)]
    size = {key: i % 3 for i, key in enumerate(keys)}
    calm = filling.plan(keys, set(keys), 4, size.__getitem__)
    assert sorted(key for batch in calm for key in batch) == sorted(keys)
    assert all(len({size[key] for key in batch}) == 1 for batch in calm)
    assert max(map(len, calm)) == 4
    done = {key for batch in calm[:4] for key in batch}
    assert filling.plan(keys, set(keys) - done, 4, size.__getitem__) == calm[4:]
    scattered = set(keys[::5])
    assert sorted(map(len, filling.plan(keys, scattered, 4, size.__getitem__))) == [2, 3, 3]


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_processes_share_the_work_whatever_each_sees(processes: int) -> None:
    keys = [digest(i) for i in range(500)]
    parts = [filling.share(keys[i::2] + keys[1 - i :: 2], i, processes) for i in range(processes) if i < 2] + [
        filling.share(keys, i, processes) for i in range(2, processes)
    ]
    assert sorted(key for part in parts for key in part) == sorted(keys)
    assert all(len(part) > 300 / processes for part in parts)


def test_an_unreadable_picture_is_named_and_the_rest_is_kept(
    wanted: Wanted, autoencoder: AutoencoderKL, accelerator: Accelerator, tmp_path: Path
) -> None:
    bad = wanted[7][0]
    Path(bad.read.path).unlink()
    with pytest.raises(ValueError, match=r"^7\.png: cannot be read"):
        filled(tmp_path / "cache", wanted, autoencoder, accelerator, batch_size=1)
    done = LatentCache(tmp_path / "cache", autoencoder)
    assert len(done.store) > 0
    rest = [item for item in wanted if item[0] is not bad]
    done.fill(rest, autoencoder, accelerator)
    assert len(done.store) == 11
    with pytest.raises(KeyError, match=r"7\.png was not encoded as View"):
        done[wanted[7]]


def test_a_picture_that_changed_under_way_is_not_taken_for_the_old_one(
    wanted: Wanted, autoencoder: AutoencoderKL, accelerator: Accelerator, tmp_path: Path
) -> None:
    file = Path(wanted[2][0].read.path)
    Image.new("RGB", (24, 28), "red").save(file)
    with pytest.raises(ValueError, match=r"^2\.png: has changed"):
        filled(tmp_path / "cache", wanted, autoencoder, accelerator)


def test_a_picture_without_digest_is_refused(
    wanted: Wanted, autoencoder: AutoencoderKL, accelerator: Accelerator, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"^0\.png: has no digest"):
        filled(tmp_path, [(replace(wanted[0][0], digest=""), View(16, 16))], autoencoder, accelerator)


def test_latents_that_are_no_numbers_are_not_kept(
    wanted: Wanted, autoencoder: AutoencoderKL, accelerator: Accelerator, tmp_path: Path
) -> None:
    autoencoder.encoder.conv_out.weight.data *= 1e9
    with pytest.raises(ValueError, match=r"^\d+\.png: .* not all numbers below 65504; is the autoencoder sound"):
        filled(tmp_path / "cache", wanted, autoencoder, accelerator)
    assert not (tmp_path / "cache").exists()


def test_an_error_is_not_hidden_by_a_full_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("no folder can be made of it")
    store = TensorStore(tmp_path / "file" / "cache")

    def fail() -> None:
        with ShardWriter(store) as writer:
            writer.add({"a": torch.zeros(3)})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert "what was encoded last is lost" in caplog.text
    with pytest.raises(OSError, match="could not be written"), ShardWriter(store) as writer:
        writer.add({"a": torch.zeros(3)})


@forks
@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_FSIZE")
def test_a_full_disk_stops_it_and_room_lets_it_go_on(
    wanted: Wanted, autoencoder: AutoencoderKL, tmp_path: Path, accelerator: Accelerator
) -> None:
    def fill_on_a_full_disk() -> None:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write that is too long then fails as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, resource.RLIM_INFINITY))
        accelerator = own_accelerator()
        filled(tmp_path / "cache", wanted[:2], autoencoder, accelerator)
        with pytest.raises(OSError, match="make room"):
            filled(tmp_path / "cache", wanted, autoencoder, accelerator)

    log = tmp_path / "log.txt"
    live(fill_on_a_full_disk, log)
    cache = LatentCache(tmp_path / "cache", autoencoder)
    assert len(cache.store) == 2
    calm = filled(tmp_path / "calm", wanted, autoencoder, accelerator)
    cache.fill(wanted, autoencoder, accelerator)
    for key in wanted:
        torch.testing.assert_close(cache[key], calm[key], atol=1e-4, rtol=2e-3)  # the batches were others


@forks
def test_two_processes_encode_their_part_each(
    wanted: Wanted, autoencoder: AutoencoderKL, tmp_path: Path, accelerator: Accelerator
) -> None:
    def work() -> None:
        accelerator = own_accelerator()
        assert accelerator.num_processes == 2
        cache = filled(tmp_path / "cache", wanted, autoencoder, accelerator, batch_size=1)
        assert all(cache[key].isfinite().all() for key in wanted), "each sees what the other made"

    log = tmp_path / "log.txt"
    live(work, log, processes=2)
    (folder,) = (tmp_path / "cache").iterdir()
    sizes = []
    for file in folder.iterdir():
        (tmp_path / file.stem).mkdir()
        file.rename(tmp_path / file.stem / file.name)
        sizes.append(len(TensorStore(tmp_path / file.stem)))
    assert len(sizes) == 2
    assert sum(sizes) == 12, "nothing twice"
    assert min(sizes) >= 2


@forks
@pytest.mark.parametrize("kills", [6, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_again_and_again_it_ends_as_if_left_in_peace(
    wanted: Wanted,
    autoencoder: AutoencoderKL,
    tmp_path: Path,
    accelerator: Accelerator,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    kills: int,
) -> None:
    crops = [(i / 7, j / 99) for i in range(5) for j in range(max(2, kills // 3))]
    many = [(picture, replace(view, crop=crop)) for picture, view in wanted for crop in crops]
    calm = filled(tmp_path / "calm", many, autoencoder, accelerator, batch_size=4)
    monkeypatch.setattr(filling, "SHARD_TENSORS", 4)

    def work() -> None:
        filled(tmp_path / "cache", many, autoencoder, own_accelerator(), batch_size=4)

    chance, log, there = random.Random(kills), tmp_path / "log.txt", 0
    for _ in range(kills):
        goal = len(list(tmp_path.glob("cache/*/[!.]*"))) + chance.randint(0, 2)
        children = start(work, log)
        while len(list(tmp_path.glob("cache/*/[!.]*"))) < goal:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.01))
        kill(children)
        assert wait(children) == [-signal.SIGKILL], log.read_text()
        cache = LatentCache(tmp_path / "cache", autoencoder)
        present = [key for key in many if key_of(*key) in cache.store]
        assert all(torch.equal(cache[key], calm[key]) for key in present)
        assert there <= len(present) < len(many), "nothing that was there is lost"
        there = len(present)
    assert there > 0
    live(work, log)
    cache = LatentCache(tmp_path / "cache", autoencoder)
    assert all(torch.equal(cache[key], calm[key]) for key in many)
    assert not caplog.records, "no half-written shard was taken for one"


@pytest.mark.slow
def test_spawned_workers_read_it(
    wanted: Wanted, autoencoder: AutoencoderKL, tmp_path: Path, accelerator: Accelerator
) -> None:
    cache = filled(tmp_path / "cache", wanted, autoencoder, accelerator)
    square = [(picture, view) for picture, view in wanted if view.width == view.height]
    loader = DataLoader(cache, batch_sampler=[square[:4], square[4:]], num_workers=2, multiprocessing_context="spawn")
    assert torch.equal(torch.cat(list(loader)), torch.stack([cache[key] for key in square]))
