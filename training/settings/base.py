"""The base of all settings: typed, strict, filled from YAML and ``key=value`` overrides."""

import difflib
import json
import os
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from pydantic.config import JsonDict

from latentdiff.interchange.atomic import write_text_whole
from latentdiff.interchange.user_files import parse_yaml, read_yaml
from latentdiff.pipelines.batch.drawing_options import wrong_in

NAMED = 10  # mistakes that a message names; the rest are counted
SHOWN = reprlib.Repr()  # of values in messages
SHOWN.maxstring = SHOWN.maxother = 100
ALIASES = {
    **{"lr": "learning_rate", "steps": "max_steps", "rank": "lora_rank", "alpha": "lora_alpha"},
    **{"batch": "batch_size", "size": "resolution", "workers": "num_workers", "precision": "mixed_precision"},
    **{"lr_warmup_steps": "warmup_steps"},  # diffusers' scripts
    **{"objective": "process", "objective_options": "process_options"},
    **{"network": "denoiser", "network_options": "denoiser_options"},
}
"""What settings are called elsewhere, where a class has no setting of that name."""
MEANT = {
    "learning_rate": ("lrate", "learningrate", "l_rate"),
    "max_steps": ("max_train_steps", "num_train_steps", "train_steps", "num_steps", "iterations", "iters"),
    "batch_size": ("train_batch_size", "per_device_train_batch_size", "bs"),
    "gradient_accumulation_steps": ("grad_accum", "accumulate", "accumulation_steps"),
    "mixed_precision": ("dtype", "fp16", "bf16", "amp", "half"),
    "resolution": ("image_size", "img_size", "res", "width", "height"),
    "caption": ("instance_prompt",),
    "output": ("output_dir", "out", "logging_dir"),
    "data": ("dataset", "dataset_name", "data_dir", "train_data_dir", "instance_data_dir", "pictures", "images"),
    "model": ("pretrained_model_name_or_path", "base_model", "checkpoint"),
    "checkpoint_every": ("save_every", "save_steps", "checkpointing_steps"),
    "keep_checkpoints": ("checkpoints_total_limit", "save_total_limit"),
    "sample_every": ("validation_steps", "validation_epochs", "eval_every", "eval_steps"),
    "sample_prompts": ("validation_prompt", "validation_prompts", "prompt", "prompts"),
    "lr_scheduler": ("scheduler", "schedule"),
    "max_grad_norm": ("grad_clip", "clip", "gradient_clipping"),
    "random_flip": ("flip", "mirror", "hflip"),
    "num_workers": ("dataloader_num_workers", "threads"),
    "max_pictures": ("max_train_samples", "limit"),
    "ema_decay": ("ema", "use_ema"),
    "max_minutes": ("minutes", "time_limit", "max_time"),
}
"""Settings, and other names by which people ask for them; these are not taken, for what they hold can differ."""
NO_SETTING = {
    **dict.fromkeys(
        ("device", "devices", "gpu", "gpus", "cuda", "cpu"),
        "a training takes a GPU if there is one; CUDA_VISIBLE_DEVICES=1 before the command chooses another one, and "
        "CUDA_VISIBLE_DEVICES= the processor",
    ),
    **dict.fromkeys(
        ("epochs", "epoch", "num_epochs", "max_epochs", "num_train_epochs"),
        "a training is counted in steps: max_steps, each of batch_size pictures",
    ),
}
"""What is said of keys that stand for no setting of ours."""


def when(to_change: str) -> JsonDict:
    """For a field's ``json_schema_extra``: when to change a setting, beside its `description`, which says what it is.

    What comes of more and of less of it, what to look at to decide, and values that are known to be good, with their
    source; or that it never needs a change.
    """
    return {"when": to_change}


