"""``from_single_file`` of networks, and ``save_single_file`` of the autoencoders."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from latentdiff.dtypes import read_dtype

if TYPE_CHECKING:
    from latentdiff.interchange.single_file import Checkpoint


def find_checkpoint(network: type, source: str | Path, allow_pickle: bool, hub: dict[str, Any]) -> Path:
    """The file of a checkpoint; see `latentdiff.interchange.single_file.find_file`.

    Raises:
        TypeError: one of the arguments `hub` is unknown.
    """
    from latentdiff.interchange.single_file import HUB_OPTIONS, find_file

    for name in hub:
        if name not in HUB_OPTIONS:
            raise TypeError(f"{network.__name__}.from_single_file: unknown argument {name!r}")
    return find_file(source, allow_pickle, **hub)


def coder_checkpoints(
    network: type, source: str | Path, decoder: str | Path | None, allow_pickle: bool, hub: dict[str, Any]
) -> dict[str, "Checkpoint"]:
    """The checkpoints of an autoencoder's ``encoder`` and ``decoder``: two files, or one with both.

    Raises:
        TypeError: one of the arguments `hub` is unknown.
    """
    from latentdiff.interchange.single_file import Checkpoint

    found = [
        Checkpoint(find_checkpoint(network, place, allow_pickle, hub), allow_pickle)
        for place in (source, decoder)
        if place is not None
    ]
    return {"encoder": found[0], "decoder": found[-1]}


def packed_network(network: Any, file: Path, dtype: torch.dtype | None, unused: dict[str, Any]) -> Any:
    """The network of a class in a file that holds a pipeline's folder, as ours do; None for other files.

    Args:
        unused: options that only other files take.

    Raises:
        ValueError: the file holds no such network, it is damaged, or there is one of these options.
    """
    from latentdiff.interchange.folders import first_dtype
    from latentdiff.interchange.packed import packed_index, unpacked

    index = packed_index(file)
    if index is None:
        return None
    for name, value in unused.items():
        if value is not None:
            raise ValueError(f"{file} holds its networks' configs, so {name}={value!r} does nothing; leave it out")
    classes = {name: value[1] for name, value in index.items() if isinstance(value, list) and len(value) == 2}
    part = next((name for name, value in classes.items() if value == network.__name__), None)
    if part is None:
        have = ", ".join(f"{value} ({name})" for name, value in classes.items() if value is not None)
        raise ValueError(f"{file} holds no {network.__name__}; it has {have}")
    with unpacked(file, [part]) as folder:
        weights = next((folder / part).glob("*.safetensors"), None)
        dtype = dtype or (weights and first_dtype(weights)) or torch.float32
        found, info = network.from_pretrained(folder / part, dtype=dtype, output_loading_info=True)
        if info["missing_keys"]:
            raise ValueError(f"{file}: {len(info['missing_keys'])} weights of its {part} are missing")
        return found


class SingleFileModel:
    """An autoencoder that goes from and to files with the original names of Latent Diffusion's weights."""

    @classmethod
    def from_single_file(
        cls,
        source: str | Path,
        *,
        dtype: torch.dtype | None = torch.float32,
        scaling_factor: float | None = None,
        sample_size: int | None = None,
        original_config: str | Path | None = None,
        ema: bool = False,
        allow_pickle: bool = False,
        **hub: Any,
    ) -> Self:
        """Load an autoencoder from one file: of its own, or of a whole model of which it is a part.

        Latent Diffusion's and Stable Diffusion's, with a Gaussian or a codebook, and Taming Transformers' VQGANs. Its
        shape is inferred from the weights; other tensors of a training checkpoint, such as the losses', are ignored.

        Args:
            source: a ``.safetensors`` file, or ``owner/name/file.safetensors`` on the hub, or its address there.
            dtype: of the weights; None leaves the file's.
            scaling_factor: for the config, since weights do not contain it; by default the value in the file or in
                `original_config`, else Stable Diffusion's 0.18215, or 1 with a codebook; a guess is logged as a
                warning.
            sample_size: for the config, in pixels; by default likewise, else the size that the whole model generates,
                or 256, on which all released autoencoders were trained.
            original_config: the YAML file that was released with the autoencoder, or with a whole model.
            ema: take the averaged weights (``model_ema.``), where the file of an autoencoder has both.
            allow_pickle: read a ``.ckpt`` too, by ``torch.load(weights_only=True)``, which executes no code.
            hub: ``revision``, ``token``, ``cache_dir``, ``local_files_only``, ``force_download``; and ``torch_dtype``,
                the older name of ``dtype``.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is damaged, holds something else or lacks weights, or is for another class, which is named.
            TypeError: an unknown argument.
            OSError: the hub cannot be asked.
        """
        from latentdiff.interchange.single_file import Checkpoint, read_autoencoder

        dtype = read_dtype(hub.pop("torch_dtype", None) or dtype)
        file = find_checkpoint(cls, source, allow_pickle, hub)
        unused: dict[str, Any] = {"scaling_factor": scaling_factor, "sample_size": sample_size}
        packed = packed_network(cls, file, dtype, unused | {"original_config": original_config, "ema": ema or None})
        if packed is not None:
            own: Self = packed
            return own
        weights = Checkpoint(file, allow_pickle)
        if ema:
            weights.use_averages("autoencoder")
        model: Self = read_autoencoder(
            weights, {cls.__name__: cls}, dtype, scaling_factor, sample_size, original_config
        )
        return model

    def save_single_file(self, file: str | Path, dtype: torch.dtype | None = None, overwrite: bool = False) -> None:
        """Write the weights into one safetensors file with their original names, as autoencoders are shared.

        The file's header holds the config, so that `from_single_file` restores the same autoencoder.

        Args:
            file: named ``.safetensors``; written whole or not at all.
            dtype: of the weights in the file, such as ``torch.float16``; by default unchanged.
            overwrite: replace an existing file.

        Raises:
            FileExistsError: the file exists.
            ValueError: another kind of file, or an autoencoder that the original code never had.
        """
        from latentdiff.interchange.single_file import (
            autoencoder_alone,
            header_of_parts,
            plain_config,
            write_checkpoint,
        )

        header = header_of_parts({"vae": plain_config(self)})
        write_checkpoint(autoencoder_alone(self), header, file, dtype, overwrite)


