import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from latentdiff.cli import application
from latentdiff.codec import Codec
from latentdiff.models.identity import IdentityAutoencoder
from latentdiff.training.commands.settings_arguments import load_settings, parse_overrides
from latentdiff.training.loop.optimizers_and_schedules import learning_rate_at
from latentdiff.training.settings import (
    AutoencoderSettings,
    ClassifierSettings,
    DenoiserSettings,
    DistillationSettings,
    DoctorSettings,
    EvaluationSettings,
    FinetuneSettings,
    PriorSettings,
    Settings,
)
from latentdiff.training.settings.describe import as_yaml, in_full, rows
from latentdiff.training.starting_networks import Conditions, build_classifier, build_denoiser
from latentdiff.training.trainers.denoiser import build_process

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
        ("lrr=4", "unknown setting 'lrr'; did you mean 'lr'"),
        ("lrate=4", "unknown setting 'lrate'; did you mean 'learning_rate'"),
        ("max_train_steps=4", "unknown setting 'max_train_steps'; did you mean 'max_steps'"),
        ("device=cpu", "unknown setting 'device'; a training takes a GPU if there is one; CUDA_VISIBLE_DEVICES=1 "),
        ("epochs=3", "unknown setting 'epochs'; a training is counted in steps: max_steps"),
        ("batch_size=four", "setting 'batch_size'.*'four'"),
        ("batch_size=0", "setting 'batch_size'"),
        ("learning_rate=-1", "setting 'learning_rate'"),
        ("kind=gan", "setting 'kind'"),
        ("warmup_steps=20000", "warmup_steps"),
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


def test_a_shorter_run_shortens_what_its_config_counts_in_steps(tmp_path: Path) -> None:
    file = tmp_path / "long.yaml"
    file.write_text("max_steps: 10000\nwarmup_steps: 100\ndecay_steps: 2500\ndiscriminator_start: 6000\n", "utf-8")

    def steps(**given: str) -> tuple[int, ...]:
        settings = AutoencoderSettings.load(file, {**NEEDED, **given})
        return settings.max_steps, settings.warmup_steps, settings.decay_steps, settings.discriminator_start

    assert steps() == (10000, 100, 2500, 6000)
    assert steps(max_steps="300") == (300, 3, 75, 180)
    assert steps(steps="300", warmup_steps="20") == (300, 20, 75, 180)
    assert steps(max_steps="20000") == (20000, 100, 2500, 6000)
    assert (
        AutoencoderSettings.load(None, {**NEEDED, "max_steps": 300}).discriminator_start == 2000
    )  # no config: as ever


def test_min_snr_is_off_where_pure_noise_would_not_count() -> None:
    given = {**NEEDED, "autoencoder": "pixels"}
    assert DenoiserSettings.load(None, given).min_snr_gamma is None
    assert DenoiserSettings.load(None, {**given, "zero_terminal_snr": False}).min_snr_gamma == 5
    assert DenoiserSettings.load(None, {**given, "prediction_type": "epsilon"}).min_snr_gamma == 5
    assert DenoiserSettings.load(None, {**given, "min_snr_gamma": 5.0}).min_snr_gamma == 5


def test_defaults_follow_what_they_depend_on() -> None:
    def warmup(**given: int) -> int:
        return AutoencoderSettings.load(None, {**NEEDED, **given}).warmup_steps

    assert [warmup(max_steps=50), warmup(max_steps=50, decay_steps=50), warmup(max_steps=5)] == [5, 0, 0]
    assert [warmup(), warmup(max_steps=100), warmup(max_steps=120, decay_steps=20)] == [100, 100, 100]  # as ever
    with pytest.raises(ValueError, match="warmup_steps=60 and decay_steps=0 are more than max_steps=50"):
        warmup(max_steps=50, warmup_steps=60)
    with pytest.raises(ValueError, match="decay_steps=60 are more than max_steps=50"):
        warmup(max_steps=50, decay_steps=60)
    denoiser = {**NEEDED, "autoencoder": "pixels"}
    two = DenoiserSettings.load(None, {**denoiser, "block_out_channels": "[24, 48]"})
    assert (two.attention_levels, two.norm_num_groups) == ((True, True), 8)
    four = ClassifierSettings.load(None, {**NEEDED, "model": "m", "block_out_channels": "[32, 64, 64, 64]"})
    assert (four.attention_levels, four.norm_num_groups) == ((False, True, True, True), 32)
    assert AutoencoderSettings.load(None, {**NEEDED, "block_out_channels": "[8, 16]"}).norm_num_groups == 8
    with pytest.raises(ValueError, match=r"warmup_steps=20000 .*max_steps=10000; that is the default, give a larger"):
        warmup(warmup_steps=20_000)
    with pytest.raises(ValueError, match="must have the same length: 2 and 1 levels"):
        DenoiserSettings.load(None, {**denoiser, "block_out_channels": "8", "attention_levels": "[true, false]"})