class Settings(BaseModel):
    """Base of the settings: unknown keys and values of the wrong type are errors."""

    model_config = ConfigDict(defer_build=True, extra="forbid", frozen=True, validate_default=True)

    @classmethod
    def load(cls, file: str | os.PathLike[str] | None = None, overrides: dict[str, Any] | None = None) -> Self:
        """Settings from a YAML file, then from `overrides` (``None`` values are left out; strings are read as YAML).

        Raises:
            ValueError: an unknown key (the nearest known one is named), a value of the wrong type or range, or no YAML
                (the line is named).
            FileNotFoundError: `file` does not exist.
        """
        return cls.of(cls.values_of(file, overrides))

    @classmethod
    def values_of(cls, file: str | os.PathLike[str] | None, overrides: dict[str, Any] | None) -> dict[str, Any]:
        """What `load` is given by the settings' own names, unexamined. Raises as `load` where that cannot be read."""
        values: dict[str, Any] = {}
        if file is not None:
            values = read_yaml(Path(file)) or {}
            if not isinstance(values, dict):
                raise ValueError(f"{file}: expected 'key: value' lines, found a {type(values).__name__}")
            values = cls._by_name(values)
        for key, value in cls._by_name(overrides or {}).items():
            if isinstance(value, str) and key not in cls._plain():
                values[key] = parse_yaml(value, f"setting {key!r}")
            elif value is not None:
                values[key] = None if value == "null" and cls._may_be_none(key) else value
        return values

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Settings of these values. Raises ValueError as `load`."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            lines = [cls._explain(item) for item in error.errors()]
            more = [f"and {len(lines) - NAMED} more"] if len(lines) > NAMED else []
            raise ValueError("\n".join(lines[:NAMED] + more)) from None

    @field_validator("*", mode="before")
    @classmethod
    def _one_of_several(cls, value: Any, info: ValidationInfo) -> Any:
        """Where a setting takes several values, one alone is all of them: ``report_to=tensorboard``."""
        takes_several = get_origin(cls.model_fields[str(info.field_name)].annotation) is tuple
        return (value,) if takes_several and isinstance(value, str | int | float) else value

    @classmethod
    def _by_name(cls, values: dict[str, Any]) -> dict[str, Any]:
        """`values` with the settings' own names. Raises ValueError for one that is given under two of them."""
        for alias, name in ALIASES.items():
            if alias in values and alias not in cls.model_fields and name in cls.model_fields:
                if values.get(name) is not None:
                    raise ValueError(f"setting {name!r} is given twice, as {alias!r} too")
                values = {key: value for key, value in values.items() if key != alias} | {name: values[alias]}
        return values

    @classmethod
    def _plain(cls) -> set[str]:
        """Keys whose values are taken as they are typed: names and paths, which YAML could turn into something else."""
        return {name for name, field in cls.model_fields.items() if field.annotation in (str, str | None)}

    @classmethod
    def _may_be_none(cls, key: str) -> bool:
        """Whether a setting that is taken as it is typed has a default to go back to, null."""
        return key in cls.model_fields and cls.model_fields[key].annotation == (str | None)

    @classmethod
    def _explain(cls, item: Any) -> str:
        key = SHOWN.repr(".".join(str(part) for part in item["loc"]))
        if item["type"] == "extra_forbidden":
            return f"unknown setting {key}; {cls.hint(str(item['loc'][0])[:100])}"
        if item["type"] == "missing":
            option = str(item["loc"][0]).replace("_", "-")
            return f"setting {key} is needed: --{option}, or {item['loc'][0]}: in the file of --config"
        wrong = wrong_in(item)
        return f"setting {key}: {wrong} (got {SHOWN.repr(item['input'])})" if item["loc"] else wrong

    @classmethod
    def hint(cls, key: str) -> str:
        """What to give in place of an unknown key: by its meaning, or the nearest name."""
        if key.lower() in NO_SETTING:
            return NO_SETTING[key.lower()]
        meant = [name for name, others in MEANT.items() if key.lower() in others and name in cls.model_fields]
        names = [*cls.model_fields, *(alias for alias, name in ALIASES.items() if name in cls.model_fields)]
        near = meant or difflib.get_close_matches(key, names, n=1)
        return f"did you mean {near[0]!r}?" if near else f"'latentdiff settings {cls.command()}' shows them all"

    @classmethod
    def command(cls) -> str:
        """The command whose settings these are."""
        stem = cls.__name__.removesuffix("Settings").lower()
        return "distill" if stem == "distillation" else stem

    def completed(self, **values: Any) -> Self:
        """A copy with these values, found out from a model or the data; `model_fields_set` stays what was given."""
        copy = self.model_copy(update=values)
        copy.__pydantic_fields_set__.intersection_update(self.model_fields_set)
        return copy

    def follow(self, **defaults: Any) -> None:
        """Take these in place of the usual defaults, where nothing else was given: for a validator to call."""
        for name, value in defaults.items():
            if name not in self.model_fields_set:
                object.__setattr__(self, name, value)  # settings are frozen, once they are made

    def save(self, file: Path, history: Sequence[Mapping[str, Any]] = ()) -> None:
        """Write the settings in force as YAML, whole or not at all.

        history: of those that were changed during a run, see `TrainingRun`; it is written as comments.
        """
        text = yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True)
        rows = [f"# {one['when']}, step {one['step']}: {one['setting']} {values_of(one)}\n" for one in history]
        write_text_whole(file, text + "".join(["# Changed during the run:\n", *rows] if rows else []))


def values_of(change: Mapping[str, Any]) -> str:
    """The old and new value of a setting, in one line."""
    return f"{json.dumps(change['old'], ensure_ascii=False)} -> {json.dumps(change['new'], ensure_ascii=False)}"