class ReleasedNetwork:
    """A network that can be read from files of the layout of DDPM, Improved DDPM and ADM, as OpenAI released theirs."""

    @classmethod
    def from_single_file(
        cls,
        source: str | Path,
        *,
        head_channels: int | None = None,
        heads: int = 1,
        heads_first: bool = True,
        sample_size: int | None = None,
        dtype: torch.dtype | None = torch.float32,
        allow_pickle: bool = False,
        **hub: Any,
    ) -> Self:
        """Load a network from a checkpoint; its shape is inferred from the weights.

        ::

            UNet2DModel.from_single_file("256x256_diffusion.pt", head_channels=64, allow_pickle=True)
            NoisyClassifier.from_single_file("256x256_classifier.pt", head_channels=64, allow_pickle=True)

        Args:
            source: a ``.safetensors`` file, or ``owner/name/file.safetensors`` on the hub, or its address there.
            head_channels: the width of an attention's head, ``--num_head_channels`` in the original; ADM's models have
                64. Without it `heads` counts, ``--num_heads``; Improved DDPM's models have 4.
            heads_first: False for a model trained with ``--use_new_attention_order True``; none was released.
            sample_size: for the config, in pixels.
            dtype: of the weights; None leaves the file's.
            allow_pickle: read a ``.pt`` too, by ``torch.load(weights_only=True)``, which executes no code.
            hub: ``revision``, ``token``, ``cache_dir``, ``local_files_only``, ``force_download``.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is damaged, holds something else or lacks weights, or heads do not fit.
            TypeError: an unknown argument.
            OSError: the hub cannot be asked.
        """
        from latentdiff.interchange.single_file import AdmCheckpoint, read_adm

        file = find_checkpoint(cls, source, allow_pickle, hub)
        packed = packed_network(cls, file, dtype, {"head_channels": head_channels, "sample_size": sample_size})
        if packed is not None:
            own: Self = packed
            return own
        weights = AdmCheckpoint(file, allow_pickle, head_channels, heads, heads_first)
        network: Self = read_adm(weights, cls, dtype, {} if sample_size is None else {"sample_size": sample_size})
        return network
