"""LoRA and textual inversion for our pipelines: diffusers' mix-ins, with checks before anything is changed."""

import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

from diffusers.loaders import StableDiffusionLoraLoaderMixin, TextualInversionLoaderMixin
from torch import Tensor

from latentdiff.interchange.adapter_files import LORA_NAMES, METADATA_KEY, save_whole
from latentdiff.interchange.embeddings import find_embeddings
from latentdiff.interchange.lora.layers import of_network, peft_config, peft_tensors
from latentdiff.pipelines.storage.lora import (
    FittedLora,
    add_to_encoder,
    all_or_none,
    check_swappable,
    fit_lora,
    free_name,
    is_clips,
    names_in_use,
)

logger = logging.getLogger(__name__)


class LoadedLora(NamedTuple):
    """What `load_lora_weights` did: the adapter's name, and the keys that have a place in the networks, or none."""

    adapter_name: str
    matched: list[str]
    unmatched: list[str]


class AdapterPipeline(StableDiffusionLoraLoaderMixin, TextualInversionLoaderMixin):
    """``set_adapters``, ``fuse_lora``, ``unfuse_lora``, ``unload_lora_weights`` and the rest are diffusers' own."""

    unet: Any
    text_encoder: Any
    tokenizer: Any

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | Path | dict[str, Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        *,
        weight_name: str | None = None,
        scale: float = 1.0,
        low_cpu_mem_usage: bool = True,
        **hub: Any,
    ) -> LoadedLora:
        """Load a LoRA of the UNet, of the text encoder, or of both; it then is the active one.

        Several can be loaded, one after the other; ``set_adapters(["a", "b"], [0.7, 0.3])`` makes them act together.

        Args:
            pretrained_model_name_or_path_or_dict: a safetensors file, a folder, an ``owner/name`` on the hub, or the
                tensors themselves; in diffusers', PEFT's or kohya's format.
            adapter_name: its name in later calls; by default ``default_0`` and so on.
            hotswap: put it in the place of the adapter of this name, as long as that need not be compiled anew (UNet
                only, all layers of one alpha / rank; see diffusers).
            weight_name: of the file in the folder or on the hub.
            scale: how strongly it acts.
            low_cpu_mem_usage: do not make random weights first.
            hub: ``subfolder``, and for the hub ``revision``, ``token``, ``cache_dir``, ``local_files_only`` and so on.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a safetensors file, or is damaged; no key of it has a place here; a shape does not
                fit; the name is taken. Nothing is changed then.
        """
        networks = {name: network for name in self._lora_loadable_modules if (network := getattr(self, name, None))}
        hub = {key: value for key, value in hub.items() if key not in ("use_safetensors", "return_lora_metadata")}
        lora = fit_lora(pretrained_model_name_or_path_or_dict, networks, weight_name, hub)
        adapter_name = adapter_name or free_name(networks)
        if not hotswap and adapter_name in names_in_use(networks):
            raise ValueError(f"there is an adapter {adapter_name!r} already; choose another adapter_name")
        if hotswap:
            check_swappable(lora)
        with all_or_none(networks, adapter_name):
            self._add_lora(lora, adapter_name, hotswap=hotswap, low_cpu_mem_usage=low_cpu_mem_usage)
            if scale != 1.0:
                self.set_adapters(adapter_name, scale)
        total = len(lora.matched) + len(lora.unmatched)
        logger.info("LoRA %s: %d of %d keys matched", adapter_name, len(lora.matched), total)
        if lora.unmatched:
            logger.warning(
                "LoRA %s: %d of its keys are not of this model and are left out, such as %s",
                *(adapter_name, len(lora.unmatched), lora.unmatched[0]),
            )
        return LoadedLora(adapter_name, lora.matched, lora.unmatched)

    def _add_lora(self, lora: FittedLora, adapter_name: str, **options: Any) -> None:
        """Into the networks that it has layers of."""
        for network in self._lora_loadable_modules:
            own = of_network(lora.layers, network)
            if not own:
                continue
            config = peft_config(own)
            if network == "text_encoder" and not is_clips(own):
                add_to_encoder(self.text_encoder, peft_tensors(own), config, adapter_name)
                continue
            tensors = {f"{network}.{key}": tensor for key, tensor in peft_tensors(own).items()}
            load = self.load_lora_into_unet if network == "unet" else self.load_lora_into_text_encoder
            metadata = {f"{network}.{key}": value for key, value in config.items()}
            load(
                tensors,
                None,
                getattr(self, network),
                adapter_name=adapter_name,
                metadata=metadata,
                _pipeline=self,
                **options,
            )

    @staticmethod
    def write_lora_layers(
        state_dict: dict[str, Tensor],
        save_directory: str | Path,
        is_main_process: bool = True,
        weight_name: str | None = None,
        save_function: Any = None,
        safe_serialization: bool = True,
        lora_adapter_metadata: dict[str, Any] | None = None,
    ) -> None:
        """What ``save_lora_weights`` ends in: one safetensors file, whole or not at all.

        Raises:
            ValueError: another way of saving is asked for.
        """
        if not safe_serialization or save_function is not None:
            raise ValueError("save_lora_weights: a LoRA is saved in a safetensors file, and by no save_function")
        if not is_main_process:
            return
        header = {"format": "pt"}
        if lora_adapter_metadata:
            header[METADATA_KEY] = json.dumps(lora_adapter_metadata, default=sorted, indent=2, sort_keys=True)
        save_whole(state_dict, Path(save_directory) / (weight_name or LORA_NAMES[0]), header)

    def load_textual_inversion(
        self,
        pretrained_model_name_or_path: Any,
        token: str | list[str] | None = None,
        tokenizer: Any = None,
        text_encoder: Any = None,
        *,
        weight_name: str | None = None,
        allow_pickle: bool = False,
        **hub: Any,
    ) -> None:
        """Teach the pipeline new words from embeddings, such as `latentdiff finetune` makes.

        Args:
            pretrained_model_name_or_path: a file in diffusers' or A1111's format, a folder, an ``owner/name`` on the
                hub, a tensor or tensors {word: (n, D) or (D,)}; or a list of these.
            token: the word, or one for each; by default what the file says, or else its name.
            tokenizer, text_encoder: by default the pipeline's.
            weight_name: of the file in the folder or on the hub.
            allow_pickle: read ``.pt`` and ``.bin`` files as well, tensors only; nothing in them is run.
            hub: as for `load_lora_weights`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is of another kind, is damaged or of another width; the word is known already.
        """
        tokenizer, text_encoder = tokenizer or self.tokenizer, text_encoder or self.text_encoder
        hub = {key: value for key, value in hub.items() if key != "use_safetensors"}
        words = find_embeddings(pretrained_model_name_or_path, token, weight_name, allow_pickle, hub)
        width = text_encoder.get_input_embeddings().weight.shape[1]
        for word, vectors in words:
            if vectors.shape[-1] != width:
                raise ValueError(
                    f"the embedding {word!r} has the shape {tuple(vectors.shape)}; this text encoder's are {width} "
                    f"wide, so it is for another model"
                )
        sources = [{word: vectors} for word, vectors in words]
        super().load_textual_inversion(sources, [word for word, _ in words], tokenizer, text_encoder)

    def unload_textual_inversion(self, tokens: Any = None, tokenizer: Any = None, text_encoder: Any = None) -> None:
        """Forget words that were loaded; all by default.

        Raises:
            ValueError: some of several, with a tokenizer in which diffusers would then number the rest wrongly.
        """
        tokenizer = tokenizer or self.tokenizer
        decoder = tokenizer.added_tokens_decoder
        ordinary = [token.content for token in decoder.values() if not token.special]
        special = [number for number, token in decoder.items() if token.special]
        first = len(tokenizer) - len(ordinary)
        wanted = {tokens} if isinstance(tokens, str) else set(tokens or ordinary)
        if wanted & set(ordinary) and not wanted >= set(ordinary) and max(special, default=-1) + 1 != first:
            raise ValueError(f"a {type(tokenizer).__name__} can only forget all new words at once: {ordinary}")
        super().unload_textual_inversion(tokens, tokenizer, text_encoder or self.text_encoder)
