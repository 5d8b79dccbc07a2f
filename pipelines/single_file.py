"""Pipelines from and to single files, as Stable Diffusion's models are passed around."""

import inspect
import json
import re
from pathlib import Path
from typing import Any, Self

import torch

from latentdiff.interchange.adapters import save_whole
from latentdiff.interchange.single_file import (
    Checkpoint,
    OriginalSettings,
    build_autoencoder,
    build_text_encoder,
    build_unet,
    check_checkpoint,
    clip_tokenizer,
    original_weights,
    scheduler_settings,
)

ON_THE_HUB = re.compile(
    r"(?:https?://(?:www\.)?huggingface\.co/)?([\w.-]+/[\w.-]+)/(?:(?:blob|resolve)/([^/]+)/)?(.+\.\w+)"
)


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
        dtype: torch.dtype = torch.float32,
        prediction_type: str | None = None,
        sample_size: int | None = None,
        original_config: str | Path | None = None,
        tokenizer: Any = None,
        ema: bool = False,
        allow_pickle: bool = False,
        **components: Any,
    ) -> Self:
        """Load a model from one file: Stable Diffusion 1 or 2, inpainting or not, the x4 upscaler, Latent Diffusion.

        Its weights tell what kind it is. Nothing but the file is needed: CLIP's tokenizer comes with open_clip.

        Args:
            source: a ``.safetensors`` file, or ``owner/name/file.safetensors`` on the hub, or its address there.
            dtype: of the weights.
            prediction_type: "epsilon" or "v_prediction" (Stable Diffusion 2 at 768 pixels), which the weights do not
                tell; by default what the file or `original_config` says, else "epsilon".
            sample_size: of the latents that the model was trained on; likewise, else 64.
            original_config: the YAML file that was released with the model; only numbers are taken from it.
            tokenizer: a tokenizer, or the folder or hub id of one; needed for Latent Diffusion (bert-base-uncased).
            ema: take the averaged weights of the UNet, where the file has both.
            allow_pickle: read a ``.ckpt`` too, by ``torch.load(weights_only=True)``, which runs nothing.
            components: unet, vae, text_encoder, scheduler and so on instead of the file's.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is damaged, holds something else or lacks weights, or is a model for another pipeline.
        """
        file = find_file(source)
        weights = Checkpoint(file, allow_pickle, ema)
        check_checkpoint(weights)
        original = OriginalSettings.read(Path(original_config)) if original_config else OriginalSettings()
        known = inspect.signature(cls.__init__).parameters
        upscaler = "low_res_scheduler" in known
        changes = {"sample_size": sample_size or original.sample_size or (128 if upscaler else None)}
        unet = components.get("unet") or build_unet(weights, dtype, unet_changes(weights, original, changes))
        factor = original.scaling_factor or (None if "vae" in weights.header else 0.08333 if upscaler else 0.18215)
        scale = {} if factor is None else {"scaling_factor": factor}
        vae = components.get("vae") or build_autoencoder(weights, dtype, scale)
        check_kind(cls.__name__, unet, vae, upscaler, file)
        text_encoder = components.get("text_encoder") or build_text_encoder(weights, dtype)
        scheduler = components.get("scheduler") or build_scheduler(weights, original, upscaler, prediction_type)
        parts = {
            **components,
            "unet": unet,
            "vae": vae,
            "text_encoder": text_encoder,
            "tokenizer": load_tokenizer(tokenizer, text_encoder),
            "scheduler": scheduler,
        }
        if upscaler and "low_res_scheduler" not in parts:
            parts["low_res_scheduler"] = noising_scheduler()
        pipeline: Any = cls(**parts)
        pipeline.register_defaults(**weights.header.get("defaults", {}))
        return pipeline

    def save_single_file(self, file: str | Path, dtype: torch.dtype | None = None, overwrite: bool = False) -> None:
        """Write the networks into one safetensors file with the names of the original checkpoints.

        The programs that read Stable Diffusion's files read it. Its header holds the configs, so `from_single_file`
        brings the same pipeline back; a tokenizer other than CLIP's must be given to it then.

        Args:
            file: named ``.safetensors``.
            dtype: of the weights in it; by default as they are.
            overwrite: replace a file that is there.

        Raises:
            FileExistsError: the file is there.
            ValueError: another kind of file, or a text encoder that such files never had.
        """
        file = Path(file)
        if file.suffix != ".safetensors":
            raise ValueError(f"{file}: the weights are written as safetensors; name it {file.stem}.safetensors")
        if file.exists() and not overwrite:
            raise FileExistsError(f"{file} is there already; choose another name, or give overwrite=True")
        weights = original_weights(self.unet, self.vae, self.text_encoder)
        if dtype is not None:
            weights = {
                name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in weights.items()
            }
        configs = {name: plain_config(getattr(self, name)) for name in ("unet", "vae", "text_encoder", "scheduler")}
        configs["scheduler"]["_class_name"] = type(self.scheduler).__name__
        configs["defaults"] = dict(self.config.get("_generation_defaults", {}))  # type: ignore[attr-defined]
        save_whole(weights, file, {"format": "pt", "latentdiff": json.dumps(configs, sort_keys=True)})


