"""``pipeline.optimize()``: what pays is kept and remembered, what changes pictures too much is not."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from latentdiff.pipelines.core import optimizing
from latentdiff.pipelines.core.optimizing import (
    Optimization,
    Way,
    changes,
    changes_on_gpu,
    free_cores,
    recall,
    relative,
)
from latentdiff.pipelines.core.step_runner import StepRunner

CALL: dict[str, Any] = {"prompt": "a red car", "guidance_scale": 2.0}


@pytest.fixture(autouse=True)
def _own_cache_and_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("LATENTDIFF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(optimizing, "free_cores", lambda: 1)  # whatever else this machine does meanwhile
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def own(pipeline: Any) -> Any:
    """With a UNet of its own, since it may be replaced."""
    pipeline.unet = copy.deepcopy(pipeline.unet)
    return pipeline


def draw(pipeline: Any) -> torch.Tensor:
    return pipeline(**CALL, seed=0, num_inference_steps=2, output_type="pt").images


def test_what_is_found_is_used_and_remembered(own: Any, tmp_path: Path) -> None:
    before, unet = draw(own), own.unet
    found = own.optimize(**CALL, max_error=0.05)
    assert not found.remembered
    first, *_ = found.seconds
    assert first.startswith("float32")
    assert found.speedup >= 1
    assert found.error <= 0.05
    assert str(found.way) in str(found)
    assert torch.get_num_threads() == found.way.threads
    assert own.unet.dtype == getattr(torch, found.way.dtype)
    assert (draw(own) - before).abs().max() < 0.1
    (file,) = (tmp_path / "cache" / "optimized").iterdir()
    torch.set_num_threads(int(first.split()[1]))
    own.unet = unet
    again = own.optimize(**CALL, max_error=0.05)
    assert again.remembered
    assert again == found
    assert again.speedup == found.speedup
    file.write_text("{}")
    torch.set_num_threads(int(first.split()[1]))
    own.unet = unet
    assert not own.optimize(**CALL, max_error=0.05).remembered
    assert json.loads(file.read_text())["way"]["threads"] >= 1


def test_a_pipeline_that_is_optimized_already_is_known_as_it_is(own: Any) -> None:
    own.unet = own.unet.to(memory_format=torch.channels_last)
    own.step_runner = StepRunner(compiled=False, graphs=True)
    assert not Way.of(own).graphs  # on a processor
    unet, found = own.unet, own.optimize(**CALL, max_error=0.0)
    assert "channels-last" in next(iter(found.seconds))
    assert found.way.channels_last
    assert own.unet is unet
    assert own.step_runner is None


@pytest.mark.parametrize(
    ("way", "name"),
    [
        ({"dtype": "float99"}, "float99, 1 thread"),
        ({"dtype": "functional"}, "functional, 1 thread"),
        ({"dtype": "int8"}, "int8, 1 thread"),
        ({"threads": -3}, "float32, -3 thread"),
        ({"threads": 10**6}, "float32, 1000000 threads"),
        ({"wings": 2}, "float32, 1 thread"),
        (None, "["),
        (None, "[" * 100_000),
    ],
)
def test_what_was_remembered_and_cannot_be_done_is_tried_anew(way: Any, name: str, tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    file.write_text(json.dumps({"way": way, "seconds": [[name, 0.1]], "error": 0.0}) if way else name)
    assert recall(file) is None
    file.write_text(json.dumps({"way": {}, "seconds": [["float32, 1 thread", 0.1]], "error": 0.0}))
    assert recall(file) is not None


def test_where_nothing_can_be_remembered_a_warning_says_so(
    own: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LATENTDIFF_CACHE", str(tmp_path / "file" / "cache"))
    assert own.optimize(**CALL, max_error=0.0).seconds
    assert "cannot be remembered" in caplog.text


def test_a_call_with_a_generator_is_tried_with_one_noise(own: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()
    assert own.optimize(**CALL, generator=generator, max_error=0.05).error <= 0.05
    assert torch.equal(generator.get_state(), before)


def test_what_is_drawn_does_not_matter_but_how_much_of_it(own: Any) -> None:
    files = [
        optimizing.memory(own, {"guidance_scale": 2.0, "prompt": prompt}, 0.02, False)
        for prompt in ("a red car", "a cup", ["a cup"], ["a cup"] * 2)
    ]
    assert files[0] == files[1] == files[2] != files[3]


def test_nothing_that_changes_predictions_is_kept_where_no_error_is_allowed(own: Any) -> None:
    found = own.optimize(**CALL, max_error=0.0)
    assert found.error == 0
    assert own.unet.dtype == torch.float32


def test_a_remembered_way_is_applied(own: Any) -> None:
    """Whatever pays here: bfloat16 that was found on such a machine is taken, on the call's own terms."""
    unet, threads = own.unet, torch.get_num_threads()
    way = Way("bfloat16", channels_last=True, threads=1)
    network = way.applied(unet)
    assert network is not unet
    assert (network.dtype, unet.dtype, torch.get_num_threads()) == (torch.bfloat16, torch.float32, 1)
    assert network.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    torch.set_num_threads(threads)
    exact = draw(own)
    own.unet = network
    assert 0 < (draw(own) - exact).abs().max() < 0.1
    assert Way(threads=threads).applied(unet) is unet


