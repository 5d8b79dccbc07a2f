"""Pipelines from and to single files, as Stable Diffusion's models are passed around."""

import inspect
from pathlib import Path
from typing import Any, Self

import torch

from latentdiff.interchange.single_file import (
    HUB_OPTIONS,
    Checkpoint,
    OriginalSettings,
    find_file,
    original_autoencoder,
    original_text_encoder,
    original_unet,
    write_checkpoint,
)
from latentdiff.pipelines.storage.single_file_parts import CheckpointParts, check_kind, header_of, load_tokenizer

PREDICTIONS = ("epsilon", "v_prediction", "sample")


class SingleFilePipeline:
    """``from_single_file`` and ``save_single_file``."""

    unet: Any
    vae: Any
    text_encoder: Any
    scheduler: Any

    @classmethod
    def from_single_file(
        cls,
        source: str | Path,
        *,
        dtype: torch.dtype | None = torch.float32,
        prediction_type: str | None = None,
        sample_size: int | None = None,
        scaling_factor: float | None = None,
        attention_head_dim: int | None = None,
        original_config: str | Path | None = None,
        tokenizer: Any = None,
        ema: bool = False,
        allow_pickle: bool = False,
        **others: Any,
    ) -> Self:
        """Load a model from one file: Stable Diffusion 1 or 2, inpainting or not, the x4 upscaler, Latent Diffusion.

        Its weights show what kind it is. Nothing but the file is needed: CLIP's tokenizer comes with open_clip.

        Args:
            source: a ``.safetensors`` file, or ``owner/name/file.safetensors`` on the hub, or its address there.
            dtype: of the weights; None leaves the file's.
            prediction_type: "epsilon" or "v_prediction" (Stable Diffusion 2 at 768 pixels), which the weights do not
                show; by default what the file or `original_config` says, else what is usual: v for Stable Diffusion 2
                (with a warning) and the upscaler.
            sample_size: of the latents that the model was trained on; likewise, else as usual: 64, and 96 for Stable
                Diffusion 2 that predicts v.
            scaling_factor: of the autoencoder; likewise, else 0.18215, and 0.08333 for the upscaler.
            attention_head_dim: the number of the UNet's attention heads, as diffusers' configs call it; likewise, else
                8, and for Stable Diffusion 2 one for every 64 channels.
            original_config: the YAML file that was released with the model; only numbers are taken from it.
            tokenizer: a tokenizer, or the folder or hub id of one; needed for Latent Diffusion (bert-base-uncased).
            ema: take the averaged weights of the UNet, where the file has both.
            allow_pickle: read a ``.ckpt`` too, by ``torch.load(weights_only=True)``, which runs nothing.
            others: components instead of the file's: unet, text_encoder, scheduler and so on, and vae, which may also
                be a file with one; and for the hub ``revision``, ``token``, ``cache_dir``, ``local_files_only``.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is damaged, holds something else or lacks weights, or is a model for another pipeline.
            TypeError: an unknown argument.
            OSError: the hub cannot be asked.
        """
        dtype = others.pop("torch_dtype", None) or dtype
        hub = {name: others.pop(name) for name in HUB_OPTIONS if name in others}
        known = inspect.signature(cls.__init__).parameters
        check_arguments(cls.__name__, others, known)
        check_prediction(prediction_type)
        file = find_file(source, allow_pickle, **hub)
        stated = OriginalSettings(
            prediction_type=prediction_type,
            sample_size=sample_size,
            scaling_factor=scaling_factor,
            heads=attention_head_dim,
        )
        parts = CheckpointParts(Checkpoint(file, allow_pickle, ema), dtype, stated, original_config)
        given = dict(others)
        if isinstance(given.get("vae"), (str, Path)):
            given["vae"] = parts.vae_of(find_file(given["vae"], allow_pickle, **hub), allow_pickle)
        for name in ("unet", "vae"):
            given[name] = given.get(name) or getattr(parts, name)()
        check_kind(cls, given["unet"], given["vae"], file)
        for name in ("text_encoder", "scheduler", "low_res_scheduler"):
            if name in known and name not in given:
                given[name] = getattr(parts, name)()
        if tokenizer is not None or given["text_encoder"] is not None:
            tokenizer = load_tokenizer(tokenizer, given["text_encoder"])
        if "max_noise_level" in known:
            given = {**parts.max_noise_level(), **given}
        pipeline: Any = cls(**{**given, "tokenizer": tokenizer})
        pipeline.register_defaults(**parts.defaults())
        return pipeline

    def save_single_file(self, file: str | Path, dtype: torch.dtype | None = None, overwrite: bool = False) -> None:
        """Write the networks into one safetensors file with the names of the original checkpoints.

        The programs that read Stable Diffusion's files read it. Its header holds the configs, so `from_single_file`
        brings the same pipeline back; a tokenizer other than CLIP's must be given to it then. A safety checker is not
        written. Stable Diffusion 2's text encoder lacks the layer that it never uses (`original_text_encoder`).

        Args:
            file: named ``.safetensors``; written whole or not at all.
            dtype: of the weights in it, such as ``torch.float16``; by default as they are.
            overwrite: replace a file that is there.

        Raises:
            FileExistsError: the file is there.
            ValueError: another kind of file, or a network that such files never had.
        """
        weights = {**original_unet(self.unet), **original_autoencoder(self.vae)}
        write_checkpoint(
            {**weights, **original_text_encoder(self.text_encoder)}, header_of(self), file, dtype, overwrite
        )


def check_arguments(pipeline: str, others: Any, known: Any) -> None:
    """Raises TypeError for what a pipeline does not take."""
    for name in others:
        if name not in known:
            raise TypeError(f"{pipeline}.from_single_file: unknown argument {name!r}")


def check_prediction(prediction_type: str | None) -> None:
    """Raises ValueError for what no model predicts."""
    if prediction_type not in (None, *PREDICTIONS):
        raise ValueError(f"prediction_type={prediction_type!r} is not known; it is {' or '.join(PREDICTIONS)}")
