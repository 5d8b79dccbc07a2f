"""Distillation end to end at tiny sizes: what comes out draws in diffusers too, and a stopped run goes on exactly."""

import logging
import re
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from lives import calm_and_killed, forks, live
from safetensors.torch import load_file
from tiny import draw, tiny_pipeline

from latentdiff import TextToImagePipeline
from latentdiff.diffusion import RectifiedFlow, process_of
from latentdiff.interchange.png import read_settings
from latentdiff.training.settings import DistillationSettings, FinetuneSettings
from latentdiff.training.trainers.distill import distill
from latentdiff.training.trainers.finetune import UNDISTILLED, finetune

SMALL = {"batch_size": 2, "max_steps": 3, "checkpoint_every": 3, "sample_every": 3, "learning_rate": 1e-2}
METHODS: dict[str, dict[str, object]] = {
    "lcm": {"method": "lcm"},
    "lcm-lora": {"method": "lcm", "lora_rank": 2, "target_decay": 0.5},
    "trajectory": {"method": "trajectory", "few_steps": 2, "trajectory_repeats": 1, "own_states_after": 0.3},
    "trajectory-lora": {"method": "trajectory", "lora_rank": 2, "own_states_after": 0},
    "consistency": {"method": "consistency"},
    "progressive": {"method": "progressive", "start_steps": 4, "stage_steps": 1},
    "adversarial": {"method": "adversarial", "discriminator_channels": 4, "r1_weight": 0.1},
    "dmd": {"method": "dmd", "lora_rank": 2},
}
FEW: dict[str, dict[str, object]] = {
    "trajectory": {"few_steps": 2},
    "progressive": {"few_steps": 2, "start_steps": 2, "stage_steps": 1, "max_steps": 2},
    "adversarial": {"few_steps": 2},
}
UNET = "diffusion_pytorch_model.safetensors"


def save_tiny(folder: Path, **kind: Any) -> Path:
    tiny_pipeline("clip", **kind).save_pretrained(folder)
    return folder


def save_flow(folder: Path) -> Path:
    pipeline = tiny_pipeline("clip")
    pipeline.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0)
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model")


def run(model: Path, output: Path, **changes: object) -> Path:
    values = {**SMALL, "model": str(model), "output": str(output), **changes}
    return distill(DistillationSettings.load(None, values))


def drawn(pipeline: Any, **options: Any) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    return draw(pipeline, generator=generator, **{"num_inference_steps": 4, **options})


def unet(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "unet" / UNET)


