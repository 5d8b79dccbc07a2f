"""Pipelines from and to single files, the form in which Stable Diffusion's models are shared."""

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from latentdiff.dtypes import read_dtype
from latentdiff.interchange.folders import check_model_files
from latentdiff.interchange.packed import (
    SECOND_TOKENIZER_KEY,
    TOKENIZER_KEY,
    packed_content,
    tokenizer_text,
    unpacked_tokenizer,
)
from latentdiff.interchange.single_file import (
    HUB_OPTIONS,
    Checkpoint,
    NoOriginalNamesError,
    OriginalSettings,
    assumed_settings,
    build_autoencoder,
    build_text_encoder,
    build_unet,
    check_checkpoint,
    check_prediction_is_known,
    clip_tokenizer,
    find_file,
    header_of_parts,
    is_refiner,
    is_sdxl,
    is_stable_diffusion_2,
    original_autoencoder,
    original_text_encoder,
    original_text_encoders,
    original_unet,
    plain_config,
    scheduler_settings,
    sdxl_scheduler_settings,
    unet_config,
    write_checkpoint,
)
from latentdiff.interchange.user_files import check_timesteps, faults_named
from latentdiff.models import AutoencoderKL, AutoencoderTiny, GumbelVQModel, UNet2DConditionModel, VQModel
from latentdiff.models.loras import refuse_loras, whole_network
from latentdiff.models.network import downscale_factor
from latentdiff.pipelines.core.call_options import refuse_unknown
from latentdiff.pipelines.registry import kind_saved_as, kinds_of_unet
from latentdiff.pipelines.storage.folder import DEFAULTS
from latentdiff.pipelines.storage.packed import PackedPipeline, class_for

CLIP_WORDS = 49408
ZEROS, SCORED = "force_zeros_for_empty_prompt", "requires_aesthetics_score"  # of SDXL's pipelines
PREDICTIONS = ("epsilon", "v_prediction", "sample")
SCHEDULERS = ("scheduler", "low_res_scheduler")
AUTOENCODERS = {kind.__name__: kind for kind in (AutoencoderKL, VQModel, GumbelVQModel, AutoencoderTiny)}