def test_every_way_is_tried_where_the_processor_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizing, "cores", lambda: 8)
    monkeypatch.setattr(optimizing, "processor", lambda: "x86_64\nflags: avx512_bf16")
    tried = [change for change, _ in changes(Way(threads=4), compiled=True)]
    assert [change["threads"] for change in tried if "threads" in change] == [1, 8]
    assert {"compiled": True} in tried
    monkeypatch.setattr(optimizing, "processor", lambda: "x86_64\nflags: avx2")
    assert not any("dtype" in change for change, _ in changes(Way(threads=4), compiled=False))


def test_other_processes_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizing, "cores", lambda: 8)
    for load, free in ((0.3, 8), (1.0, 4), (4.2, 4), (5.0, 1), (30.0, 1)):
        monkeypatch.setattr("os.getloadavg", lambda load=load: (load, 0.0, 0.0))
        assert free_cores() == free
    monkeypatch.setattr(optimizing, "cores", lambda: 1)
    assert free_cores() == 1


def test_a_lucky_step_does_not_tell_how_fast_a_way_is(own: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 5.0, 6.0, 11.0, 16.0])  # three steps are counted
    monkeypatch.setattr(optimizing.time, "perf_counter", lambda: next(ticks))
    assert optimizing.measured(own, Way(threads=torch.get_num_threads()), CALL)[0] == 3.0


def test_differences_are_shares_of_the_size() -> None:
    exact = torch.tensor([3.0, -4.0])
    assert relative(exact * 1.1, exact) == pytest.approx(0.1)


def test_what_cannot_be_optimized_is_refused(own: Any, tmp_path: Path) -> None:
    for share, said in ((2, "2"), ("0.1", "'0.1'")):
        with pytest.raises(ValueError, match=rf"max_error must lie in \[0, 1\), not {said}"):
            own.optimize(**CALL, max_error=share)
    unet = own.unet
    own.unet = torch.compile(unet)
    with pytest.raises(ValueError, match=r"whose UNet is not compiled; give compiled=True"):
        own.optimize(**CALL)
    own.unet = unet
    unet.compile()
    with pytest.raises(ValueError, match=r"whose UNet is not compiled; give compiled=True"):
        own.optimize(**CALL)
    assert not (tmp_path / "cache").exists()


def test_what_was_remembered_in_words() -> None:
    seconds = {"float32, 2 threads": 0.3, "bfloat16, 2 threads": 0.1}
    told = str(Optimization(Way("bfloat16", threads=2), seconds, 0.01, remembered=True))
    assert told.startswith("draws in bfloat16, 2 threads: 3.00 times as fast as before, predictions differ by 1.00%")
    assert recall(Path("nowhere")) is None


def test_what_is_tried_on_a_gpu(own: Any) -> None:
    start = Way(threads=0)
    tried = [change for change, _ in changes_on_gpu(start, compiled=True)]
    assert tried[0] == {"dtype": "float16"}
    assert {"graphs": True} in tried
    assert not any("threads" in change for change in tried)
    assert not any("compiled" in change for change, _ in changes_on_gpu(start, compiled=False))
    assert not any("dtype" in change for change, _ in changes_on_gpu(Way("float16", threads=0), compiled=False))
    way = Way("bfloat16", channels_last=True, threads=0, graphs=True)
    assert str(way) == "bfloat16, channels-last, as CUDA graphs"
    threads, unet = torch.get_num_threads(), own.unet
    way.apply(own)
    assert torch.get_num_threads() == threads
    assert own.unet is not unet
    assert own.step_runner.graphs
    assert not own.step_runner.compiled


def test_a_pipeline_on_another_device_is_refused(own: Any) -> None:
    own.unet.to("meta")
    with pytest.raises(ValueError, match=r"a CUDA GPU that holds the UNet; .* its UNet is on meta"):
        own.optimize(**CALL)
