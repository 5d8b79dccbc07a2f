from pathlib import Path

import pytest

from latentdiff.training.commands.options import parse_overrides
from latentdiff.training.loop.optimization import learning_rate_at
from latentdiff.training.settings import AutoencoderSettings, DenoiserSettings

NEEDED = {"data": "pictures", "output": "model"}


def test_file_then_overrides(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("batch_size: 8\nlearning_rate: 1.0e-3\nblock_out_channels: [16, 32]\n", encoding="utf-8")
    settings = AutoencoderSettings.load(file, {**NEEDED, **parse_overrides(["batch_size=4", "kind=vq"])})
    assert (settings.batch_size, settings.learning_rate, settings.kind) == (4, 1e-3, "vq")
    assert settings.block_out_channels == (16, 32)
    assert settings.factor == 2


def test_saved_settings_load_again(tmp_path: Path) -> None:
    settings = DenoiserSettings.load(None, {**NEEDED, "autoencoder": "a", "sample_prompts": "[a cat, a dog]"})
    settings.save(tmp_path / "settings.yaml")
    assert DenoiserSettings.load(tmp_path / "settings.yaml") == settings
    assert settings.sample_prompts == ("a cat", "a dog")


def test_names_are_taken_as_typed() -> None:
    assert AutoencoderSettings.load(None, {"data": "2024", "output": "no"}).data == "2024"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("bach_size=4", "unknown setting 'bach_size'; did you mean 'batch_size'"),
        ("batch_size=four", "setting 'batch_size'.*'four'"),
        ("batch_size=0", "setting 'batch_size'"),
        ("learning_rate=-1", "setting 'learning_rate'"),
        ("kind=gan", "setting 'kind'"),
        ("max_steps=10", "warmup_steps"),
    ],
)
def test_mistakes_are_explained(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AutoencoderSettings.load(None, {**NEEDED, **parse_overrides([override])})


def test_missing_setting_is_named() -> None:
    with pytest.raises(ValueError, match="setting 'data' is needed"):
        AutoencoderSettings.load(None, {"output": "x"})


def test_overrides_must_be_pairs() -> None:
    with pytest.raises(ValueError, match="written key=value"):
        parse_overrides(["batch_size"])
    with pytest.raises(ValueError, match="given twice"):
        parse_overrides(["a=1", "a=2"])


def test_learning_rate_rises_stays_and_falls() -> None:
    settings = AutoencoderSettings.load(
        None, {**NEEDED, "max_steps": 100, "warmup_steps": 10, "decay_steps": 20, "learning_rate": 1.0}
    )
    assert learning_rate_at(settings, 0) == pytest.approx(0.1)
    assert learning_rate_at(settings, 9) == learning_rate_at(settings, 50) == learning_rate_at(settings, 80) == 1.0
    assert learning_rate_at(settings, 90) == pytest.approx(0.5)
    assert learning_rate_at(settings, 99) == pytest.approx(0.05)


def test_a_bare_no_is_the_choice_no(tmp_path: Path) -> None:
    assert AutoencoderSettings.load(None, {"data": "x", "output": "y", "mixed_precision": "no"}).mixed_precision == "no"
    file = tmp_path / "settings.yaml"
    file.write_text("data: x\noutput: y\nmixed_precision: no\n")
    assert AutoencoderSettings.load(file).mixed_precision == "no"