def test_lcm_draws_in_plain_diffusers_at_the_scale_that_is_chosen(pictures: Path, model: Path, tmp_path: Path) -> None:
    before = {name: file.read_bytes() for file in sorted(model.rglob("*")) if (name := file.name) and file.is_file()}
    out = run(model, tmp_path / "out", data=str(pictures))
    ours = TextToImagePipeline.from_pretrained(out)
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(out)
    assert type(theirs.scheduler) is diffusers.LCMScheduler
    assert ours.defaults == {"num_inference_steps": 4, "guidance_scale": 3.0}  # the teacher's own
    for scale in (1.5, 6.0):
        torch.testing.assert_close(
            drawn(ours, guidance_scale=scale), drawn(theirs, guidance_scale=scale), atol=1e-4, rtol=0
        )
    assert (drawn(ours, guidance_scale=1.5) - drawn(ours, guidance_scale=6.0)).abs().max() > 1e-4
    changed, old = unet(out), unet(model)
    assert changed.keys() - old.keys() == {"time_embedding.cond_proj.weight"}
    assert all(not torch.equal(changed[name], old[name]) for name in old)
    assert {file.name: file.read_bytes() for file in sorted(model.rglob("*")) if file.is_file()} == before
    assert "num_inference_steps=4, guidance_scale=3)" in (out / "README.md").read_text(encoding="utf-8")
    assert "distilled to 4 steps (lcm)" in (out / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("method", ["trajectory", "progressive", "adversarial"])
def test_others_draw_in_plain_diffusers_as_here(pictures: Path, model: Path, tmp_path: Path, method: str) -> None:
    out = run(model, tmp_path / "out", data=str(pictures), **{**METHODS[method], **FEW[method]})
    ours = TextToImagePipeline.from_pretrained(out)
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(out)
    kind, timesteps = diffusers.DDIMScheduler if method != "adversarial" else diffusers.LCMScheduler, []
    assert type(theirs.scheduler) is kind
    assert ours.defaults == {"num_inference_steps": 2, "guidance_scale": 1.0}

    def keep(*args: Any) -> Any:
        timesteps.append(int(args[2]))
        return args[3]

    few = {"num_inference_steps": 2, "guidance_scale": 1.0}
    torch.testing.assert_close(drawn(ours, **few), drawn(theirs, **few, callback_on_step_end=keep), atol=1e-4, rtol=0)
    assert timesteps == [999, 499]
    assert drawn(ours, num_inference_steps=4, guidance_scale=1.0).isfinite().all()


@pytest.mark.parametrize("method", ["trajectory", "progressive"])
def test_a_flow_of_few_steps_draws_in_plain_diffusers_as_here(pictures: Path, tmp_path: Path, method: str) -> None:
    common = {"data": str(pictures), **METHODS[method], **FEW[method]}
    out = run(save_flow(tmp_path / "model"), tmp_path / "out", **common)
    ours = TextToImagePipeline.from_pretrained(out)
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(out)
    assert ours.defaults == {"num_inference_steps": 2, "guidance_scale": 1.0}
    process: Any = process_of(ours.scheduler)
    few = {"num_inference_steps": 2, "guidance_scale": 1.0}
    torch.testing.assert_close(drawn(ours, **few), drawn(theirs, **few), atol=1e-4, rtol=0)
    torch.testing.assert_close(theirs.scheduler.sigmas.flip(0) * 1000, process.even_times(2), rtol=1e-5, atol=1e-3)
    assert not torch.equal(unet(out)["conv_in.weight"], unet(tmp_path / "model")["conv_in.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lcm", "lcm-lora", "consistency", "adversarial", "dmd"])
def test_a_flow_that_draws_with_new_noise_does_so_in_plain_diffusers_as_here(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    out = run(save_flow(tmp_path / "model"), tmp_path / "out", data=str(pictures), **METHODS[method])
    ours, theirs = TextToImagePipeline.from_pretrained(out), diffusers.StableDiffusionPipeline.from_pretrained(out)
    scheduler: Any = theirs.scheduler
    assert type(scheduler) is diffusers.FlowMatchLCMScheduler
    assert scheduler.config.shift == 2.0
    scheduler.init_noise_sigma = 1.0  # which its pipeline asks for, and no scheduler of flows has
    scale = ours.defaults["guidance_scale"]
    found, wanted = drawn(ours, guidance_scale=scale), drawn(theirs, guidance_scale=scale)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    assert drawn(ours, num_inference_steps=1, guidance_scale=scale).isfinite().all()
    card = (out / "README.md").read_text(encoding="utf-8").partition("from diffusers import")[2].partition("```")[0]
    monkeypatch.chdir(out.parent)
    exec("from diffusers import" + card, {})  # what it says draws
    old = unet(tmp_path / "model")
    assert any(not torch.equal(unet(out)[name], one) for name, one in old.items())


def test_a_lora_is_loaded_by_plain_diffusers_with_its_lcm_scheduler(
    pictures: Path, model: Path, tmp_path: Path
) -> None:
    out = run(model, tmp_path / "out", data=str(pictures), lora_rank=2)
    ours = TextToImagePipeline.from_pretrained(out)
    assert ours.defaults == {"num_inference_steps": 4, "guidance_scale": 1.0}
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(model)
    theirs.scheduler = diffusers.LCMScheduler.from_config(theirs.scheduler.config)
    untrained = drawn(theirs, guidance_scale=1.0)
    theirs.load_lora_weights(str(out / "pytorch_lora_weights.safetensors"))
    torch.testing.assert_close(drawn(theirs, guidance_scale=1.0), drawn(ours, guidance_scale=1.0), atol=1e-4, rtol=0)
    assert (drawn(ours, guidance_scale=1.0) - untrained).abs().max() > 1e-3


def test_of_prompts_the_teacher_draws_the_pictures(model: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red thing\na cup\n", encoding="utf-8")
    values = {"prompts": str(prompts), "prompt_pictures": 3, "teacher_steps": 2, "guidance_scale": 2.5}
    out = run(model, tmp_path / "out", **values, max_steps=1)
    files = sorted((out / "training" / "teacher_pictures").glob("*.png"))
    found = [read_settings(file) for file in files]
    assert [(one["prompts"], one["seed"], one["guidance_scale"]) for one in found if one] == [
        (["a red thing"], 0, 2.5),
        (["a cup"], 1, 2.5),
        (["a red thing"], 2, 2.5),
    ]
    times = [file.stat().st_mtime_ns for file in files]
    run(model, out, **values, max_steps=2)
    assert [file.stat().st_mtime_ns for file in files] == times
    files[1].write_bytes(b"mine")
    with pytest.raises(FileExistsError, match=r"000001.png was not drawn by latentdiff"):
        run(model, out, **values, max_steps=3)
    assert files[1].read_bytes() == b"mine"


def test_trajectories_need_prompts_and_no_pictures(model: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"a {i}\n" for i in range(40)), encoding="utf-8")
    out = run(model, tmp_path / "out", prompts=str(prompts), method="trajectory", few_steps=2)
    assert not (out / "training" / "teacher_pictures").exists()
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "distilled to 2 steps (trajectory)" in card
    assert re.search(r"on 3\d captions in 3 optimizer steps", card)
    assert re.search(r"\| val_loss \| 0\.\d", card)


def same_state(a: Path, b: Path) -> bool:
    """Whether the last checkpoints of two runs hold the same weights, of all that learns."""
    one, other = (sorted((run / "training" / "checkpoints").glob("step-*"))[-1] for run in (a, b))
    pairs = [(load_file(file), load_file(other / file.name)) for file in one.glob("*.safetensors")]
    return one.name == other.name and all(
        x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x) for x, y in pairs
    )


@pytest.mark.parametrize(
    "method", [method if method == "lcm" else pytest.param(method, marks=pytest.mark.slow) for method in METHODS]
)
def test_resumes_exactly(pictures: Path, model: Path, tmp_path: Path, method: str) -> None:
    common = {**METHODS[method], "data": str(pictures), "sample_every": 100}
    straight = run(model, tmp_path / "a", **common)
    run(model, tmp_path / "b", **{**common, "max_steps": 2})
    resumed = run(model, tmp_path / "b", **common)
    assert same_state(straight, resumed)


@pytest.mark.slow
@forks
@pytest.mark.parametrize("method", ["trajectory", "lcm"])
def test_kills_change_nothing_of_a_flow_that_is_distilled(pictures: Path, tmp_path: Path, method: str) -> None:
    save_flow(tmp_path / "model")
    common = {**METHODS[method], "data": str(pictures), "max_steps": 6, "checkpoint_every": 1}
    calm_and_killed(lambda name: run(tmp_path / "model", tmp_path / name, **common), tmp_path / "log.txt")
    calm, killed = (unet(tmp_path / name) for name in ("calm", "killed"))
    assert all(torch.equal(killed[name], one) for name, one in calm.items())


@pytest.mark.slow
@forks
@pytest.mark.parametrize("method", [*METHODS, "trajectory of a flow", "lcm of a flow", "dmd of a flow"])
def test_two_processes_do_what_one_does(pictures: Path, model: Path, tmp_path: Path, method: str) -> None:
    method, _, of_flow = method.partition(" ")
    if of_flow:
        save_flow(model)

    def train(name: str, size: int) -> None:
        common = {**METHODS[method], "data": str(pictures), "batch_size": size}
        # not Adam, which makes as much of a gradient that is nearly nothing as of any
        run(model, tmp_path / name, **common, **{"optimizer": "sgd", "learning_rate": 0.1})

    log = tmp_path / "log.txt"
    live(lambda: train("one", 4), log)
    live(lambda: train("two", 2), log, processes=2)
    one, two = unet(tmp_path / "one"), unet(tmp_path / "two")
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-5, rtol=1e-4)
    assert max(float((one[name] - old).abs().max()) for name, old in unet(model).items()) > 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guidance_scale": [5, 2]}, "the smaller first"),
        ({"guidance_scale": 0.5}, "which is none, to 100"),
        ({"guidance_scale": [1, 2, 3]}, "give one number, or two"),
        ({"guidance_scale": [1, 5], "lora_rank": 2}, "a LoRA cannot take a scale"),
        ({"method": "consistency", "guidance_scale": 3}, "guidance_scale does nothing with method=consistency"),
        ({"method": "progressive", "loss": "l2"}, "loss does nothing with method=progressive"),
        ({"method": "progressive", "start_steps": 12}, "start_steps=12 must be few_steps=4, or that doubled"),
        (
            {"method": "progressive", "max_steps": 2000},
            "end before the last of 5 stages of stage_steps=1000 begins; giv",
        ),
        ({"method": "progressive", "start_steps": 512}, "start_steps=512: the teacher takes twice as many, and has"),
        ({"few_steps": 8, "solver_steps": 4}, "few_steps=8 are more than solver_steps=4"),
        (
            {"method": "trajectory", "teacher_substeps": 251},
            "teacher_substeps=251 in each of few_steps=4 are more than",
        ),
        ({"method": "trajectory", "prompt_pictures": 5}, "prompt_pictures does nothing with method=trajectory"),
        ({"method": "trajectory", "noise_offset": 0.1}, "noise_offset does nothing with method=trajectory"),
        ({"own_states_after": 0.1}, "own_states_after does nothing with method=lcm; it is for trajectory"),
        ({"solver_steps": 2000}, "solver_steps=2000 are more than the teacher's 1000 timesteps"),
        ({"prompts": "p.txt"}, "one of the two"),
        ({"data": ""}, "one of the two"),
        ({"method": "turbo"}, "setting 'method'"),
        ({"resolution": 17}, "resolution 17 is not divisible"),
    ],
)
def test_settings_that_cannot_be(model: Path, tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(model, tmp_path / "out", **{"data": "nowhere", **changes})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "there are no prompts in it"), (b"\xff\xfe\x00", "p.txt"), (None, "p.txt")]
)
def test_prompts_that_cannot_be_read(model: Path, tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "p.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(model, tmp_path / "out", prompts=str(file))
    assert not (tmp_path / "out").exists()


def test_teachers_that_cannot_be(pictures: Path, tmp_path: Path) -> None:
    told = save_tiny(tmp_path / "told", time_cond_proj_dim=8)
    with pytest.raises(ValueError, match="takes the guidance scale as a condition, so it was distilled already"):
        run(told, tmp_path / "out", data=str(pictures))
    varied = save_tiny(tmp_path / "varied", out_channels=8)
    with pytest.raises(ValueError, match="its UNet predicts 8 channels for latents with 4"):
        run(varied, tmp_path / "out", data=str(pictures))
    save_flow(tmp_path / "flow")
    with pytest.raises(ValueError, match="solver_steps=2000 are more than the teacher's 1000"):
        run(tmp_path / "flow", tmp_path / "out", data=str(pictures), solver_steps=2000)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_student_of_a_flow_is_fine_tuned_to_many_steps(pictures: Path, tmp_path: Path) -> None:
    few = tiny_pipeline("clip")
    few.scheduler = RectifiedFlow(2.0).renoising_scheduler(4, 1000)
    few.register_defaults(num_inference_steps=4, guidance_scale=1.0)
    few.save_pretrained(tmp_path / "few")
    values = {"data": str(pictures), "lora_rank": 2, "max_steps": 1, "batch_size": 2, "output": str(tmp_path / "out")}
    tuned = TextToImagePipeline.from_pretrained(
        finetune(FinetuneSettings.load(None, {**values, "model": str(tmp_path / "few")}))
    )
    assert (type(tuned.scheduler), tuned.defaults) == (diffusers.DPMSolverMultistepScheduler, UNDISTILLED)
    assert tuned.scheduler.config.flow_shift == 2.0


def test_a_student_is_fine_tuned_to_many_steps_or_not_at_all(pictures: Path, tmp_path: Path) -> None:
    few = tiny_pipeline("clip")
    few.scheduler = diffusers.LCMScheduler.from_config(few.scheduler.config)
    few.register_defaults(num_inference_steps=4, guidance_scale=1.0)
    few.save_pretrained(tmp_path / "few")
    values = {"data": str(pictures), "lora_rank": 2, "max_steps": 1, "batch_size": 2, "output": str(tmp_path / "out")}
    out = finetune(FinetuneSettings.load(None, {**values, "model": str(tmp_path / "few")}))
    tuned = TextToImagePipeline.from_pretrained(out)
    assert (type(tuned.scheduler), tuned.defaults) == (diffusers.DDIMScheduler, UNDISTILLED)
    assert tuned.scheduler.config.prediction_type == "v_prediction"
    told = save_tiny(tmp_path / "told", time_cond_proj_dim=8)
    with pytest.raises(ValueError, match="fine-tune the model that it was made from, then 'latentdiff distill' that"):
        finetune(FinetuneSettings.load(None, {**values, "model": str(told), "output": str(tmp_path / "other")}))
    assert not (tmp_path / "other").exists()


def test_another_teacher_does_not_go_on(pictures: Path, model: Path, tmp_path: Path) -> None:
    out = run(model, tmp_path / "out", data=str(pictures), max_steps=2)
    other = tiny_pipeline("clip")
    torch.nn.init.ones_(other.unet.conv_out.bias)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="another teacher than before"):
        run(tmp_path / "other", out, data=str(pictures))


def test_a_teacher_of_few_steps_is_warned_of(pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipeline = tiny_pipeline("clip")
    pipeline.register_defaults(num_inference_steps=4, guidance_scale=1.0)
    pipeline.save_pretrained(tmp_path / "few")
    with caplog.at_level(logging.WARNING, "latentdiff"):
        out = run(tmp_path / "few", tmp_path / "out", data=str(pictures), max_steps=1)
    said = "few draws in 4 steps without guidance, so it was distilled already"
    assert caplog.text.count(said) == 2  # before and after
    assert caplog.text.count("In 4 steps this student is at best as good as that, so nothing is gained") == 2
    card = (out / "README.md").read_text()
    assert said in card
    assert unet(out).keys() == unet(tmp_path / "few").keys()  # no scale to be told
