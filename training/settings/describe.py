"""Settings as people read them: a YAML file with all of them in it, commented out, each with its meaning and type.

Of a few, and on the documentation's pages, also when to change them.
"""

import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import yaml

from latentdiff.training.settings.base import ALIASES, Settings

WIDTH = 100
NAMES = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false"}


def as_yaml(kind: type[Settings], title: str) -> str:
    """Every setting of `kind` in their order, the file's first line being `title`; it loads as no settings at all."""
    head = "Take the # away before a key to set it, and give the file with --config FILE; or give key=value."
    more = f"When to change one of them: latentdiff settings {kind.command()} NAME"
    lines = (line for row in rows(kind) for line in _lines(row))
    return "\n".join([f"# {title}", f"# {head}", f"# {more}", *lines]) + "\n"


def in_full(kind: type[Settings], names: Sequence[str]) -> str:
    """The settings of these names, or other names, with when to change them, in the form of `as_yaml`.

    Raises:
        ValueError: there is no such setting; the nearest one is named.
    """
    known = {row.name: row for row in rows(kind)}
    lines: list[str] = []
    for name in names:
        key = name if name in known else ALIASES.get(name, name)
        if key not in known:
            raise ValueError(f"unknown setting {name!r}; {kind.hint(name)}")
        *about, value = _lines(known[key])
        lines += [*about, "#", *_wrapped(f"When to change it: {known[key].when}"), value]
    return "\n".join(lines[1:]) + "\n"


def _lines(row: "Row") -> list[str]:
    value = f"#{row.name}:" if row.default is None else f"#{row.name}: {row.default}"
    return ["", *_wrapped(f"{row.meaning} ({row.type})"), value]


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent="# ", subsequent_indent="#   ")


class Row(NamedTuple):
    """What is said of a setting."""

    name: str
    meaning: str
    type: str
    """Its type and limits, whether it is needed, and its other names."""
    default: str | None
    """As YAML; None where one has to be given."""
    when: str
    """When to change it: see `base.when`."""


def rows(kind: type[Settings]) -> Iterator[Row]:
    """Every setting of `kind`, in their order."""
    schema = kind.model_json_schema()
    for name, about in schema["properties"].items():
        if about.get("type") == "null":  # a setting of the base class that does nothing here
            continue
        also = "".join(f"; also {alias}" for alias, key in ALIASES.items() if key == name)
        needed = "; needed" if name in schema.get("required", ()) else ""
        value = yaml.safe_dump(about.get("default"), default_flow_style=True, width=10_000)
        default = None if needed else value.removesuffix("...\n").strip()
        yield Row(
            name,
            nearest(kind, name, lambda field: field.description),
            f"{type_name(about)}{needed}{also}",
            default,
            nearest(kind, name, lambda field: (field.json_schema_extra or {}).get("when")),
        )


def nearest(kind: type[Settings], name: str, said: Callable[[Any], str | None]) -> str:
    """What is `said` of a setting; what a class takes over with another default keeps what its base says."""
    fields = (getattr(base, "model_fields", {}).get(name) for base in kind.__mro__)
    return next((text for field in fields if field is not None and (text := said(field))), "")


def type_name(about: dict[str, Any]) -> str:
    """The type and limits of a value, from its JSON schema."""
    if "anyOf" in about:
        kinds = [type_name(one) for one in about["anyOf"] if one.get("type") != "null"]
        return " or ".join(kinds) + (", or null" if len(kinds) < len(about["anyOf"]) else "")
    if "const" in about or "enum" in about:
        return " or ".join(str(one) for one in about.get("enum", [about.get("const")]))
    if about.get("type") == "array":
        return f"list of: {type_name(about['items'])}"
    if about.get("type") == "object":
        return "key: value"
    words = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    limits = [f"{word} {about[key]:g}" for key, word in words.items() if key in about]
    return ", ".join([NAMES[about["type"]], *limits])
