"""The icon sets and the emoji names, from npm: pinned versions, each checked against its SHA-256."""

import hashlib
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
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


ICON_SETS = (
    Package(
        "@iconify-json/noto",
        "1.2.9",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        "Apache-2.0",
        "noto",
    ),
    Package(
        "@iconify-json/noto-v1",
        "1.2.5",
        "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
        "Apache-2.0",
        "noto",
    ),
    Package(
        "@iconify-json/fluent-emoji",
        "1.2.7",
        "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b",
        "MIT",
        "glossy",
    ),
    Package(
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        "MIT",
        "flat",
    ),
    Package(
        "@iconify-json/twemoji",
        "1.2.5",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
        "CC-BY-4.0",
        "flat",
    ),
    Package(
        "@iconify-json/fxemoji",
        "1.2.2",
        "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef",
        "Apache-2.0",
        "flat",
    ),
    Package(
        "@iconify-json/emojione",
        "1.2.3",
        "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
        "CC-BY-4.0",
        "flat",
    ),
    Package(
        "@iconify-json/fluent-emoji-high-contrast",
        "1.2.6",
        "0b92d48c90d2200bd499e3cdd09a127ca6a8c8ddefd34c35eb5a1e4994012ae0",
        "MIT",
        "outline",
    ),
    Package(
        "@iconify-json/streamline-emojis",
        "1.2.4",
        "5dac87c876b322500989828c5823143e0100d78881627a2e4081a4b897cbfdbc",
        "CC-BY-4.0",
        "cartoon",
        by_unicode=False,
    ),
    Package(
        "@iconify-json/streamline-ultimate-color",
        "1.2.2",
        "46133a11f3734bcef29066391d7edc141ed1d8056242ddfa1b5d36ce286420b6",
        "CC-BY-4.0",
        "cartoon",
        by_unicode=False,
    ),
    Package(
        "@iconify-json/streamline-kameleon-color",
        "1.2.2",
        "5f972d986afb340d8a45d7a16e767f99f91fdd94db53e46a78c79847212aed7b",
        "CC-BY-4.0",
        "flat",
        by_unicode=False,
        on_disc=True,
    ),
    Package(
        "@iconify-json/fluent-color",
        "1.2.21",
        "fa2ddaaac7a2a7b902659cea1b5b8c03017ce2ae56295138876b86a36177dfbe",
        "MIT",
        "glossy",
        by_unicode=False,
    ),
    Package(
        "@iconify-json/ph",
        "1.2.2",
        "e3a582a047d9829fc7e8842c660d8065e598d1b68bb58cb68e75a1f1e5a614cc",
        "MIT",
        "outline",
        by_unicode=False,
    ),
)
NAMES = Package("emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a", "MIT")


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
