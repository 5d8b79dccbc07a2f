"""What the weights of a checkpoint do not say, from the original YAML file, or as it usually is."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

STABLE_DIFFUSION = (0.00085, 0.012)
UPSCALER = (0.0001, 0.02)


@dataclass(frozen=True)
class OriginalSettings:
    """Of a model of Latent Diffusion's or Stable Diffusion's code; None where nothing is said."""

    prediction_type: str | None = None
    beta_start: float | None = None
    beta_end: float | None = None
    num_train_timesteps: int | None = None
    scaling_factor: float | None = None
    sample_size: int | None = None
    heads: int | None = None
    head_channels: int | None = None

    @classmethod
    def read(cls, file: Path) -> "OriginalSettings":
        """From the YAML file of a released model. Only numbers are taken from it; what it names is never imported.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is not such a file.
        """
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file")
        try:
            params = yaml.safe_load(file.read_text(encoding="utf-8"))["model"]["params"]
            unet = params.get("unet_config", {}).get("params", {})
        except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{file} is not the YAML file of a Latent Diffusion model: {reason}") from None
        kinds = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
        parameterization = params.get("parameterization")
        if parameterization is not None and parameterization not in kinds:
            raise ValueError(f"{file}: parameterization={parameterization!r} is not known; it is eps, v or x0")
        numbers = {
            "beta_start": (params, "linear_start", float),
            "beta_end": (params, "linear_end", float),
            "num_train_timesteps": (params, "timesteps", int),
            "scaling_factor": (params, "scale_factor", float),
            "sample_size": (params, "image_size", int),
            "heads": (unet, "num_heads", int),
            "head_channels": (unet, "num_head_channels", int),
        }
        values: dict[str, Any] = {}
        for name, (section, key, kind) in numbers.items():
            value = section.get(key)
            if value is None or (isinstance(value, int) and value < 0):  # the original writes -1 for "not this one"
                continue
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise ValueError(f"{file}: {key}={value!r} should be a number")
            values[name] = kind(value)
        return cls(prediction_type=kinds.get(parameterization) if parameterization else None, **values)


def scheduler_settings(original: OriginalSettings, upscaler: bool) -> dict[str, Any]:
    """The config of the scheduler to draw with: Stable Diffusion's process where nothing else is said."""
    first, last = UPSCALER if upscaler else STABLE_DIFFUSION
    return {
        "num_train_timesteps": original.num_train_timesteps or 1000,
        "beta_start": original.beta_start or first,
        "beta_end": original.beta_end or last,
        "beta_schedule": "scaled_linear",
        "prediction_type": original.prediction_type or ("v_prediction" if upscaler else "epsilon"),
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }
