"""Tar files from what is to be in them."""

import io
import tarfile
from pathlib import Path
from typing import Any


def write(shard: Path, members: dict[str, bytes], **options: Any) -> None:
    with tarfile.open(shard, options.pop("mode", "w"), **options) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
