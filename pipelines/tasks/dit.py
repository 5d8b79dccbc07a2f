"""Pipelines whose denoiser is a transformer, and DiT's (Peebles & Xie 2023), of classes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import diffusers

from latentdiff.models import DiTTransformer2DModel
from latentdiff.pipelines.core.pipeline import AnyAutoencoder, LatentPipeline
from latentdiff.pipelines.storage.loras import LoraPipeline
from latentdiff.pipelines.tasks.class_conditional import ClassConditionalPipeline


class TransformerPipeline(LoraPipeline, LatentPipeline):
    """What pipelines share whose denoiser is a transformer, the component ``transformer``; ``unet`` is it, too."""

    transformer: Any
    _lora_loadable_modules: ClassVar[list[str]] = ["transformer"]

    @property
    def unet(self) -> Any:
        return self.transformer

    @unet.setter
    def unet(self, network: Any) -> None:
        self.transformer = network

    @property
    def side_factor(self) -> int:
        """Pixels of a patch's side."""
        return self.vae_scale_factor * int(self.transformer.config.patch_size)

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | Path,
        transformer_lora_layers: Mapping[str, Any] | None = None,
        text_encoder_lora_layers: Mapping[str, Any] | None = None,
        *,
        transformer_lora_adapter_metadata: Mapping[str, Any] | None = None,
        text_encoder_lora_adapter_metadata: Mapping[str, Any] | None = None,
        **saving: Any,
    ) -> None:
        """Write a LoRA's matrices, by PEFT's names, as diffusers writes those of its pipelines with a transformer.

        diffusers' pipelines of PixArt and DiT load no LoRA. PEFT does, into the transformer, from its own format
        (``latentdiff convert FILE FOLDER --to peft``; ``PeftModel.from_pretrained(pipeline.transformer, FOLDER)``).

        Args:
            saving: ``weight_name``, ``is_main_process``.

        Raises:
            ValueError: there are none, or another way of saving is asked for.
        """
        layers = {"transformer": transformer_lora_layers, "text_encoder": text_encoder_lora_layers}
        told = {"transformer": transformer_lora_adapter_metadata, "text_encoder": text_encoder_lora_adapter_metadata}
        layers = {name: matrices for name, matrices in layers.items() if matrices}
        if not layers:
            raise ValueError("save_lora_weights: there are no transformer_lora_layers or text_encoder_lora_layers")
        cls._save_lora_weights(save_directory, layers, {name: told[name] for name in layers}, **saving)

    def enable_freeu(self, s1: float, s2: float, b1: float, b2: float) -> None:
        """Raises ValueError: FreeU is for UNets."""
        raise ValueError(f"FreeU is for UNets, and the denoiser of this {type(self).__name__} is a transformer")

    def disable_freeu(self) -> None:
        """Nothing: it cannot be enabled."""


class DiTPipeline(TransformerPipeline, ClassConditionalPipeline):
    """Draws pictures of classes with a transformer: ``pipeline("golden retriever", seed=0).images[0]``.

    `ClassConditionalPipeline` says how to call. ``ClassConditionalPipeline.from_pretrained`` of a DiT's folder gives
    such a pipeline. With the same components, latents and scheduler the pictures are those of diffusers'
    ``DiTPipeline``, as which this one is saved. Of a model of another number of classes than 1000, that guides by the
    wrong label, or fails.

    Args:
        transformer: a ``DiTTransformer2DModel``; its label after the last stands for no class.
        vae: as of ``TextToImagePipeline``.
        scheduler: any of diffusers' with ``step``.
        id2label: names of the classes, by number from 0; there may be fewer than the transformer has embeddings for.

    Raises:
        ValueError: components that do not fit together.
    """

    saved_class_name = "DiTPipeline"
    usual_defaults: ClassVar[dict[str, Any]] = {"num_inference_steps": 50, "guidance_scale": 4.0}
    unet_classes = ("DiTTransformer2DModel",)
    model_cpu_offload_seq = "transformer->vae"
    _optional_components: ClassVar[list[str]] = []
    _exclude_from_cpu_offload: ClassVar[list[str]] = []

    vae: Any = None  # a component here, and not the property of pipelines without text
    classifier = None

    def __init__(
        self,
        transformer: DiTTransformer2DModel | diffusers.DiTTransformer2DModel,
        vae: AnyAutoencoder,
        scheduler: Any,
        id2label: Mapping[Any, str] | None = None,
    ) -> None:
        super(ClassConditionalPipeline, self).__init__()
        self.register_parts(scheduler, transformer=transformer, vae=vae)
        names = None if id2label is None else {int(number): str(name) for number, name in id2label.items()}
        self.register_to_config(id2label=names)
        self.check_classes()

    @property
    def vqvae(self) -> Any:
        return self.vae

    @property
    def class_embeds(self) -> int:
        return int(self.transformer.config.num_embeds_ada_norm) + 1

    @property
    def num_classes(self) -> int:
        """By the names, else by the transformer."""
        return self.class_embeds - 1 if self.id2label is None else len(self.id2label)

    @property
    def null_label(self) -> int:
        return self.class_embeds - 1

    def check_classes(self) -> None:
        """Raises ValueError if there are names of other classes than the transformer has."""
        names = self.id2label or {}
        if sorted(names) != list(range(len(names))) or len(names) >= self.class_embeds:
            raise ValueError(
                f"id2label must name classes from 0 on, at most the {self.class_embeds - 1} of the transformer "
                f"(num_embeds_ada_norm), not {len(names)}: {sorted(names)[:5]}..."
            )