@pytest.mark.parametrize(
    ("given", "follows"),
    [
        ({"prediction_type": "epsilon"}, {"zero_terminal_snr": False}),
        ({"prediction_type": "epsilon", "zero_terminal_snr": True}, {"zero_terminal_snr": True}),  # and is refused
        ({"prediction_type": "sample"}, {"zero_terminal_snr": True}),
        ({"num_train_timesteps": 10}, {"sample_steps": 10}),
        ({"num_train_timesteps": 10, "sample_steps": 5}, {"sample_steps": 5}),
        ({"condition": "none", "block_out_channels": "[24, 48]"}, {"attention_head_dim": 24}),
        ({"condition": "none", "block_out_channels": "[24, 96]", "attention_levels": "[false, true]"}, {}),
        ({"condition": "none", "block_out_channels": "[24, 48]", "attention_head_dim": 8}, {"attention_head_dim": 8}),
        ({"block_out_channels": "[24, 48]"}, {"attention_head_dim": 64}),
    ],
)
def test_one_setting_alone_is_not_made_impossible_by_a_default(given: dict[str, Any], follows: dict[str, Any]) -> None:
    settings = DenoiserSettings.load(None, {**NEEDED, "autoencoder": "pixels", **given})
    usual = {"attention_head_dim": 64, "sample_steps": 20}
    assert {name: getattr(settings, name) for name in {**usual, **follows}} == {**usual, **follows}
    codec = Codec(IdentityAutoencoder())
    if given.get("zero_terminal_snr"):
        with pytest.raises(ValueError, match="zero terminal SNR"):
            build_process(settings, codec)
        return
    conditions = Conditions(text_width=8) if settings.condition == "text" else Conditions()
    build_denoiser(settings, codec, build_process(settings, codec), conditions)


@pytest.mark.parametrize(
    ("channels", "width"), [("[24]", 8), ("[24, 48]", 16), ("[8, 16, 32, 64]", 16), ("[64, 128, 192]", 32)]
)
def test_a_classifiers_heads_follow_its_channels(channels: str, width: int) -> None:
    given = {**NEEDED, "model": "m", "block_out_channels": channels, "resolution": 32}
    settings = ClassifierSettings.load(None, given)
    assert settings.attention_head_dim == width
    build_classifier(settings, Codec(IdentityAutoencoder()), 3)


@pytest.mark.parametrize("name", ["two-cores", "one-gpu", "many-gpus"])
def test_the_settings_of_the_documentation(name: str) -> None:
    file = Path(__file__).parents[3] / "docs" / "examples" / "settings" / f"{name}.yaml"
    settings = FinetuneSettings.load(file, NEEDED)
    assert settings.max_steps >= 400
    assert f"examples/settings/{name}.yaml" in (file.parents[2] / "finetuning.md").read_text(encoding="utf-8")


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
    with pytest.raises(ValueError, match=r"setting 'report_to\.0': 'tensorboard' or 'wandb' is expected"):
        DenoiserSettings.load(None, {**given, "report_to": "tensorbord"})


def test_no_more_timesteps_than_tables_can_have() -> None:
    with pytest.raises(ValueError, match=r"setting 'num_train_timesteps': it must be at most 100000"):
        DenoiserSettings.load(None, {**NEEDED, "autoencoder": "a", "num_train_timesteps": "1000000000"})


KINDS = [
    AutoencoderSettings,
    DenoiserSettings,
    ClassifierSettings,
    PriorSettings,
    FinetuneSettings,
    DistillationSettings,
    DoctorSettings,
]
DOES_NOTHING = type(None)  # of a setting of the base class, which is not listed


