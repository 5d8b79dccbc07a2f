"""Settings as people read them: a YAML file with all of them in it, commented out, each with its meaning and type."""

import textwrap
from collections.abc import Iterator
from typing import Any

import yaml

from latentdiff.training.settings.base import ALIASES, Settings

WIDTH = 100
NAMES = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false"}


def as_yaml(kind: type[Settings], title: str) -> str:
    """Every setting of `kind` in their order, the file's first line being `title`; it loads as no settings at all."""
    head = "Take the # away before a key to set it, and give the file with --config FILE; or give key=value."
    return "\n".join([f"# {title}", f"# {head}", *_lines(kind)]) + "\n"


def _lines(kind: type[Settings]) -> Iterator[str]:
    schema = kind.model_json_schema()
    for name, about in schema["properties"].items():
        if about.get("type") == "null":  # a setting of the base class that does nothing here
            continue
        also = "".join(f"; also {alias}" for alias, key in ALIASES.items() if key == name)
        needed = "; needed" if name in schema.get("required", ()) else ""
        text = f"{description(kind, name)} ({type_name(about)}{needed}{also})"
        yield ""
        yield from textwrap.wrap(text, WIDTH, initial_indent="# ", subsequent_indent="#   ")
        value = (
            yaml.safe_dump(about.get("default"), default_flow_style=True, width=10_000).removesuffix("...\n").strip()
        )
        yield f"#{name}:" if needed else f"#{name}: {value}"


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
