"""What the training commands share on the command line."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from latentdiff.interchange.data_places import check_data
from latentdiff.interchange.hub import check_on_hub
from latentdiff.pipelines.commands.model_options import be_quiet
from latentdiff.pipelines.storage.places import local_place
from latentdiff.terminal import say
from latentdiff.training.settings import DataSettings, HeldOutSettings, RunSettings, Settings

LARGE_RATE = 0.1  # of Adam

SettingsT = TypeVar("SettingsT", bound=Settings)
RunT = TypeVar("RunT", bound=RunSettings)

Data = Annotated[
    str | None,
    typer.Option(help="Folder with metadata.jsonl/.csv/.parquet or .txt captions, *.tar shards, or a dataset's name."),
]
Output = Annotated[Path | None, typer.Option(help="Folder for the model; its training/ keeps checkpoints and samples.")]
Config = Annotated[
    Path | None, typer.Option(help="YAML file of settings; data and output may be in it.", exists=True, dir_okay=False)
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Begin, say what time, memory and disk it would take, and write nothing in OUTPUT."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Settings, over the file's; 'latentdiff settings' shows them."),
]


def parse_overrides(arguments: list[str]) -> dict[str, str]:
    """``key=value`` arguments as a dictionary.

    Raises:
        ValueError: an argument without ``=``, or a key given twice.
    """
    values: dict[str, str] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or not key:
            of_file = f", and their file is --config {argument}" if argument.endswith((".yaml", ".yml")) else ""
            raise ValueError(f"{argument!r}: settings are written key=value{of_file}")
        if key in values:
            raise ValueError(f"setting {key!r} is given twice")
        values[key] = value
    return values


def load_settings(
    kind: type[SettingsT], file: str | Path | None, overrides: list[str] | None, **options: str | Path | None
) -> SettingsT:
    """Settings from a YAML file, ``key=value`` arguments, and those that have options of their own (None: not given).

    Where they go on with a run, what is not given is as the run has it; that is said.

    Raises:
        ValueError: a setting is given twice, or see `Settings.load`.
    """
    given: dict[str, Any] = dict(parse_overrides(overrides or []))
    for key, value in options.items():
        if value is not None and key in given:
            raise ValueError(f"setting {key!r} is given twice")
        given.setdefault(key, str(value) if isinstance(value, Path) else value)
    values = kind.values_of(file, given)
    if issubclass(kind, RunSettings) and isinstance(values.get("output"), str):
        return continued(kind, values)
    return kind.of(values)


def continued(kind: type[SettingsT], values: dict[str, Any]) -> SettingsT:
    """Settings of `values`, and for the rest of the run in their output, if there is one.

    Raises:
        ValueError: they cannot be, or not together.
    """
    output = Path(values["output"])
    if not any((output.expanduser() / "training" / "checkpoints").glob("step-*")):
        return kind.of(values)
    from latentdiff.training.loop.output_folder import check_resumable, given_before, is_usual

    assert issubclass(kind, RunSettings)
    before = {key: value for key, value in given_before(output, kind).items() if key not in values}
    try:
        settings = kind.of({**before, **values})
    except ValueError as error:
        refuse_alone(
            kind, output, {key: before[key] for key in before if kind.model_fields[key].is_required()} | values
        )
        raise ValueError(f"{error}\nWhat was not given is as the run in {output} has it: {', '.join(before)}") from None
    check_resumable(output.expanduser() / "training", settings, {}, settings.unsettled)
    taken = [f"{key}={value}" for key, value in before.items() if not is_usual(kind, key, value)]
    if taken and is_first_process():
        shown = ", ".join(taken)
        say(f"Going on with the run in {output}; what was not given is as it was there: {shown}")
    return settings


def refuse_alone(kind: type[RunT], output: Path, values: dict[str, Any]) -> None:
    """Raises ValueError if `values` by themselves are not for this run, such as those of another method."""
    from latentdiff.training.loop.output_folder import check_resumable

    try:
        settings = kind.of(values)
    except ValueError:
        return
    check_resumable(output / "training", settings, {}, set(kind.fixed) - settings.model_fields_set | {"max_steps"})


def begin(settings: DataSettings | HeldOutSettings) -> None:
    """Refuse data and models that there are not, before anything heavy is loaded; then `show_progress`.

    Raises:
        FileNotFoundError, ValueError, OSError: there is no such folder, file, dataset or model.
    """
    data, model = getattr(settings, "data", ""), getattr(settings, "model", None)
    if data:
        check_data(data)
    if model is not None and local_place(model) is None:
        check_on_hub(model)
    show_progress()
    rate, optimizer = getattr(settings, "learning_rate", 0.0), getattr(settings, "optimizer", "")
    if optimizer.startswith("adam") and rate >= LARGE_RATE and is_first_process():
        say(
            f"learning_rate={rate:g} is very large: with {optimizer} every weight moves by about as much in each step, "
            f"and little is left of the model; usual are 1e-5 to 1e-3",
            err=True,
        )


def show_progress() -> None:
    """Show the package's messages, of one process if there are several, and its own progress bars only."""
    be_quiet()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if is_first_process():
        logging.getLogger("latentdiff").setLevel(logging.INFO)


def train_and_say(what: str, train: Callable[[RunT], Path], settings: RunT, dry: bool) -> None:
    """Train, or only begin and say what it would take.

    At the end one process says where the result, a `what`, is; a run that has stopped before has said that.
    """
    from latentdiff.training.loop.checkpoints import step_reached
    from latentdiff.training.loop.estimate import dry_run
    from latentdiff.training.loop.stopping import in_order

    def stopped(reason: str) -> None:
        step = step_reached(Path(settings.output))
        where = f"; the run is saved up to step {step}" if step else " before a step was saved"
        again = "go on" if step and not dry else "begin anew"
        if is_first_process():
            say(f"Stopped by {reason}{'' if dry else where}. Repeat the command to {again}", err=True)

    if dry:
        with in_order(stopped):
            dry_run(train, settings)
        if is_first_process():
            say(
                f"Nothing was written in {settings.output}. There would be the {what}, its README.md, and in training/ "
                f"checkpoints, samples, curves.png, metrics.jsonl and settings.yaml"
            )
        return
    with in_order(stopped):
        output = train(settings)
    if is_first_process() and step_reached(output) >= settings.max_steps:
        say(f"The {what} is in {output}")


def is_first_process() -> bool:
    """By the environment of torchrun and `accelerate launch`; valid before and after processes have started."""
    return os.environ.get("RANK", "0") == "0"
