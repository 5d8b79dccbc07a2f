"""WebDataset shards behind an address: ``https://``, ``s3://``, ``hf://`` and whatever else fsspec reads.

A shard is copied while its pictures are listed and examined. As many copies are kept as there is room for; a picture of
any other shard is read on its own, as a range of bytes. So each is read as fast the first time as the last, however the
pictures are mixed: a copy of what is used last would hardly ever be of use again.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from latentdiff.extras import how_to_install
from latentdiff.interchange.atomic import atomic_file
from latentdiff.interchange.cache_folder import gigabytes, shared_folder
from latentdiff.training.data.captioned_picture import MOST_BYTES, PartReader
from latentdiff.training.data.shards import expand, of_split, read_shard, what_else
from latentdiff.training.data.source import Source, Wanted

logger = logging.getLogger(__name__)

ROOM_VARIABLE, ROOM = "LATENTDIFF_SHARDS_GB", 20.0
TRIES, PAUSE = 4, 1.0  # of one question; seconds before the second, then twice as long each time
MORE_TRIES = 8  # of a picture or shard: some two minutes, in which a server may have started anew
LEFT = 3600.0  # seconds after which a copy that nobody goes on writing was left by a process that was killed
AT_ONCE = 16  # shards that are asked for their size
PAGES = {
    "text/html": "a web page",
    **dict.fromkeys(("text/xml", "application/xml"), "XML"),
    "application/json": "JSON",
    "text/plain": "text",
}
"""What servers call answers that are no shard."""
VERSION = (
    "ETag",
    "etag",
    "LastModified",
    "Last-Modified",
    "last_modified",
    "mtime",
    "created",
    "updated",
    "generation",
)
"""What file systems say that changes with a file."""


@dataclass(frozen=True, slots=True)
class RemoteReader:
    """One picture in a shard behind an address, from the copy of the shard if there is one.

    Args:
        version: of the shard.
        copy: where the copy is, or was.
    """

    url: str
    version: str
    copy: str
    start: int
    length: int

    def __call__(self) -> bytes:
        with suppress(OSError):
            return PartReader(self.copy, self.start, self.length)()
        if self.length > MOST_BYTES:
            raise ValueError(f"{self.length:,} bytes are more than a picture has")
        with reaching(self.url) as (files, path):
            end = self.start + self.length
            content = bytes(tried(files.cat_file, path, tries=MORE_TRIES, start=self.start, end=end))
        if len(content) != self.length:
            raise ValueError(
                f"{self.url} gave {len(content):,} bytes where {self.length:,} were asked for; if it gives whole files "
                f"only, allow copies of all with {ROOM_VARIABLE}=GIGABYTES and another --output"
            )
        return content

    def stamp(self) -> str:
        """Changes when the shard does."""
        return f"{self.version} {self.start} {self.length}"


@dataclass(frozen=True)
class RemoteShard:
    """A shard behind an address, as it is now. size: in bytes."""

    url: str
    version: str
    size: int

    def copy_in(self, folder: Path) -> Path:
        name = sha256(f"{self.url}\0{self.version}\0{self.size}".encode("utf-8", "surrogateescape")).hexdigest()[:40]
        return folder / f"{name}.tar"


@contextmanager
def reaching(url: str) -> Iterator[tuple[Any, str]]:
    """The file system behind an address and the path there.

    Raises:
        ValueError: a package is missing.
        FileNotFoundError, OSError: it is not there, or cannot be reached.
    """
    import fsspec

    try:
        yield fsspec.core.url_to_fs(url)
    except ImportError as error:
        kind = url.partition(":")[0]
        how = how_to_install("http") if kind in ("http", "https") else " ".join(str(error).split())
        raise ValueError(f"{url}: addresses of {kind}:// need a further package ({how})") from error
    except FileNotFoundError as error:
        if _is_failure(error):
            raise OSError(f"{url}: cannot be reached ({' '.join(str(error.__cause__).split())[:300]})") from error
        raise FileNotFoundError(f"{url}: no such shard") from error
    except ValueError as error:
        raise ValueError(f"{url}: {error}") from error
    except Exception as error:  # each file system has its own
        raise OSError(
            f"{url}: cannot be read ({' '.join(str(error).split())[:300] or type(error).__name__})"
        ) from error


def _is_failure(error: Exception) -> bool:
    """Whether "not found" is what a file system makes of any failure."""
    return error.__cause__ is not None and getattr(error.__cause__, "status", None) not in (404, 410)


def tried(read: Any, path: str, *args: Any, tries: int = TRIES, **options: Any) -> Any:
    """What `read` gives of a path, tried again where the network fails."""
    for number in range(tries):
        try:
            return read(path, *args, **options)
        except Exception as error:
            lasting = (FileNotFoundError, PermissionError, ValueError, TypeError)
            if number == tries - 1 or (isinstance(error, lasting) and not _is_failure(error)):
                raise
            if number == TRIES - 1:
                left = PAUSE * (2 ** (tries - 1) - 2**number)
                logger.warning("%s cannot be reached (%s); trying for %.0f s more", path, error or type(error), left)
            time.sleep(PAUSE * 2**number)
    return None


def is_remote(source: str) -> bool:
    """Whether it is the address of shards, or a pattern of such."""
    return "://" in source and source.endswith(".tar")


def find_remote(source: str) -> list[RemoteShard]:
    """The shards that an address means, with ``{000..099}``, ``{a,b}`` and, where the files can be listed, ``*``.

    Raises:
        FileNotFoundError, OSError, ValueError: see `reaching`.
    """
    urls: list[str] = []
    for url in expand(source):
        if "*" not in url:
            urls.append(url)
            continue
        with reaching(url) as (files, path):
            found = [str(files.unstrip_protocol(name)) for name in sorted(tried(files.glob, path))]
        if not found:
            raise FileNotFoundError(f"{url}: no such shard")
        urls += found
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(_look_at, dict.fromkeys(urls)))


def _look_at(url: str) -> RemoteShard:
    with reaching(url) as (files, path):
        found = tried(files.info, path)
    if found.get("size") is None:
        kind = str(found.get("mimetype") or "").partition(";")[0].strip()
        if kind in PAGES:
            raise OSError(
                f"{url}: the server answers with {PAGES[kind]} ({kind}), not with a tar file; look at it there"
            )
        raise OSError(f"{url}: its size is not said; download it first")
    version = " ".join(f"{name}={found[name]}" for name in VERSION if found.get(name) is not None)
    return RemoteShard(url, version, int(found["size"]))


def read_remote(source: str, wanted: Wanted, shards: Sequence[RemoteShard] | None = None) -> Source:
    """The pictures in shards behind an address. Each shard is read once, as a whole.

    Args:
        shards: what `find_remote` has found.

    Raises:
        NoPicturesError: they are of other splits than the one that is wanted.
        FileNotFoundError, OSError, ValueError: see `reaching`.
    """
    found = find_remote(source) if shards is None else shards
    parent = source.rpartition("/")[0]
    chosen = of_split({shard: shard.url.rpartition("/")[2] for shard in found}, {}, wanted, parent)
    folder = (wanted.cache_dir or shared_folder()) / "shards"
    room = Room(folder, {shard.copy_in(folder) for shard in chosen})
    result = Source(f"{parent}/")
    for shard in chosen:
        with room.copy_of(shard) as copy:
            part = Source("", drained=result.count)
            read_shard(copy, replace(wanted, drain=None), part)
            _take(part, shard, copy, result)
            if wanted.drain is not None:  # while the copy is there
                wanted.drain(result)
        if result.is_full(wanted):
            break
    return result


def _take(part: Source, shard: RemoteShard, copy: Path, result: Source) -> None:
    """Add what is in the copy of a shard to the source, under the shard's address."""

    def named(name: str) -> str:
        return f"{shard.url}{name.removeprefix(str(copy))}"

    def reader(read: Any) -> Any:
        return read and RemoteReader(shard.url, shard.version, str(copy), read.start, read.length)

    for picture in part.pictures:
        mask = reader(picture.mask)
        result.pictures.append(replace(picture, name=named(picture.name), read=reader(picture.read), mask=mask))
    for finding in part.refused:
        result.refuse(named(finding.name), finding.reason)
    for finding in part.warnings:
        result.warn(named(finding.name), finding.reason)