@pytest.mark.parametrize("kind", KINDS)
def test_every_setting_is_described(kind: type[Settings]) -> None:
    text = as_yaml(kind, "title")
    assert yaml.safe_load(text) is None
    fields = {name: field for name, field in kind.model_fields.items() if field.annotation is not DOES_NOTHING}
    said = {row.name: row for row in rows(kind)}
    for name, field in fields.items():
        assert said[name].meaning, f"{name} needs a description"
        assert said[name].when.endswith("."), f"{name} does not say when to change it"
        assert f"\n#{name}:" in text, name
        assert field.is_required() or name in yaml.safe_load(re.search(rf"^#({name}: .*)$", text, re.M)[1])  # type: ignore[index]
    values = yaml.safe_load(re.sub(r"^#(?=\w)", "", text, flags=re.M))
    needed = {name: "x" for name, field in kind.model_fields.items() if field.is_required() or name == "data"}
    assert kind.load(None, {**values, **needed}) == kind.load(None, needed)


def test_of_a_few_settings_it_is_said_when_to_change_them() -> None:
    command = ["settings", "finetune", "lr", "batch_size"]
    text = CliRunner().invoke(application(), command).output
    assert text == in_full(FinetuneSettings, ["learning_rate", "batch_size"])
    assert yaml.safe_load(text) is None
    assert re.findall("^#(\\w+): ", text, re.MULTILINE) == ["learning_rate", "batch_size"]
    assert "also lr)\n#\n# When to change it: " in text
    result = CliRunner().invoke(application(), ["settings", "finetune", "learning_rat"])
    assert str(result.exception) == "unknown setting 'learning_rat'; did you mean 'learning_rate'?"


def test_descriptions_say_type_default_and_other_names() -> None:
    text = as_yaml(FinetuneSettings, "title")
    assert "(whole number, at least 1; also batch)\n#batch_size: 4\n" in text
    assert "(*.tar), or a datasets folder or name (text; needed)\n#data:\n" in text
    assert "(list of: tensorboard or wandb)\n#report_to: []\n" in text
    assert "(number, above 0, or null)\n#max_minutes: null\n" in text


def test_settings_have_other_names(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("lr: 0.1\nsteps: 7\nwarmup_steps: 0\nrank: 3\n", encoding="utf-8")
    settings = FinetuneSettings.load(file, {**NEEDED, **parse_overrides(["learning_rate=0.2", "batch=2", "alpha=5"])})
    assert (settings.learning_rate, settings.max_steps, settings.batch_size) == (0.2, 7, 2)
    assert (settings.lora_rank, settings.lora_alpha) == (3, 5)
    with pytest.raises(ValueError, match="setting 'learning_rate' is given twice, as 'lr' too"):
        FinetuneSettings.load(None, {**NEEDED, "lr": "1", "learning_rate": "2"})
    assert EvaluationSettings.load(None, {"model": "m", "data": "d", "steps": 4}).steps == 4  # has one of that name
    with pytest.raises(ValueError, match="unknown setting 'rank'; 'latentdiff settings autoencoder' shows them all"):
        AutoencoderSettings.load(None, {**NEEDED, "rank": 4})


def test_one_value_is_a_list_of_one() -> None:
    given = {**NEEDED, "sample_prompts": "a cat", "lora_targets": "to_q", "report_to": "wandb"}
    settings = FinetuneSettings.load(None, given)
    assert (settings.sample_prompts, settings.lora_targets, settings.report_to) == (("a cat",), ("to_q",), ("wandb",))
    values = {**NEEDED, "block_out_channels": "32", "attention_levels": "true"}
    settings_of_one = AutoencoderSettings.load(None, values)
    assert (settings_of_one.block_out_channels, settings_of_one.attention_levels) == ((32,), (True,))


def test_data_and_output_may_be_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("data: a\noutput: b\n", encoding="utf-8")
    settings = load_settings(FinetuneSettings, file, [], data=None, output=Path("c"))
    assert (settings.data, settings.output) == ("a", "c")
    with pytest.raises(ValueError, match="setting 'output' is needed: --output, or output: in the file of --config"):
        load_settings(FinetuneSettings, None, [], data="a", output=None)
    for program in (["finetune"], ["train", "denoiser"], ["train", "autoencoder"], ["train", "classifier"], ["doctor"]):
        result = CliRunner().invoke(application(), program)
        assert "setting 'data' is needed" in str(result.exception)
    text = CliRunner().invoke(application(), ["settings", "denoiser"]).output
    assert text == as_yaml(DenoiserSettings, "Settings of 'latentdiff train denoiser', with their defaults.")
