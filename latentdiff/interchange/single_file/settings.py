"""Settings that the weights of a checkpoint do not contain: from the caller, the original YAML file, or by default."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from latentdiff.interchange.single_file.checkpoint import Checkpoint
from latentdiff.interchange.single_file.names import CODEBOOK, GUMBEL_CODEBOOK, UNET
from latentdiff.interchange.single_file.shapes import text_kind
from latentdiff.interchange.user_files import read_yaml

PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
SCHEDULES = {"linear": "scaled_linear", "sqrt_linear": "linear", "cosine": "squaredcos_cap_v2"}
"""diffusers' names of the original beta schedules; the original's "linear" is linear in the square roots."""

BASE_STEPS = 875_000
"""Training steps of Stable Diffusion 2.0 at 512 pixels, which predicts noise; the model at 768 predicts v."""


@dataclass(frozen=True)
class OriginalSettings:
    """Settings of a model of Latent Diffusion's or Stable Diffusion's code; None where unknown."""

    prediction_type: str | None = None
    beta_schedule: str | None = None
    beta_start: float | None = None
    beta_end: float | None = None
    num_train_timesteps: int | None = None
    scaling_factor: float | None = None
    sample_size: int | None = None
    heads: int | None = None
    head_channels: int | None = None

    def __or__(self, other: "OriginalSettings") -> "OriginalSettings":
        """These settings, overridden by those that `other` has."""
        return OriginalSettings(**{**asdict(self), **other.said()})

    def said(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None}

    @classmethod
    def read(cls, file: Path) -> "OriginalSettings":
        """Read the YAML file of a released model. Only values are taken from it; classes it names are never imported.

        Missing keys have the defaults of the original code (``LatentDiffusion`` and ``DDPM`` in CompVis' ddpm.py).

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is not such a file.
        """
        params = read_params(file)
        unet = section(section(params, "unet_config"), "params")
        return cls(
            prediction_type=choice(file, params, "parameterization", PREDICTIONS, "eps"),
            beta_schedule=choice(file, params, "beta_schedule", SCHEDULES, "linear"),
            beta_start=number(file, params, "linear_start", float, 1e-4),
            beta_end=number(file, params, "linear_end", float, 2e-2),
            num_train_timesteps=number(file, params, "timesteps", int, 1000),
            scaling_factor=number(file, params, "scale_factor", float, 1.0),
            sample_size=number(file, params, "image_size", int),
            heads=number(file, unet, "num_heads", int),
            head_channels=number(file, unet, "num_head_channels", int),
        )


def read_params(file: Path) -> dict[str, Any]:
    """``model.params`` of the YAML file of a released model.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not such a file.
    """
    content = read_yaml(file)
    if not isinstance(content, dict) or not isinstance(section(content, "model").get("params"), dict):
        raise ValueError(f"{file} is not the YAML file of a Latent Diffusion model: it has no model.params")
    return section(section(content, "model"), "params")


def choice(file: Path, section: dict[str, Any], key: str, known: dict[str, str], usual: str) -> str:
    value = section.get(key, usual)
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{file}: {key}={value!r} is not known; it is {', '.join(known)}")
    return known[value]


def number(file: Path, section: Any, key: str, kind: type, usual: Any = None) -> Any:
    """A number above 0; the original writes -1 for "unset"."""
    value = section.get(key) if isinstance(section, dict) else None
    if value is None or value == -1:
        return usual
    try:
        found = kind(value)  # YAML reads 1e-4 as a string
    except (TypeError, ValueError, OverflowError):
        found = 0
    if isinstance(value, bool) or not 0 < found < 1e9 or found != float(value):
        raise ValueError(f"{file}: {key}={value!r} should be a number above 0")
    return found


def assumed_settings(weights: Checkpoint) -> OriginalSettings:
    """The usual settings of a model of this kind."""
    process: dict[str, Any] = {"beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
    stable = OriginalSettings(
        prediction_type="epsilon", beta_start=0.00085, beta_end=0.012, scaling_factor=0.18215, sample_size=64, **process
    )
    text = text_kind(weights)
    if f"{UNET}label_emb.weight" in weights:
        return OriginalSettings(
            prediction_type="v_prediction",
            beta_start=1e-4,
            beta_end=0.02,
            scaling_factor=0.08333,
            sample_size=128,
            **process,
        )
    if CODEBOOK in weights or GUMBEL_CODEBOOK in weights:
        stable |= OriginalSettings(scaling_factor=1.0)
    stable |= OriginalSettings(scaling_factor=measured_scale(weights))
    if text == "bert":
        stable |= OriginalSettings(sample_size=32)
    if text == "open_clip" and weights.global_step != BASE_STEPS and takes_latents_only(weights):
        stable |= OriginalSettings(prediction_type="v_prediction", sample_size=96)
    return stable


def measured_scale(weights: Checkpoint) -> float | None:
    """The measured scaling factor of the latents, if the file has it beside the weights."""
    if "scale_factor" not in weights or weights.shape("scale_factor") not in ((), (1,)):
        return None
    scale = float(weights["scale_factor"])
    return scale if 0 < scale < float("inf") else None


def takes_latents_only(weights: Checkpoint) -> bool:
    """Whether the UNet's input is latents only, without the mask of an inpainting model."""
    first, last = f"{UNET}input_blocks.0.0.weight", f"{UNET}out.2.weight"
    return first in weights and last in weights and weights.shape(first)[1] == weights.shape(last)[0]


def is_guess(weights: Checkpoint) -> bool:
    """Whether models of this kind differ in what they predict, and the file does not say which it is."""
    no_hint = weights.global_step != BASE_STEPS and "scheduler" not in weights.header
    return text_kind(weights) == "open_clip" and no_hint and takes_latents_only(weights)


def scheduler_settings(settings: OriginalSettings) -> dict[str, Any]:
    """The config of the scheduler for sampling."""
    said = settings.said()
    process = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type")
    return {
        **{key: said[key] for key in process if key in said},
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }


def autoencoder_settings(file: Path) -> dict[str, Any]:
    """Of a YAML file that was released with an autoencoder or a whole model: its ``sample_size`` in pixels, and
    ``scaling_factor`` if it says one.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not such a file.
    """
    params = read_params(file)
    stage = params if "ddconfig" in params else section(section(params, "first_stage_config"), "params")
    read = {
        "sample_size": number(file, section(stage, "ddconfig"), "resolution", int),
        "scaling_factor": number(file, params, "scale_factor", float),
    }
    return {key: value for key, value in read.items() if value is not None}


def section(params: Any, key: str) -> dict[str, Any]:
    """A part of a YAML file; empty if there is none."""
    found = params.get(key) if isinstance(params, dict) else None
    return found if isinstance(found, dict) else {}
