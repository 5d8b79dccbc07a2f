"""The icon sets and the emoji names, from npm: pinned versions, each checked against its SHA-256."""

import hashlib
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Package:
    """One npm package. `style` is what captions call its drawing style; empty for packages without drawings.

    Icons of a set that is not `by_unicode` are found by `icon_names.txt`. With `on_disc` every drawing of the set
    stands on a coloured disc, which is left out.
    """

    name: str
    version: str
    sha256: str
    licence: str
    style: str = ""
    by_unicode: bool = True
    on_disc: bool = False

    @property
    def short_name(self) -> str:
        return self.name.rsplit("/", 1)[-1]

    @property
    def file_name(self) -> str:
        """The name `npm pack` gives the archive."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


def read_packages() -> Iterator[Package]:
    """The packages of `icon_sets.txt`."""
    text = Path(__file__).with_name("icon_sets.txt").read_text(encoding="utf-8")
    words = [word for line in text.splitlines() if not line.startswith("# ") for word in line.split()]
    for name, version, licence, style, found_by, sha256 in zip(*[iter(words)] * 6, strict=True):
        yield Package(name, version, sha256, licence, style.strip("-"), found_by == "unicode", found_by == "discs")


*_SETS, NAMES = read_packages()
ICON_SETS = tuple(_SETS)


def fetch(package: Package, cache: Path) -> Path:
    """The package's archive in `cache`, packed by npm if it is not there yet.

    Raises `RuntimeError` when npm is missing or fails, or the archive is not the one this recipe was written for.
    """
    archive = cache / package.file_name
    if not archive.exists():
        cache.mkdir(parents=True, exist_ok=True)
        _npm_pack(package, archive)
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != package.sha256:
        raise RuntimeError(f"{archive} has SHA-256 {found}, expected {package.sha256}: delete it and fetch again")
    return archive


def _npm_pack(package: Package, archive: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise RuntimeError(f"npm is needed to fetch {package.name}; install it or put {package.file_name} in the cache")
    with tempfile.TemporaryDirectory(dir=archive.parent) as folder:
        command = [npm, "pack", f"{package.name}@{package.version}", "--silent"]
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        packed = Path(folder) / package.file_name
        if result.returncode != 0 or not packed.exists():
            raise RuntimeError(f"npm could not pack {package.name}@{package.version}: {result.stderr.strip()[-500:]}")
        os.replace(packed, archive)


def read_json(archive: Path, member: str) -> Any:
    """The JSON file `member` (a path inside the package) of an npm archive."""
    with tarfile.open(archive) as tar:
        try:
            file = tar.extractfile(f"package/{member}")
        except KeyError:
            file = None
        if file is None:
            raise RuntimeError(f"{archive.name} holds no {member}")
        return json.load(file)
