"""The best of several candidates."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_clip import save_clip

from latentdiff.metrics.clip import ClipScore, load_clip
from latentdiff.pipelines.core.candidates import best_of, load_reranker

FEW = {"num_inference_steps": 2}


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def reranker(clip_folder: Path) -> ClipScore:
    return load_clip(str(clip_folder))


def pictures(count: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(count)]


def test_the_best_of_each_prompt_come_first(reranker: ClipScore) -> None:
    images, prompts = pictures(20 * 2), ["a red car", "sun"]
    best, scores = best_of(images, prompts, 20, 3, reranker)
    for row, prompt in enumerate(prompts):
        own = [float(reranker.cosines([image], [prompt])[0]) for image in images[20 * row : 20 * (row + 1)]]
        assert len(set(own)) == 20
        wanted = sorted(range(20), key=lambda i: -own[i])[:3]
        assert best[3 * row : 3 * row + 3] == [20 * row + i for i in wanted]
        assert scores[3 * row : 3 * row + 3] == pytest.approx([100 * max(own[i], 0) for i in wanted], abs=1e-3)


def test_equal_pictures_keep_their_order(reranker: ClipScore) -> None:
    assert best_of(pictures(1) * 5, ["sun"], 5, 5, reranker)[0] == [0, 1, 2, 3, 4]


def test_what_was_withheld_comes_last(reranker: ClipScore) -> None:
    images = pictures(4)
    best = best_of(images, ["sun"], 4, 4, reranker)[0]
    withheld = [i == best[0] for i in range(4)]
    assert best_of(images, ["sun"], 4, 4, reranker, withheld)[0] == [*best[1:], best[0]]


def test_a_call_gives_the_best_with_scores_and_seeds(pipeline: Any, reranker: ClipScore) -> None:
    output = pipeline(["a red car", "sun"], candidates=4, num_images_per_prompt=2, seed=10, reranker=reranker, **FEW)
    assert len(output.images) == len(output.scores) == len(output.seeds) == 4
    assert output.scores[0] >= output.scores[1]
    assert output.scores[2] >= output.scores[3]
    assert set(output.seeds[:2]) < set(range(10, 14))
    assert set(output.seeds[2:]) < set(range(14, 18))
    for i, prompt in enumerate(["a red car"] * 2 + ["sun"] * 2):
        again = pipeline(prompt, seed=output.seeds[i], output_type="np", **FEW).images[0]
        np.testing.assert_allclose(np.asarray(output.images[i]) / 255, again, atol=1.01 / 255)
        assert float(reranker.scores([output.images[i]], [prompt])[0]) == pytest.approx(output.scores[i], abs=1e-3)
    everything = [
        float(reranker.scores(pipeline("sun", seed=seed, **FEW).images, ["sun"])[0]) for seed in range(14, 18)
    ]
    assert output.scores[2] == pytest.approx(max(everything), abs=0.05)


def test_a_reranker_may_stay_on_the_pipeline(pipeline: Any, clip_folder: Path) -> None:
    pipeline.reranker = str(clip_folder)
    output = pipeline("sun", candidates=2, seed=0, output_type="pt", **FEW)
    assert output.images.shape == (1, 3, 16, 16)
    assert load_reranker(clip_folder) is load_reranker(str(clip_folder))


def test_captions_are_read_without_weights(pipeline: Any, reranker: ClipScore) -> None:
    call = {"candidates": 4, "num_images_per_prompt": 4, "seed": 0, "reranker": reranker, **FEW}
    output = pipeline("a (sun:1.5)", prompt_weights=True, **call)
    wanted = [float(reranker.scores([image], ["a sun"])[0]) for image in output.images]
    assert output.scores == pytest.approx(wanted, abs=1e-3)
    assert any(wanted)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"candidates": 1, "num_images_per_prompt": 2}, ValueError, "at least the 2 to keep"),
        ({"candidates": 2.5}, ValueError, "candidates must be a whole number"),
        ({"candidates": 2, "output_type": "latent"}, ValueError, "compared as pictures"),
        ({"candidates": 2, "reranker": 3}, TypeError, "a reranker is a ClipScore, or the name or folder"),
        ({"candidates": 2, "reranker": "nowhere"}, FileNotFoundError, "nowhere: no such folder; a CLIP is open_clip"),
        ({"candidates": 2, "reranker": "open_clip:ViT-Z/x"}, ValueError, "open_clip has no model named 'ViT-Z'"),
    ],
)
def test_bad_choices_are_refused(pipeline: Any, call: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pipeline("sun", **FEW, **call)


def test_ready_states_cannot_be_compared_with_pictures(pipeline: Any, reranker: ClipScore) -> None:
    with pytest.raises(ValueError, match="candidates are compared with the prompt"):
        pipeline(prompt_embeds=torch.zeros(1, 12, 16), candidates=2, reranker=reranker, **FEW)
