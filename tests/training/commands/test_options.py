"""What is said of options that a command of training or measuring has not."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from latentdiff.cli import application
from latentdiff.training.commands.settings_arguments import begin
from latentdiff.training.settings import FinetuneSettings


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("evaluate emoji --max-pictures 3", "evaluate has no option --max-pictures: here it is --count"),
        ("likelihood m --num-inference-steps=3", "likelihood has no option --num-inference-steps: here it is --steps"),
        ("finetune --max-steps 3", "finetune has no option --max-steps: settings are given as max_steps=VALUE"),
        ("train autoencoder --lr 3", "autoencoder has no option --lr: settings are given as lr=VALUE"),
        ("doctor d --resolution 3", "doctor has no option --resolution: settings are given as resolution=VALUE"),
    ],
)
def test_it_is_said_how_it_is_given(command: str, said: str) -> None:
    result = CliRunner().invoke(application(), command.split())
    assert isinstance(result.exception, ValueError)
    assert said in str(result.exception)


@pytest.mark.parametrize("command", ["finetune --guidance 3", "likelihood m --guidance-scale 3", "evaluate --datta x"])
def test_what_is_nothing_is_refused_as_ever(command: str) -> None:
    result = CliRunner().invoke(application(), command.split())
    assert result.exit_code == 2
    assert "No such option" in result.output


def test_settings_without_a_command_lists_them() -> None:
    result = CliRunner().invoke(application(), ["settings"])
    assert result.exit_code == 0
    assert "latentdiff settings denoiser      of 'latentdiff train denoiser'" in result.output


def test_a_learning_rate_that_destroys_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for rate, warned in ((5.0, True), (1e-3, False)):
        begin(FinetuneSettings(data=str(tmp_path), output="out", learning_rate=rate))
        assert (f"learning_rate={rate:g} is very large" in capsys.readouterr().err) is warned
