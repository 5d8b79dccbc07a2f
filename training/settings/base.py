"""The base of all settings: typed, strict, filled from YAML and ``key=value`` overrides."""

import difflib
import os
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from latentdiff.interchange.atomic import write_text_whole


class Settings(BaseModel):
    """Base of the settings: unknown keys and values of the wrong type are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    @classmethod
    def load(cls, file: str | os.PathLike[str] | None = None, overrides: dict[str, Any] | None = None) -> Self:
        """Settings from a YAML file, then from `overrides` (``None`` values are left out; strings are read as YAML).

        Raises:
            ValueError: an unknown key (the nearest known one is named), or a value of the wrong type or range.
            FileNotFoundError: `file` does not exist.
        """
        values: dict[str, Any] = {}
        if file is not None:
            values = yaml.safe_load(Path(file).read_text(encoding="utf-8")) or {}
            if not isinstance(values, dict):
                raise ValueError(f"{file}: expected 'key: value' lines, found a {type(values).__name__}")
        for key, value in (overrides or {}).items():
            if value is not None:
                values[key] = yaml.safe_load(value) if isinstance(value, str) and key not in cls._plain() else value
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ValueError("\n".join(cls._explain(item) for item in error.errors())) from None

    @classmethod
    def _plain(cls) -> set[str]:
        """Keys whose values are taken as they are typed: names and paths, which YAML could turn into something else."""
        return {name for name, field in cls.model_fields.items() if field.annotation in (str, str | None)}

    @classmethod
    def _explain(cls, item: Any) -> str:
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            near = difflib.get_close_matches(key, cls.model_fields, n=1)
            return f"unknown setting {key!r}" + (f"; did you mean {near[0]!r}?" if near else "")
        if item["type"] == "missing":
            return f"setting {key!r} is needed"
        return f"setting {key!r}: {item['msg']} (got {item['input']!r})" if key else str(item["msg"])

    def save(self, file: Path) -> None:
        """Write the settings in force as YAML, whole or not at all."""
        write_text_whole(file, yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True))
