"""Finding a checkpoint file, locally or on the hub."""

import re
from pathlib import Path
from typing import Any

ON_THE_HUB = re.compile(
    r"(?:https?://(?:www\.)?(?:huggingface\.co|hf\.co)/)?([\w.-]+/[\w.-]+)/(?:(?:blob|resolve)/([^/]+)/)?([^?#]+\.\w+)"
    r"(?:\?download=true)?"
)
HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")
"""The arguments of ``hf_hub_download`` that are accepted."""


def find_file(source: str | Path, allow_pickle: bool = False, **hub: Any) -> Path:
    """A local file, or one on the hub (downloaded, or from the local cache).

    Args:
        hub: of ``huggingface_hub.hf_hub_download``: ``revision``, ``token``, ``cache_dir``, ``local_files_only``.

    Raises:
        FileNotFoundError: it is neither.
        ValueError: it is on the hub, pickled, and `allow_pickle` is False.
        OSError: the hub cannot be reached.
    """
    file = Path(source).expanduser()
    if file.exists() or not isinstance(source, str):
        return file
    address = ON_THE_HUB.fullmatch(source)
    is_url = source.startswith(("https://", "http://"))
    if address is None or (not is_url and Path(source.split("/")[0]).exists()):
        raise FileNotFoundError(
            f"{source}: no such file; give a .safetensors file, or owner/name/file.safetensors on the Hugging Face hub"
        )
    repository, revision, name = address.groups()
    if not name.endswith(".safetensors") and not allow_pickle:
        raise ValueError(f"{source} is a pickle, which is only read if asked for: allow_pickle=True (--ckpt)")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repository, name, **{"revision": revision, **hub}))
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(f"{source} is not in the local cache, and the hub cannot be asked") from error
