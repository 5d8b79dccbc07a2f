"""Settings as people read them: a YAML file with all of them in it, commented out, each with its meaning and type."""

import textwrap
from collections.abc import Iterator
from typing import Any, NamedTuple

import yaml

from latentdiff.training.settings.base import ALIASES, Settings

WIDTH = 100
NAMES = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false"}


def as_yaml(kind: type[Settings], title: str) -> str:
    """Every setting of `kind` in their order, the file's first line being `title`; it loads as no settings at all."""
    head = "Take the # away before a key to set it, and give the file with --config FILE; or give key=value."
    return "\n".join([f"# {title}", f"# {head}", *_lines(kind)]) + "\n"


def _lines(kind: type[Settings]) -> Iterator[str]:
    for row in rows(kind):
        yield ""
        yield from textwrap.wrap(f"{row.meaning} ({row.type})", WIDTH, initial_indent="# ", subsequent_indent="#   ")
        yield f"#{row.name}:" if row.default is None else f"#{row.name}: {row.default}"


class Row(NamedTuple):
    """What is said of a setting."""

    name: str
    meaning: str
    type: str
    """Its type and limits, whether it is needed, and its other names."""
    default: str | None
    """As YAML; None where one has to be given."""


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
        yield Row(name, description(kind, name), f"{type_name(about)}{needed}{also}", default)


def description(kind: type[Settings], name: str) -> str:
    """Of a setting; what a class takes over with another default keeps that of its base."""
    for base in kind.__mro__:
        field = getattr(base, "model_fields", {}).get(name)
        if field is not None and field.description:
            return str(field.description)
    return ""


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
