"""Distillation of PixArt's and DiT's folders: what comes out draws in diffusers as here, and goes on exactly."""

import re
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from lives import calm_and_killed, forks, live
from safetensors.torch import load_file
from tiny_transformers import dit_folder, pixart_folder

from latentdiff import ClassConditionalPipeline, TextToImagePipeline
from latentdiff.conditioning import Conditioning
from latentdiff.interchange.png import read_settings
from latentdiff.training.objectives.adversarial import AdversarialObjective, feature_widths
from latentdiff.training.objectives.consistency import ConsistencyObjective
from latentdiff.training.settings import DistillationSettings
from latentdiff.training.trainers.distill import distill, empty_prompt
from latentdiff.training.trainers.finetune import own_process

SMALL = {"batch_size": 2, "max_steps": 3, "checkpoint_every": 3, "sample_every": 100, "learning_rate": 1e-2}
METHODS: dict[str, dict[str, object]] = {
    "lcm": {"method": "lcm", "guidance_scale": 3.0},
    "lcm-lora": {"method": "lcm", "lora_rank": 2, "target_decay": 0.5},
    "trajectory": {"method": "trajectory", "few_steps": 2, "own_states_after": 0.3},
    "consistency": {"method": "consistency"},
    "progressive": {"method": "progressive", "few_steps": 2, "start_steps": 2, "stage_steps": 1},
    "adversarial": {"method": "adversarial", "discriminator_channels": 4, "r1_weight": 0.1},
    "dmd": {"method": "dmd"},
}
QUICK = [("pixart", "lcm"), ("dit", "adversarial")]
ALL = [
    (kind, method) if (kind, method) in QUICK else pytest.param(kind, method, marks=pytest.mark.slow)
    for kind in ("pixart", "dit")
    for method in METHODS
]
LAYER = "transformer_blocks.0.attn1.to_q.weight"
STEPS = {diffusers.DDIMScheduler: 2, diffusers.LCMScheduler: 1}
"""In which both are compared: in one LCM's puts no noise in, and diffusers' DiTPipeline gives it no generator."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {"pixart": pixart_folder(folder / "pixart", "bert"), "dit": dit_folder(folder / "dit")}


def run(model: Path, output: Path, **changes: object) -> Path:
    values = {**SMALL, "model": str(model), "output": str(output), **changes}
    return distill(DistillationSettings.load(None, values))


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def transformer(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


def same(a: Path, b: Path) -> bool:
    one, other = transformer(a), transformer(b)
    return all(torch.equal(one[name], other[name]) for name in one)


def few(kind: str, folder: Path, steps: int) -> tuple[Any, Any]:
    """What the folder draws here and in diffusers, from the same noise and without guidance."""
    ours: Any = quiet((TextToImagePipeline if kind == "pixart" else ClassConditionalPipeline).from_pretrained(folder))
    theirs: Any = quiet(diffusers.DiffusionPipeline.from_pretrained(folder))
    what = {"prompt": "a red thing"} if kind == "pixart" else {"class_labels": [3]}
    call = {**what, "num_inference_steps": steps, "guidance_scale": 1.0, "output_type": "np"}
    told = ours.diffusers_options if kind == "pixart" else {}
    found = ours(**call, generator=torch.Generator().manual_seed(7)).images
    return found, theirs(**call, **told, generator=torch.Generator().manual_seed(7)).images


@pytest.mark.parametrize(("kind", "method"), ALL)
def test_a_student_draws_in_plain_diffusers(
    numbered: Path, folders: dict[str, Path], tmp_path: Path, kind: str, method: str
) -> None:
    out = run(folders[kind], tmp_path / "out", **METHODS[method], data=str(numbered))
    before, after = transformer(folders[kind]), transformer(out)
    assert before.keys() == after.keys()
    assert not torch.equal(before[LAYER], after[LAYER])
    scheduler = type(diffusers.DiffusionPipeline.from_pretrained(out).scheduler)
    found, wanted = few(kind, out, STEPS[scheduler])
    torch.testing.assert_close(torch.from_numpy(found), torch.from_numpy(wanted), atol=1e-4, rtol=0)
    card = (out / "README.md").read_text(encoding="utf-8")
    assert f"distilled to {METHODS[method].get('few_steps', 4)} steps" in card
    if kind == "pixart":
        assert "PixArtAlphaPipeline.from_pretrained" in card
        assert re.search(r"max_sequence_length=\d+, num_inference_steps=\d, guidance_scale=1\)", card)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["pixart", "dit"])
def test_a_stopped_run_goes_on_exactly(
    numbered: Path, folders: dict[str, Path], tmp_path: Path, kind: str, method: str
) -> None:
    common = {**METHODS[method], "data": str(numbered)}
    straight = run(folders[kind], tmp_path / "a", **common)
    run(folders[kind], tmp_path / "b", **common, max_steps=2)
    assert same(straight, run(folders[kind], tmp_path / "b", **common))


@pytest.mark.parametrize("kind", ["pixart", "dit"])
def test_the_guided_teacher_is_what_diffusers_computes(folders: dict[str, Path], kind: str) -> None:
    ours: Any = (TextToImagePipeline if kind == "pixart" else ClassConditionalPipeline).from_pretrained(folders[kind])
    theirs: Any = diffusers.DiffusionPipeline.from_pretrained(folders[kind]).transformer
    settings = DistillationSettings(model="", data="d", output="o", target_decay=0.0)
    objective = ConsistencyObjective(ours.unet, ours.unet, own_process(ours), (3.0, 3.0), empty_prompt(ours), settings)
    noisy, times = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([700, 40])
    if kind == "pixart":
        conditioner = ours.conditioner(torch.device("cpu"))
        given, nothing = conditioner(["a red thing", "a cup"]), conditioner(["", ""])
    else:
        given, nothing = Conditioning(labels=torch.tensor([3, 7])), Conditioning(labels=torch.tensor([1000, 1000]))
    with torch.no_grad():
        found = objective.guided_guess(noisy, times, given, torch.tensor([3.0, 2.0]))
        told, untold = (
            theirs(noisy, timestep=times, **{**one.arguments(), **nothing_added(kind)}).sample[:, :4]
            for one in (given, nothing)
        )
    wanted = untold + torch.tensor([3.0, 2.0]).view(2, 1, 1, 1) * (told - untold)
    torch.testing.assert_close(found.noise, wanted, atol=1e-4, rtol=1e-4)  # the noise is what they predict


def nothing_added(kind: str) -> dict[str, Any]:
    return {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}} if kind == "pixart" else {}


def test_a_discriminator_sees_what_each_block_gives_in_its_place(folders: dict[str, Path]) -> None:
    pipeline: Any = TextToImagePipeline.from_pretrained(folders["pixart"])
    network, given = pipeline.unet, pipeline.conditioner(torch.device("cpu"))(["a cup"])
    settings = DistillationSettings(model="", data="d", output="o", method="adversarial")
    seen: Any = AdversarialObjective(
        network,
        network,
        own_process(pipeline),
        (1.0, 1.0),
        given,
        torch.nn.Identity(),
        settings,  # type: ignore[arg-type]
    )
    x = torch.randn(1, 4, 8, 12)
    with torch.no_grad():
        time = network.embed_time(torch.tensor([5]))
        features = seen.features(x, torch.tensor([5]), given)
        assert [tuple(one.shape) for one in features] == [(1, width, 4, 6) for width in feature_widths(network)]
        keys = network.encode_text(given.states, given.mask)
        tokens = network.pos_embed(x)
        modulation = network.adaln_single.linear(torch.nn.functional.silu(time)).unflatten(1, (6, -1))
        tokens = network.transformer_blocks[0](tokens, modulation, keys.at(0), keys.mask)
    torch.testing.assert_close(features[0][0, :, 2, 3], tokens[0, 2 * 6 + 3])


def test_listed_classes_are_drawn_by_the_teacher_or_only_named(folders: dict[str, Path], tmp_path: Path) -> None:
    listed = tmp_path / "classes.csv"
    listed.write_text("class\nitem 3\n7\n", encoding="utf-8")
    values = {"prompts": str(listed), "prompt_pictures": 3, "teacher_steps": 2, "max_steps": 1, "method": "dmd"}
    out = run(folders["dit"], tmp_path / "out", **values, guidance_scale=2.0)
    files = sorted((out / "training" / "teacher_pictures").glob("*.png"))
    assert [(read_settings(file) or {})["prompts"] for file in files] == [["item 3"], ["7"], ["item 3"]]
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "latentdiff generate --class 'thing 3, item 3' --model" in card
    assert "Class-conditional image pipeline, distilled to 4 steps (dmd)" in card
    drawn: Any = quiet(ClassConditionalPipeline.from_pretrained(out))
    assert drawn.defaults == {"num_inference_steps": 4, "guidance_scale": 1.0}
    alone = run(folders["dit"], tmp_path / "alone", prompts=str(listed), method="trajectory", few_steps=2, max_steps=1)
    assert not (alone / "training" / "teacher_pictures").exists()
    listed.write_text("class\nthing 1000\n", encoding="utf-8")
    with pytest.raises(
        ValueError,
        match=r"no class 'thing 1000'; did you mean 'thing \d+'( or 'thing \d+'){2}\? There are 1,000 classes$",
    ):
        run(folders["dit"], tmp_path / "none", **values)
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_sizes_are_told_to_teacher_and_student(pictures: Path, tmp_path: Path) -> None:
    model = pixart_folder(tmp_path / "model", "bert", use_additional_conditions=True)
    out = run(model, tmp_path / "out", data=str(pictures), method="trajectory", few_steps=1, max_steps=1)
    name = "adaln_single.emb.resolution_embedder.linear_1.weight"
    assert not torch.equal(transformer(model)[name], transformer(out)[name])


def test_a_scale_cannot_be_chosen_when_drawing(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a PixArtTransformer2DModel takes no guidance scale; give one guidance_scale"):
        run(folders["pixart"], tmp_path / "out", data="nowhere", guidance_scale=[1, 5])
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@forks
@pytest.mark.parametrize(("kind", "method"), [("pixart", "trajectory"), ("dit", "dmd")])
def test_kills_change_nothing(numbered: Path, folders: dict[str, Path], tmp_path: Path, kind: str, method: str) -> None:
    common = {**METHODS[method], "data": str(numbered), "max_steps": 6, "checkpoint_every": 1}
    calm_and_killed(lambda name: run(folders[kind], tmp_path / name, **common), tmp_path / "log.txt")
    assert same(tmp_path / "calm", tmp_path / "killed")


@pytest.mark.slow
@forks
@pytest.mark.parametrize(("kind", "method"), [("pixart", "adversarial"), ("dit", "lcm-lora")])
def test_two_processes_do_what_one_does(
    numbered: Path, folders: dict[str, Path], tmp_path: Path, kind: str, method: str
) -> None:
    def train(name: str, size: int) -> None:
        common = {**METHODS[method], "data": str(numbered), "batch_size": size}
        run(folders[kind], tmp_path / name, **common, **{"optimizer": "sgd", "learning_rate": 0.01})

    log = tmp_path / "log.txt"
    live(lambda: train("one", 4), log)
    live(lambda: train("two", 2), log, processes=2)
    one, two = transformer(tmp_path / "one"), transformer(tmp_path / "two")
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-5, rtol=1e-4)
    assert any(not torch.equal(one[name], old) for name, old in transformer(folders[kind]).items())
