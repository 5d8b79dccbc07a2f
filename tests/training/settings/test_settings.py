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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: x\noutput: [y\nseed: 1\n", r"run\.yaml, line 3: not YAML"),
        ("data: x\noutput: y\n\tseed: 1\n", r"run\.yaml, line 3: not YAML"),
        ("data: !!python/object:os.system x\n", r"run\.yaml, line 1: not YAML"),
        ("[" * 10_000, r"run\.yaml: YAML that is nested too deeply"),
        ("- data\n", r"run\.yaml: expected 'key: value' lines, found a list"),
        ("data: &a [*a]\noutput: y\n", r"run\.yaml: .*its anchors and aliases stand for too many values"),
        ("data: \x07\n", r"run\.yaml: not YAML"),
    ],
)
def test_a_file_that_is_no_yaml_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        AutoencoderSettings.load(file, NEEDED)


def test_anchors_do_not_grow_in_a_message(tmp_path: Path) -> None:
    """Each line is nine times the one before: a few lines stand for gigabytes, written out."""
    lines = ["a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    file = tmp_path / "run.yaml"
    file.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(ValueError, match=r"run\.yaml: .*its anchors and aliases stand for too many values"):
        AutoencoderSettings.load(file, NEEDED)


def test_messages_stay_short(tmp_path: Path) -> None:
    for given in ({f"key{i}": "1" for i in range(500)}, {"x" * 100_000: "1"}, {"kind": "y" * 100_000}):
        with pytest.raises(ValueError, match=r"setting '|unknown setting") as error:
            AutoencoderSettings.load(None, {**NEEDED, **given})
        assert len(str(error.value)) < 3_000
    with pytest.raises(ValueError, match="and 490 more"):
        AutoencoderSettings.load(None, {**NEEDED, **{f"key{i}": "1" for i in range(500)}})


def test_an_override_that_is_no_yaml_is_named() -> None:
    with pytest.raises(ValueError, match="setting 'block_out_channels', line 1: not YAML"):
        AutoencoderSettings.load(None, {**NEEDED, "block_out_channels": "[16, 32"})


def test_one_value_is_enough_where_several_are_taken() -> None:
    given = {
        **NEEDED,
        **parse_overrides(["report_to=tensorboard", "sample_prompts=a cat, a dog", "attention_levels=true"]),
    }
    given |= {"autoencoder": "a", "block_out_channels": "[32]"}
    settings = DenoiserSettings.load(None, given)
    assert settings.report_to == ("tensorboard",)
    assert settings.sample_prompts == ("a cat, a dog",)
    assert settings.attention_levels == (True,)
    with pytest.raises(ValueError, match=r"setting 'report_to\.0': Input should be 'tensorboard' or 'wandb'"):
        DenoiserSettings.load(None, {**given, "report_to": "tensorbord"})


def test_no_more_timesteps_than_tables_can_have() -> None:
    with pytest.raises(ValueError, match=r"setting 'num_train_timesteps': .* less than or equal to 100000"):
        DenoiserSettings.load(None, {**NEEDED, "autoencoder": "a", "num_train_timesteps": "1000000000"})