class SingleFilePipeline(PackedPipeline):
    """``from_single_file`` and ``save_single_file``."""

    unet: Any
    vae: Any
    text_encoder: Any
    scheduler: Any
    saved_class_name: ClassVar[str]

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
        """Load a model from one file: Stable Diffusion 1, 2 or XL, inpainting too, the x4 upscaler, Latent Diffusion.

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
            tokenizer: a tokenizer, or the folder or hub id of one; needed for the files in which Latent Diffusion was
                released (bert-base-uncased).
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
        dtype = read_dtype(others.pop("torch_dtype", None) or dtype)
        hub = {name: others.pop(name) for name in HUB_OPTIONS if name in others}
        check_prediction(prediction_type)
        file = find_file(source, allow_pickle, **hub)
        if packed_content(file) is not None:
            unused: dict[str, Any] = {
                "prediction_type": prediction_type,
                "sample_size": sample_size,
                "scaling_factor": scaling_factor,
            }
            unused |= {"attention_head_dim": attention_head_dim, "original_config": original_config, "ema": ema}
            refuse_settings(file, unused | {"tokenizer": tokenizer, "vae": others.get("vae")})
            return cls.from_packed(file, dtype, others if tokenizer is None else {**others, "tokenizer": tokenizer})
        stated = OriginalSettings(
            prediction_type=prediction_type,
            sample_size=sample_size,
            scaling_factor=scaling_factor,
            heads=attention_head_dim,
        )
        parts = CheckpointParts(Checkpoint(file, allow_pickle, ema), dtype, stated, original_config)
        own = class_for(cls, file, is_sdxl(parts.weights))
        return own.of_parts(parts, {**others, **hub}, tokenizer, allow_pickle)

    @classmethod
    def of_parts(cls, parts: "CheckpointParts", others: dict[str, Any], tokenizer: Any, allow_pickle: bool) -> Self:
        """A checkpoint's pipeline; see `from_single_file`."""
        known, file = inspect.signature(cls.__init__).parameters, parts.weights.file
        hub = {name: others.pop(name) for name in HUB_OPTIONS if name in others}
        own = [*inspect.signature(cls.from_single_file).parameters, *HUB_OPTIONS]
        refuse_unknown(f"{cls.__name__}.from_single_file: unknown argument", others, known, own)
        given = dict(others)
        if isinstance(given.get("vae"), (str, Path)):
            given["vae"] = parts.vae_of(find_file(given["vae"], allow_pickle, **hub), allow_pickle)
        for name in ("unet", "vae"):
            given[name] = getattr(parts, name)() if given.get(name) is None else given[name]
        check_kind(cls, given["unet"], given["vae"], file)
        for name in ("text_encoder", "text_encoder_2", "scheduler", "low_res_scheduler"):
            if name in known and name not in given:
                given[name] = getattr(parts, name)()
        if tokenizer is not None or given["text_encoder"] is not None:
            tokenizer = load_tokenizer(tokenizer, given["text_encoder"], parts.weights)
        if "tokenizer_2" in known:
            second = given.get("tokenizer_2")
            given["tokenizer_2"] = load_tokenizer(second, given["text_encoder_2"], parts.weights, SECOND_TOKENIZER_KEY)
        given = {**{name: value for name, value in parts.told().items() if name in known}, **given}
        pipeline: Any = cls(**{**given, "tokenizer": tokenizer})
        pipeline.register_defaults(**parts.defaults())
        return pipeline

    def save_single_file(self, file: str | Path, dtype: torch.dtype | None = None, overwrite: bool = False) -> None:
        """Write the networks into one safetensors file with the names of the original checkpoints.

        The programs that read Stable Diffusion's files read it. Its header holds the configs, so `from_single_file`
        brings the same pipeline back, with a tokenizer other than CLIP's in it too. A safety checker is not written.
        Stable Diffusion 2's text encoder lacks the layer that it never uses (`original_text_encoder`).

        A model that such files cannot hold, with another text encoder or other networks, is written in a layout of
        this package's own (`latentdiff.interchange.packed`), with its tokenizer and all; a warning says so.

        Args:
            file: named ``.safetensors``; written whole or not at all.
            dtype: of the weights in it, such as ``torch.float16``; by default as they are.
            overwrite: replace a file that is there.

        Raises:
            FileExistsError: the file is there.
            ValueError: another kind of file, or there are LoRAs in a network.
        """
        names = ("unet", "vae", "text_encoder", "text_encoder_2")
        networks = {name: whole_network(getattr(self, name, None)) for name in names}
        networks = {name: network for name, network in networks.items() if network is not None}
        refuse_loras(networks, "saved")
        kind: Any = kind_saved_as(self.saved_class_name)
        converted = kind is None or kind.converted or kind.family == "SDXL"
        if not converted:
            return super().save_single_file(file, dtype, overwrite)
        try:
            weights = original_unet(networks["unet"]) | original_autoencoder(networks["vae"])
            if "text_encoder_2" in networks:
                weights |= original_text_encoders(networks.get("text_encoder"), networks["text_encoder_2"])
            else:
                weights |= original_text_encoder(networks.get("text_encoder"))
        except NoOriginalNamesError:
            return super().save_single_file(file, dtype, overwrite)
        write_checkpoint(weights, header_of(self), file, dtype, overwrite)


def refuse_settings(file: Path, settings: dict[str, Any]) -> None:
    """Raises ValueError for what a file of this package's own layout says itself."""
    for name, value in settings.items():
        if isinstance(value, str | Path | int | float) and value is not False:
            raise ValueError(
                f"{file} holds the whole folder of a model, so {name}={str(value)[:100]!r} does nothing; leave it out"
            )


def check_prediction(prediction_type: str | None) -> None:
    """Raises ValueError for what no model predicts."""
    if prediction_type not in (None, *PREDICTIONS):
        raise ValueError(f"prediction_type={prediction_type!r} is not known; it is {' or '.join(PREDICTIONS)}")


