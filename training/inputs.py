"""From pictures and captions to what the objective takes: through the caches, or through the frozen networks."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentdiff.models import AutoencoderKL, FSQModel, GumbelVQModel, IdentityAutoencoder, VQModel
from latentdiff.text import encode_prompts, max_tokens
from latentdiff.training.cache import LatentCache, TextCache
from latentdiff.training.config import DiffusionSettings
from latentdiff.training.data import CaptionedPicture
from latentdiff.training.draws import Captions, Sources, Views
from latentdiff.training.run import TrainingRun

logger = logging.getLogger(__name__)

Autoencoder = AutoencoderKL | VQModel | GumbelVQModel | FSQModel | IdentityAutoencoder


def pixels_per_latent(autoencoder: Any) -> int:
    """Pixels per latent along one side, of any autoencoder."""
    return int(2 ** (len(autoencoder.config.block_out_channels) - 1))


class Inputs:
    """Makes an objective's arguments of a batch; holds the frozen networks only where no cache takes their place.

    Args:
        autoencoder, text_encoder: frozen, in evaluation mode.
        sources: where the samples of the batches came from.
    """

    def __init__(
        self, autoencoder: Any, tokenizer: Any, text_encoder: Any, sources: Sources, device: torch.device
    ) -> None:
        self.scale = float(autoencoder.config.scaling_factor)
        self.shift = float(getattr(autoencoder.config, "shift_factor", None) or 0.0)
        self.device = device
        self.autoencoder = autoencoder.to(device) if sources.latents is None else None
        reads_captions = sources.text is None and sources.tokenize is None
        self.text_encoder = text_encoder.to(device) if reads_captions else None
        self.tokenizer = tokenizer

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The arguments of `DenoiserObjective`, and ``names``."""
        inputs = {key: batch[key] for key in ("noise", "timesteps", "timestep_draws", "loss_weight")}
        inputs["latents"] = self.latents(batch)
        if "caption" in batch:
            assert self.text_encoder is not None
            with torch.no_grad():
                inputs["encoder_hidden_states"] = encode_prompts(
                    batch["caption"], self.tokenizer, self.text_encoder
                ).float()
        elif "encoder_hidden_states" in batch:
            inputs["encoder_hidden_states"] = batch["encoder_hidden_states"].to(self.device).float()
        else:
            inputs |= {key: batch[key] for key in ("input_ids", "attention_mask", "class_labels") if key in batch}
        on_device = {key: value.to(self.device, non_blocking=True) for key, value in inputs.items()}
        return {**on_device, "names": batch["name"]}

    @torch.no_grad()
    def latents(self, batch: dict[str, Any]) -> Tensor:
        """Latents drawn from the encoder's posterior, scaled. (B, C, h, w) float32"""
        noise = batch["posterior_noise"].to(self.device)
        if self.autoencoder is None:
            mean, std = batch["moments"].to(self.device).float().unbind(1)  # (B, C, h, w) each
            return (mean + std * noise - self.shift) * self.scale
        encoded = self.autoencoder.encode(batch["pixels"].to(self.device))
        if hasattr(encoded, "latents"):  # a codebook's latents have no spread
            return (encoded.latents - self.shift) * self.scale
        posterior = encoded.latent_dist
        return (posterior.mean + posterior.std * noise - self.shift) * self.scale


def open_sources(
    run: TrainingRun,
    settings: DiffusionSettings,
    pictures: Sequence[tuple[CaptionedPicture, Sequence[Any]]],
    autoencoder: Any,
    tokenizer: Any,
    text_encoder: Any,
    text_is_trained: bool,
    prepare_caption: Callable[[str], str] | None = None,
    read_caption: Callable[[str], dict[str, Tensor]] | None = None,
) -> Sources:
    """The caches that the settings ask for, filled with all of `pictures` in these views.

    read_caption: what becomes of a caption where there is no text encoder.

    Encoders are back on the CPU afterwards, so that a GPU's memory is the denoiser's.
    """
    folder = Path(settings.cache_dir) if settings.cache_dir else run.folder / "cache"
    latents, text = None, None
    if settings.cache_latents:
        autoencoder.to(run.device)
        latents = LatentCache(folder / "latents", autoencoder)
        wanted = [(picture, view) for picture, views in pictures for view in views]
        latents.fill(wanted, autoencoder, run.accelerator, min(8, settings.batch_size), settings.num_workers)
        autoencoder.to("cpu")
    if settings.cache_text and not text_is_trained and read_caption is None:
        text_encoder.to(run.device)
        text = TextCache(folder / "text", tokenizer, text_encoder)
        captions = Captions(settings)
        distinct = {caption for picture, _ in pictures for caption in captions.all(picture.captions)}
        distinct |= {picture.captions[0] for picture, _ in pictures} | {""}
        text.fill(sorted(distinct), tokenizer, text_encoder, run.accelerator)
        text_encoder.to("cpu")
    tokenize: Any = read_caption
    if text_is_trained:
        mask = bool(getattr(text_encoder.config, "use_attention_mask", False))
        tokenize = Tokenize(tokenizer, max_tokens(tokenizer, text_encoder), mask, prepare_caption)
    return Sources(latents, text, tokenize)


@dataclass
class Tokenize:
    """What a text encoder reads of a caption: ``input_ids`` and, if `mask`, ``attention_mask``, (L,) each."""

    tokenizer: Any
    length: int
    mask: bool
    prepare: Callable[[str], str] | None = None

    def __call__(self, caption: str) -> dict[str, Tensor]:
        prompt = [self.prepare(caption) if self.prepare else caption]
        encoded = self.tokenizer(
            prompt, padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        )
        read = {"input_ids": encoded.input_ids[0]}
        return {**read, "attention_mask": encoded.attention_mask[0]} if self.mask else read


def frozen(*networks: Any) -> None:
    """Networks that are not trained: no gradients, evaluation mode."""
    for network in networks:
        network.requires_grad_(False).eval()


def all_views(views: Views, pictures: Sequence[CaptionedPicture]) -> list[tuple[CaptionedPicture, Sequence[Any]]]:
    """Each picture with every view of it that training may take."""
    return [(picture, views.all(i)) for i, picture in enumerate(pictures)]


def centred_views(views: Views, pictures: Sequence[CaptionedPicture]) -> list[tuple[CaptionedPicture, Sequence[Any]]]:
    """Each picture with its middle, not mirrored."""
    return [(picture, [views.centred(i)]) for i, picture in enumerate(pictures)]
