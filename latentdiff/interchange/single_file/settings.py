"""Settings that the weights of a checkpoint do not contain: from the caller, the original YAML file, what the file says
of itself, or by default."""

import logging
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from latentdiff.interchange.single_file.checkpoint import Checkpoint
from latentdiff.interchange.single_file.names import CODEBOOK, GUMBEL_CODEBOOK, UNET
from latentdiff.interchange.single_file.shapes import text_kind
from latentdiff.interchange.user_files import MAX_TRAIN_TIMESTEPS, read_yaml

logger = logging.getLogger(__name__)

PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
SCHEDULES = {"linear": "scaled_linear", "sqrt_linear": "linear", "cosine": "squaredcos_cap_v2"}
"""diffusers' names of the original beta schedules; the original's "linear" is linear in the square roots."""

SPEC = "modelspec."
"""Beginning of the keys of a safetensors file's header that describe the model, by Stability AI's ModelSpec."""

SPEC_PREDICTIONS = {"epsilon": "epsilon", "eps": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
SPEC_PREDICTIONS |= {"velocity": "v_prediction", "sample": "sample", "x0": "sample"}
SPEC_ARCHITECTURES = {"stable-diffusion-v2-512": "epsilon", "stable-diffusion-v2-768-v": "v_prediction"}
V_MARK, ZERO_SNR_MARK = "v_pred", "ztsnr"
"""Names of tensors without content that many programs take as a mark."""

BASE_STEPS = 875_000
"""Training steps of Stable Diffusion 2.0 at 512 pixels, which predicts noise; the model at 768 predicts v."""

XL_SCALE = 0.13025
"""``scaling_factor`` of Stable Diffusion XL, whose autoencoder has the same shape as the others."""

LARGE_V = 96
"""``sample_size`` of Stable Diffusion 2 that predicts v."""


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
    zero_terminal_snr: bool | None = None
    """Whether the betas are rescaled so that nothing of the picture is left at the last step (Lin et al. 2023)."""

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
            num_train_timesteps=number(file, params, "timesteps", int, 1000, MAX_TRAIN_TIMESTEPS),
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


def number(file: Path, section: Any, key: str, kind: type, usual: Any = None, most: float = 1e9) -> Any:
    """A number above 0 and at most `most`; the original writes -1 for "unset"."""
    value = section.get(key) if isinstance(section, dict) else None
    if value is None or value == -1:
        return usual
    try:
        found = kind(value)  # YAML reads 1e-4 as a string
    except (TypeError, ValueError, OverflowError):
        found = 0
    if isinstance(value, bool) or not 0 < found <= most or found != float(value):
        raise ValueError(f"{file}: {key}={value!r} should be a number above 0 and at most {most:g}")
    return found


def assumed_settings(weights: Checkpoint, stated: OriginalSettings | None = None) -> OriginalSettings:
    """The settings of a model: what is stated, then what its file says, then what is usual for its kind."""
    known = stated_by_file(weights) | (stated or OriginalSettings())
    usual: dict[str, Any] = {
        "prediction_type": "epsilon",
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "num_train_timesteps": 1000,
        "scaling_factor": 1.0 if CODEBOOK in weights or GUMBEL_CODEBOOK in weights else 0.18215,
        "sample_size": 32 if text_kind(weights) == "bert" else 64,
    }
    if is_sdxl(weights):
        usual |= {"scaling_factor": XL_SCALE, "sample_size": 128}
    elif f"{UNET}label_emb.weight" in weights:  # the upscaler
        usual |= {"prediction_type": "v_prediction", "beta_start": 1e-4, "beta_end": 0.02, "sample_size": 128}
        usual["scaling_factor"] = 0.08333
    elif measured_scale(weights) is not None:
        usual["scaling_factor"] = measured_scale(weights)
    if is_stable_diffusion_2(weights):
        if weights.global_step != BASE_STEPS:
            usual["prediction_type"] = "v_prediction"
        if (known.prediction_type or usual["prediction_type"]) == "v_prediction":
            usual["sample_size"] = LARGE_V
    found = OriginalSettings(**usual) | known
    if found.prediction_type == "epsilon":  # from noise alone nothing of the picture can be told
        found = replace(found, zero_terminal_snr=None)
    return found


def stated_by_file(weights: Checkpoint) -> OriginalSettings:
    """What a file says of its model, by tensors that are marks or else in its header.

    Of the resolution it is the side of the latents, if it is square and a multiple of 64 pixels.
    """
    architecture = weights.metadata.get(f"{SPEC}architecture", "")
    prediction = SPEC_PREDICTIONS.get(spec_prediction(weights), SPEC_ARCHITECTURES.get(architecture))
    if V_MARK in weights:
        prediction = "v_prediction"
    square = re.fullmatch(r"(\d{2,4})x\1", weights.metadata.get(f"{SPEC}resolution", ""))
    side = int(square[1]) if square else 0
    is_usual = f"{UNET}label_emb.weight" not in weights and text_kind(weights) != "bert"  # 8 pixels to a latent
    return OriginalSettings(
        prediction_type=prediction,
        sample_size=side // 8 if side and side % 64 == 0 and is_usual else None,
        zero_terminal_snr=True if ZERO_SNR_MARK in weights else None,
    )


def spec_prediction(weights: Checkpoint) -> str:
    """The prediction type in a file's header, in lower case; empty if there is none."""
    return weights.metadata.get(f"{SPEC}prediction_type", "").strip().lower().replace("-", "_")


def check_prediction_is_known(weights: Checkpoint) -> None:
    """Warn where models of one kind differ in what they predict, and the file does not say which it is.

    Raises:
        ValueError: the file says that it predicts something that is not known here.
    """
    said = spec_prediction(weights)
    if said and said not in SPEC_PREDICTIONS:
        raise ValueError(
            f"{weights.file} says that it predicts {said!r}, which is not known here; give prediction_type= "
            f"(--prediction-type), one of {', '.join(dict.fromkeys(SPEC_PREDICTIONS.values()))}"
        )
    says = stated_by_file(weights).prediction_type is not None or "scheduler" in weights.header
    if is_stable_diffusion_2(weights) and not says and weights.global_step != BASE_STEPS:
        logger.warning(
            "%s does not say whether it predicts v, as Stable Diffusion 2 for 768 pixels, or noise, as that for "
            "512; v is assumed. If pictures come out brown, give prediction_type='epsilon' (--prediction-type)",
            weights.file,
        )


def measured_scale(weights: Checkpoint) -> float | None:
    """The measured scaling factor of the latents, if the file has it beside the weights."""
    if "scale_factor" not in weights or weights.shape("scale_factor") not in ((), (1,)):
        return None
    scale = float(weights["scale_factor"])
    return scale if 0 < scale < float("inf") else None


def is_sdxl(weights: Checkpoint) -> bool:
    """Whether a model is Stable Diffusion XL, with two text encoders, or its refiner."""
    return text_kind(weights) in ("first of two", "second alone")


def is_refiner(weights: Checkpoint) -> bool:
    """Whether a model is Stable Diffusion XL's refiner, with the second text encoder alone."""
    return text_kind(weights) == "second alone"


def is_stable_diffusion_2(weights: Checkpoint) -> bool:
    """Whether a model is of Stable Diffusion 2's kind for text alone, of which some predict v and some noise."""
    first, last = f"{UNET}input_blocks.0.0.weight", f"{UNET}out.2.weight"
    if not (first in weights and last in weights and weights.size(first, 1) == weights.size(last)):
        return False  # a mask or a picture comes with the latents
    if text_kind(weights) is not None:
        return text_kind(weights) == "open_clip"
    inward = [name for name in weights if name.startswith(UNET) and name.endswith(".1.proj_in.weight")]
    return any(len(weights.shape(name)) == 2 for name in inward)


def scheduler_settings(settings: OriginalSettings) -> dict[str, Any]:
    """The config of the scheduler for sampling."""
    said = settings.said()
    process = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type")
    return {
        **{key: said[key] for key in process if key in said},
        **({"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if settings.zero_terminal_snr else {}),
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }


def sdxl_scheduler_settings(settings: OriginalSettings) -> dict[str, Any]:
    """The config of the scheduler with which SDXL was released."""
    found = scheduler_settings(settings)
    for name in ("clip_sample", "set_alpha_to_one"):
        del found[name]
    return {"timestep_spacing": "leading", **found, "_class_name": "EulerDiscreteScheduler"}


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