class Room:
    """The folder of copies, and how much of it may be filled.

    Args:
        wanted: copies that may stay; others go when there is no room.

    Raises:
        ValueError: ``LATENTDIFF_SHARDS_GB`` is no number.
    """

    def __init__(self, folder: Path, wanted: set[Path]) -> None:
        self.folder, self.wanted, self.most = folder, wanted, gigabytes(ROOM_VARIABLE, ROOM)

    @contextmanager
    def copy_of(self, shard: RemoteShard) -> Iterator[Path]:
        """The copy of a shard, which afterwards stays if there is room."""
        copy = shard.copy_in(self.folder)
        if not (copy.is_file() and copy.stat().st_size == shard.size):
            with reaching(shard.url) as (files, path), atomic_file(copy) as partial:
                tried(files.get_file, path, str(partial), tries=MORE_TRIES)
                if partial.stat().st_size != shard.size:
                    what = f"; what came {said}" if (said := what_else(partial)) else ""
                    raise OSError(f"{shard.url}: {partial.stat().st_size:,} bytes came of {shard.size:,}{what}")
        try:
            yield copy
        finally:
            self._make_room(copy)

    def _make_room(self, newest: Path) -> None:
        sizes, times = dict[Path, int](), dict[Path, float]()
        for path in self.folder.glob("*.tar"):
            with suppress(OSError):  # another process may have taken it away
                sizes[path], times[path] = path.stat().st_size, path.stat().st_mtime
        filled, recent = sum(sizes.values()), time.time() - LEFT
        written = {path for path in sizes if path.name.startswith(".partial-") and times[path] > recent}
        for path in sorted(set(sizes) - self.wanted - written - {newest}, key=times.__getitem__):
            if filled > self.most:
                filled -= sizes[path]
                path.unlink(missing_ok=True)
        if filled > self.most:
            newest.unlink(missing_ok=True)