class CheckpointParts:
    """The components of a pipeline that are in a checkpoint, each built when it is asked for.

    Args:
        weights: of a checkpoint.
        dtype: of the weights; None leaves the file's.
        stated: what the caller knows of the model; `original_config` counts where the caller states nothing.

    Raises:
        FileNotFoundError: there is no such YAML file.
        ValueError: the file is no checkpoint of a known kind, or the YAML file is damaged.
    """

    def __init__(
        self,
        weights: Checkpoint,
        dtype: torch.dtype | None = None,
        stated: OriginalSettings | None = None,
        original_config: str | Path | None = None,
    ) -> None:
        check_checkpoint(weights)
        stated = stated or OriginalSettings()
        yaml = OriginalSettings.read(Path(original_config)) if original_config else OriginalSettings()
        if is_stable_diffusion_2(weights):  # whose YAML file says 64 for 768 pixels too
            yaml = replace(yaml, sample_size=None)
        self.weights, self.dtype, self.stated = weights, dtype, yaml | stated
        self.settings = assumed_settings(weights, self.stated)

    def unet(self) -> Any:
        size, changes = self.settings.sample_size, self.heads()
        if "unet" in self.weights.header:
            size = self.stated.sample_size
        changes = changes if size is None else {**changes, "sample_size": size}
        return build_unet(self.weights, self.dtype, changes, UNet2DConditionModel)

    def heads(self) -> dict[str, Any]:
        """The number of attention heads, if it was stated. In the original code their width takes precedence."""
        if self.stated.head_channels:
            config = self.weights.header.get("unet") or unet_config(self.weights)
            widths = [max(1, width // self.stated.head_channels) for width in config["block_out_channels"]]
            return {"attention_head_dim": widths}
        return {"attention_head_dim": self.stated.heads} if self.stated.heads else {}

    def vae(self) -> Any:
        if "vae" in self.weights.header:
            factor = self.stated.scaling_factor
            stated = {} if factor is None else {"scaling_factor": factor}
            return build_autoencoder(self.weights, self.dtype, stated, AUTOENCODERS)
        changes = {"scaling_factor": self.settings.scaling_factor}
        vae = build_autoencoder(self.weights, self.dtype, changes, AUTOENCODERS)
        size = (self.settings.sample_size or 64) * downscale_factor(vae.config)
        vae.register_to_config(sample_size=size)
        return vae

    def vae_of(self, file: Path, allow_pickle: bool) -> Any:
        """The autoencoder of another file, for this one's UNet."""
        other = CheckpointParts(Checkpoint(file, allow_pickle), self.dtype, self.stated)
        if other.stated.scaling_factor is None:
            other.settings = replace(other.settings, scaling_factor=self.settings.scaling_factor)
        return other.vae()

    def text_encoder(self) -> Any:
        """None in SDXL's refiner, which has the second one alone."""
        return None if is_refiner(self.weights) else build_text_encoder(self.weights, self.dtype)

    def text_encoder_2(self) -> Any:
        return build_text_encoder(self.weights, self.dtype, "text_encoder_2")

    def scheduler(self) -> Any:
        """The one the file was saved with, else DDIM, or SDXL's Euler.

        Raises:
            ValueError: the file's header names none of diffusers' schedulers, or one that cannot be.
        """
        config = dict(self.weights.header.get("scheduler", {}))
        if config:
            said = scheduler_settings(self.stated)
            config |= {key: value for key, value in said.items() if key in self.stated.said()}
            return self.built(config)
        if self.stated.prediction_type is None:
            check_prediction_is_known(self.weights)
        if is_sdxl(self.weights):
            return self.built(sdxl_scheduler_settings(self.settings))
        return self.built({**scheduler_settings(self.settings), "_class_name": "DDIMScheduler"})

    def low_res_scheduler(self) -> Any:
        """The one that adds noise to the small picture of the upscaler."""
        usual = {"beta_schedule": "squaredcos_cap_v2", "beta_start": 0.0001, "beta_end": 0.02}
        return self.built(self.weights.header.get("low_res_scheduler") or {**usual, "_class_name": "DDPMScheduler"})

    def built(self, config: dict[str, Any]) -> Any:
        import diffusers

        name = str(config.get("_class_name"))
        kind: Any = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
        if kind is None or not issubclass(kind, diffusers.SchedulerMixin):
            raise ValueError(f"{self.weights.file} names a {name}, which is none of diffusers' schedulers")
        check_timesteps(config, f"{self.weights.file}: its {name}")
        try:
            return kind.from_config({key: value for key, value in config.items() if not key.startswith("_")})
        except Exception as error:  # a scheduler may raise anything for values from a file
            raise ValueError(f"{self.weights.file}: the config of its {name} is damaged ({error})") from None

    def defaults(self) -> dict[str, Any]:
        """``num_inference_steps`` and ``guidance_scale`` that the file was saved with."""
        own = self.weights.header.get("defaults", {})
        return {key: own[key] for key in DEFAULTS if isinstance(own.get(key), (int, float))}

    def told(self) -> dict[str, Any]:
        """What the file says of the pipeline itself."""
        level = self.weights.header.get("low_res_scheduler", {}).get("_max_noise_level")
        found = {"max_noise_level": level} if isinstance(level, int) else {}
        usual = {ZEROS: False, SCORED: True} if is_refiner(self.weights) else {}
        said = self.weights.header.get("pipeline", {})
        return found | usual | {name: said[name] for name in (ZEROS, SCORED) if isinstance(said.get(name), bool)}


def header_of(pipeline: Any) -> dict[str, str]:
    """The configs of a pipeline's parts, for the header of its file."""
    configs = {
        name: plain_config(part)
        for name in ("unet", "vae", "text_encoder", "text_encoder_2", *SCHEDULERS)
        if (part := getattr(pipeline, name, None)) is not None
    }
    for name in SCHEDULERS:
        if name in configs:
            configs[name]["_class_name"] = type(getattr(pipeline, name)).__name__
    if "low_res_scheduler" in configs:
        configs["low_res_scheduler"]["_max_noise_level"] = pipeline.config.max_noise_level
    configs["defaults"] = dict(pipeline.config.get("_generation_defaults", {}))
    if ZEROS in pipeline.config:
        configs["pipeline"] = {name: pipeline.config[name] for name in (ZEROS, SCORED) if name in pipeline.config}
    header = header_of_parts(configs)
    for number, key in (("", TOKENIZER_KEY), ("_2", SECOND_TOKENIZER_KEY)):
        tokenizer = getattr(pipeline, f"tokenizer{number}", None)
        words = configs.get(f"text_encoder{number}", {}).get("vocab_size")
        if tokenizer is not None and words != CLIP_WORDS:  # nobody else has the tokenizer
            header[key] = tokenizer_text(tokenizer)
    return header


def check_kind(pipeline: type, unet: Any, vae: Any, file: Path) -> None:
    """Raises ValueError if a file's model is for another pipeline than the class `pipeline`, and for which."""
    takes, latents = unet.config.in_channels, vae.config.latent_channels
    fitting = [kind.name for kind in kinds_of_unet(takes, latents)]
    if not {base.__name__ for base in pipeline.__mro__}.intersection(fitting):
        use = f"load it with {' or '.join(fitting)}" if fitting else "no pipeline here takes that"
        raise ValueError(f"{file}: its UNet takes {takes} channels and the latents have {latents}; {use}")


def load_tokenizer(
    tokenizer: Any, text_encoder: Any, weights: Checkpoint | None = None, key: str = TOKENIZER_KEY
) -> Any:
    """A tokenizer that is given, or its folder or hub id; or that of a file which has its own; or CLIP's.

    Raises:
        ValueError: none is given, and the text encoder is not CLIP's.
    """
    if tokenizer is None:
        if weights is not None and key in weights.metadata:
            with unpacked_tokenizer(weights.file, weights.metadata[key]) as folder:
                return load_tokenizer(folder, text_encoder)
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
    if Path(tokenizer).is_dir():
        check_model_files(Path(tokenizer))
    with faults_named(tokenizer, foreign=True):
        loaded = kind.from_pretrained(str(tokenizer))
    longest = getattr(text_encoder.config, "max_position_embeddings", None)
    if longest is not None and loaded.model_max_length > longest:
        loaded.model_max_length = longest
    return loaded
