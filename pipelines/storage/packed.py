"""Pipelines of every kind from and to single files of our own layout, `latentdiff.interchange.packed`."""

import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch

from latentdiff.dtypes import read_dtype
from latentdiff.interchange.atomic import failures_named
from latentdiff.interchange.packed import pack, packed_content, unpacked
from latentdiff.interchange.single_file import HUB_OPTIONS, check_target, find_file
from latentdiff.pipelines.registry import kind_of_family
from latentdiff.pipelines.storage.loading import stored_dtypes

logger = logging.getLogger(__name__)


class PackedPipeline:
    """``from_single_file`` and ``save_single_file`` of a pipeline that Stable Diffusion's files cannot hold."""

    @classmethod
    def from_single_file(cls, source: str | Path, *, dtype: torch.dtype | None = torch.float32, **others: Any) -> Self:
        """Load a pipeline from a file that ``save_single_file`` wrote.

        Args:
            source: a ``.safetensors`` file, or ``owner/name/file.safetensors`` on the hub, or its address there.
            dtype: of the weights; None leaves the file's.
            others: components instead of the file's; and for the hub ``revision``, ``token``, ``cache_dir``,
                ``local_files_only``, ``force_download``.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is damaged, holds something else, or is of another kind of pipeline.
            TypeError: an unknown argument.
            OSError: the hub cannot be asked.
        """
        dtype = read_dtype(others.pop("torch_dtype", None) or dtype)
        file = find_file(source, **{name: others.pop(name) for name in HUB_OPTIONS if name in others})
        if packed_content(file) is None:
            raise ValueError(
                f"{file} does not hold a {cls.__name__}: save_single_file and 'latentdiff convert' write files that do"
            )
        return cls.from_packed(file, dtype, others)

    @classmethod
    def from_packed(cls, file: Path, dtype: torch.dtype | None, given: Mapping[str, Any]) -> Self:
        """From a file of the package's own layout, which lies in a temporary folder meanwhile.

        Args:
            given: components instead of the file's.
        """
        with unpacked(file) as folder:
            dtypes = dtype or {**stored_dtypes(folder, None), "default": torch.float32}
            pipeline: Any = cls.from_pretrained(folder, dtype=dtypes, **given)  # type: ignore[attr-defined]
        pipeline.register_to_config(_name_or_path=str(file))
        loaded: Self = pipeline
        return loaded

    def save_single_file(self, file: str | Path, dtype: torch.dtype | None = None, overwrite: bool = False) -> None:
        """Write everything that ``save_pretrained`` writes into one safetensors file, which only this package reads.

        Args:
            file: named ``.safetensors``; written whole or not at all.
            dtype: of the weights in it, such as ``torch.float16``; by default as they are.
            overwrite: replace a file that is there.

        Raises:
            FileExistsError: the file is there.
            ValueError: another kind of file, or there are LoRAs in a network.
        """
        file = Path(file).expanduser()
        check_target(file, overwrite)
        file.parent.mkdir(parents=True, exist_ok=True)
        with failures_named(file), tempfile.TemporaryDirectory(dir=file.parent, prefix=".saving-") as temporary:
            folder = Path(temporary) / "model"
            self.save_pretrained(folder, max_shard_size="1000TB")  # type: ignore[attr-defined]
            pack(folder, file, dtype)
        logger.warning(
            "%s is in latentdiff's own layout, which other programs do not read: Stable Diffusion's cannot hold this "
            "model. The folder that save_pretrained writes is read by diffusers",
            file,
        )


def class_for(asked: Any, file: Path, sdxl: bool) -> Any:
    """`asked`, or the class that does the same for the family of models that a file is of.

    sdxl: whether the file is of Stable Diffusion XL.

    Raises:
        ValueError: the file is of another family than the class is for.
    """
    if sdxl == bool(getattr(asked, "for_sdxl", False)):
        return asked
    kind = kind_of_family(asked.__name__, "StableDiffusionXLPipeline" if sdxl else "StableDiffusionPipeline")
    own = None if kind is None else kind.load()
    if own is None or not issubclass(own, asked):
        which, use = ("is" if sdxl else "is not"), "" if kind is None else f"; load it with {kind.name}"
        raise ValueError(f"{file} {which} of Stable Diffusion XL, so a {asked.__name__} cannot draw with it{use}")
    return own
