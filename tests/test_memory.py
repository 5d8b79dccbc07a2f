"""Too much is asked for: the error says what would take less."""

from pathlib import Path

import pytest
import torch
from straight_line import Line, Points, go, settings
from tiny import tiny_pipeline

from latentdiff.cli import explain
from latentdiff.memory import memory_advice
from latentdiff.training.loop.run import TrainingRun
from latentdiff.training.objectives.objective import Result

SIDE = 2**24  # pixels: latents of a petabyte


class Greedy(Line):
    def training_loss(self, batch: Points) -> Result:
        raise AssertionError(torch.ones(2**48).sum())


@pytest.mark.parametrize("streamed", [False, True])
def test_a_drawing_that_does_not_fit(streamed: bool) -> None:
    pipeline = tiny_pipeline()
    draw = (lambda *args, **call: next(pipeline.stream(*args, **call))) if streamed else pipeline
    with pytest.raises(RuntimeError, match="memory") as caught:
        draw("a red thing", height=SIDE, width=SIDE, seed=0)
    said, mistake = explain(caught.value)
    assert mistake
    assert "there is not enough memory" in said
    assert "draw fewer pictures at once or smaller ones" in said
    assert "enable_model_cpu_offload()" in said


def test_a_training_that_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="memory") as caught:
        go(TrainingRun(settings(tmp_path), Greedy()))
    said = explain(caught.value)[0]
    assert all(word in said for word in ("batch_size", "resolution", "gradient_checkpointing=true"))


def test_other_errors_get_no_advice() -> None:
    with pytest.raises(RuntimeError) as caught, memory_advice("take less"):
        raise RuntimeError("shapes do not fit")
    assert not hasattr(caught.value, "__notes__")
