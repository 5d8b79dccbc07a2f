"""Commands whose options are declared in classes: a parameter of such a class stands for one option per field."""

import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import wraps
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer
from annotated_types import Ge, Le

from latentdiff.pipelines.batch.options import Option


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """A command for typer, with the fields of its parameters that are dataclasses as options of their own.

    A field's annotation has a ``typer.Option`` or one of our `Option` in it; its default is the option's. Fields of
    several classes must have different names.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        kind = hints[parameter.name]
        if is_dataclass(kind) and isinstance(kind, type):
            groups[parameter.name] = kind
            parameters += parameters_of(kind)
        else:
            parameters.append(parameter.replace(annotation=kind, kind=inspect.Parameter.KEYWORD_ONLY))

    @wraps(command)
    def run(**given: Any) -> None:
        made = {
            name: kind(**{field.name: given.pop(field.name) for field in fields(kind)}) for name, kind in groups.items()
        }
        command(**given, **made)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def parameters_of(options: type) -> list[inspect.Parameter]:
    """A keyword for each field of a dataclass."""
    hints = get_type_hints(options, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=for_typer(field.name, hints[field.name]),
        )
        for field in fields(options)
    ]


def for_typer(name: str, hint: Any) -> Any:
    """An annotation with what typer shows: its own, or made of an `Option` and the limits beside it."""
    if get_origin(hint) is not Annotated:
        raise TypeError(f"the option {name} has no description")
    kind, *notes = get_args(hint)
    option = next((note for note in notes if isinstance(note, Option)), None)
    if option is None:
        return hint
    least: Any = next((note.ge for note in notes if isinstance(note, Ge)), None)
    most: Any = next((note.le for note in notes if isinstance(note, Le)), None)
    flag = option.flag or f"--{name.replace('_', '-')}"
    shown = typer.Option(flag, help=option.help, metavar=option.metavar, min=least, max=most)
    return Annotated[kind, shown]