def find_file(source: str | Path) -> Path:
    """A local file, or one on the hub (downloaded, or from the local cache).

    Raises:
        FileNotFoundError: neither.
    """
    file = Path(source).expanduser()
    if file.exists() or not isinstance(source, str):
        return file
    address = ON_THE_HUB.fullmatch(source)
    if address is None or Path(source.split("/")[0]).exists():
        raise FileNotFoundError(
            f"{source}: no such file; give a .safetensors file, or owner/name/file.safetensors on the Hugging Face hub"
        )
    from huggingface_hub import hf_hub_download

    repository, revision, name = address.groups()
    return Path(hf_hub_download(repository, name, revision=revision))


def plain_config(part: Any) -> dict[str, Any]:
    """A component's config without what it notes for itself."""
    config = part.config.to_dict() if hasattr(part.config, "to_dict") else dict(part.config)
    return {key: value for key, value in config.items() if not key.startswith("_") and is_plain(value)}


def is_plain(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def unet_changes(weights: Checkpoint, original: OriginalSettings, changes: dict[str, Any]) -> dict[str, Any]:
    """What is known of the UNet besides the shapes of its weights."""
    changes = {key: value for key, value in changes.items() if value is not None}
    if "unet" in weights.header:
        return {key: value for key, value in changes.items() if original.sample_size or key != "sample_size"}
    if original.heads:
        changes["attention_head_dim"] = original.heads
    elif original.head_channels:
        from latentdiff.interchange.single_file.configs import unet_config

        changes["attention_head_dim"] = [
            width // original.head_channels for width in unet_config(weights)["block_out_channels"]
        ]
    return changes


def check_kind(pipeline: str, unet: Any, vae: Any, upscaler: bool, file: Path) -> None:
    """Raises ValueError if a file's model is for another pipeline, and which."""
    takes, latents = unet.config.in_channels, vae.config.latent_channels
    kinds = {
        latents: ("TextToImagePipeline", "ImageToImagePipeline", "InpaintPipeline"),
        2 * latents + 1: ("InpaintPipeline",),
        latents + 3: ("SuperResolutionPipeline",),
    }
    fitting = kinds.get(takes, ())
    if pipeline not in fitting and (upscaler or pipeline in sum(kinds.values(), ())):
        use = f"load it with {' or '.join(fitting)}" if fitting else "no pipeline here takes that"
        raise ValueError(f"{file}: its UNet takes {takes} channels and the latents have {latents}; {use}")


def build_scheduler(
    weights: Checkpoint, original: OriginalSettings, upscaler: bool, prediction_type: str | None
) -> Any:
    import diffusers

    from latentdiff.pipelines.schedulers import find_scheduler

    config = dict(weights.header.get("scheduler", {})) or scheduler_settings(original, upscaler)
    name = find_scheduler(config.pop("_class_name", "DDIMScheduler"))
    if prediction_type is not None:
        config["prediction_type"] = prediction_type
    return getattr(diffusers, name).from_config(config)


def noising_scheduler() -> Any:
    """What puts noise on the small picture of Stable Diffusion's upscaler."""
    from diffusers import DDPMScheduler

    return DDPMScheduler(beta_schedule="squaredcos_cap_v2", beta_start=0.0001, beta_end=0.02)


def load_tokenizer(tokenizer: Any, text_encoder: Any) -> Any:
    """A tokenizer that is given, or its folder or hub id; or CLIP's."""
    if tokenizer is None:
        if type(text_encoder).__name__ == "LDMBertModel":
            raise ValueError(
                "Latent Diffusion's text encoder needs the tokenizer of bert-base-uncased, which the file does not "
                "hold; give its folder or hub id with tokenizer= (--tokenizer)"
            )
        return clip_tokenizer(text_encoder)
    if not isinstance(tokenizer, (str, Path)):
        return tokenizer
    from transformers import AutoTokenizer, BertTokenizer

    kind: Any = BertTokenizer if type(text_encoder).__name__ == "LDMBertModel" else AutoTokenizer
    loaded = kind.from_pretrained(str(tokenizer))
    longest = getattr(text_encoder.config, "max_position_embeddings", None)
    if longest is not None and loaded.model_max_length > longest:
        loaded.model_max_length = longest
    return loaded
