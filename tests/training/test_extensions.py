"""Processes and denoisers of files outside the package: trained, saved, loaded, drawn from, replayed and evaluated."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import DENOISER, autoencoder_settings

from latentdiff.extensions import load_extensions, register_network, registered_network
from latentdiff.training import starting_networks as networks
from latentdiff.training.settings import DenoiserSettings
from latentdiff.training.trainers.autoencoder import train_autoencoder
from latentdiff.training.trainers.denoiser import train_denoiser

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
PROGRAM = """
import sys
from latentdiff.cli import application
for line in sys.stdin.read().splitlines():
    application()(line.split("\\t"), standalone_mode=False)
"""
UNET = {"block_out_channels", "attention_levels", "attention_head_dim", "norm_num_groups"}


def outside(extension: str, *commands: list[str]) -> str:
    """What ``latentdiff --extension`` prints for each of the commands, in a process of its own."""
    lines = "\n".join("\t".join(["--extension", str(EXAMPLES / extension), *command]) for command in commands)
    done = subprocess.run([sys.executable, "-c", PROGRAM], input=lines, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", ["straight_flow", "patch_mixer"])
def test_an_example_goes_all_the_way(name: str, pictures: Path, text_encoder: Path, tmp_path: Path) -> None:
    autoencoder = train_autoencoder(autoencoder_settings(pictures, tmp_path / "autoencoder", max_steps=2))
    model, drawing, again = (str(tmp_path / part) for part in ("model", "a.png", "b.png"))
    chosen = {
        "straight_flow": ["process=straight_flow", "process_options={shift: 2.0}"],
        "patch_mixer": ["denoiser=mixer", "denoiser_options={width: 16}"],
    }[name]
    small = {key: value for key, value in DENOISER.items() if name == "straight_flow" or key not in UNET}
    settings = [f"{key}={list(value) if isinstance(value, tuple) else value}" for key, value in small.items()]
    train = ["train", "denoiser", "--data", str(pictures), "--autoencoder", str(autoencoder), "--output", model]
    said = outside(
        f"{name}.py",
        [*train, f"text_encoder={text_encoder}", *chosen, *settings, "max_steps=3"],
        ["generate", "a red thing", "--model", model, "-o", drawing],
        ["replay", drawing, "-o", again],
        ["evaluate", model, "--data", str(pictures), "--split", "train", "--steps", "2", "--count", "4"],
    )
    assert f"The pipeline is in {model}" in said
    assert (tmp_path / "model/evaluation/evaluation.json").is_file()
    assert Path(drawing).read_bytes() == Path(again).read_bytes()
    if name == "patch_mixer":  # a folder alone does not choose what code is run
        refused = subprocess.run(
            [sys.executable, "-m", "latentdiff", "generate", "a red thing", "--model", model, "-o", again],
            capture_output=True,
            text=True,
            check=False,
        )
        assert "unet is of 'patch_mixer'" in refused.stderr


def test_the_objective_of_the_page_is_trained(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (EXAMPLES.parent / "extending.md").read_text()
    program = next(part for part in page.split("```python\n") if part.startswith("import torch")).split("```")[0]
    monkeypatch.chdir(tmp_path)
    assert pictures == tmp_path / "pictures"
    names: dict[str, Any] = {"__name__": __name__}
    exec(program, names)
    assert names["run"].step == 20
    assert names["objective"].colour.abs().max() > 0


def test_a_mixer_takes_latents_of_one_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "_DENOISERS", {**networks._DENOISERS})
    monkeypatch.setattr("latentdiff.extensions._NETWORKS", {})
    load_extensions([str(EXAMPLES / "patch_mixer.py")])
    mixer = sys.modules.pop("patch_mixer").PatchMixer()
    given = torch.zeros(1, dtype=torch.long), torch.zeros(1, 3, 16)
    assert mixer(torch.zeros(1, 4, 8, 8), *given).sample.shape == (1, 4, 8, 8)
    with pytest.raises(ValueError, match=r"takes latents of 8 x 8, not \(8, 12\)"):
        mixer(torch.zeros(1, 4, 8, 12), *given)


def test_networks_are_found_by_module_and_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latentdiff.extensions._NETWORKS", {})
    assert registered_network(__name__, "Mine") is None

    @register_network
    class Mine:
        pass

    assert registered_network(Mine.__module__, "Mine") is Mine


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"process": "curved"},
            r"no process 'curved'; there are gaussian, flow, and those of modules given by --extension",
        ),
        ({"denoiser": "mixed"}, r"no denoiser 'mixed'; there are unet, dit"),
        ({"process": "curved", "prediction_type": "sample"}, r"prediction_type is for process=gaussian"),
        ({"denoiser": "mixed", "layers_per_block": 2}, r"layers_per_block is for denoiser=unet"),
        ({"process_options": {"shift": 2}}, r"process_options are for another process"),
    ],
)
def test_what_does_nothing_is_refused(pictures: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    values = {"data": str(pictures), "output": str(tmp_path / "out"), "autoencoder": "pixels", "condition": "none"}
    with pytest.raises(ValueError, match=message):
        train_denoiser(DenoiserSettings.load(None, {**values, "resolution": 16, **changes}))


def test_options_that_a_network_does_not_take() -> None:
    with pytest.raises(ValueError, match=r"denoiser_options of denoiser=toy: .*'depth'"):
        networks.made_by({"toy": lambda width=1: width}, "denoiser", "toy", depth=3)
    assert networks.made_by({"toy": lambda width=1: width}, "denoiser", "toy", width=3) == 3
