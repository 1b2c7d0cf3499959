"""Remote shards, staged whole to a folder of limited size on this node before they are read.

A copy is named by its sha256, so that data sets never mix. All processes of a node share the
folder: a lock per shard, which the system frees when its owner dies, lets one of them download
while the others wait. A lock of the folder guards the limit; a download reserves its space by the
size in its file's name.
"""

import errno
import fcntl
import hashlib
import os
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from cldf_dist.config import Data
from cldf_dist.system.files import DamagedShardError

ATTEMPTS = 4
FIRST_PAUSE_SECONDS = 0.5  # before the second attempt; doubled before each further one
SILENCE_SECONDS = 60.0  # an http connection without a byte for so long is broken
WAIT_SECONDS = 0.1  # between looks for room that other downloads hold
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

ManifestEntry = dict[str, Any]  # one entry of the manifest
T = TypeVar("T")


def read_remote(url: str) -> bytes:
    """The content of a small file.

    Raises FileNotFoundError where there is none, ConnectionError after retries.
    """
    return _persistently(url, lambda files, path: bytes(files.cat_file(path)))


@dataclass(frozen=True)
class ShardCache:
    """A folder of this node that holds at most `max_bytes` of copied shards."""

    folder: Path
    max_bytes: int

    @classmethod
    def of(cls, settings: Data) -> "ShardCache":
        """The cache by `data.shard_cache` and `data.shard_cache_gb`."""
        usual = Path(tempfile.gettempdir()) / f"cldf-shards-{os.getuid()}"
        folder = Path(settings.shard_cache).expanduser() if settings.shard_cache else usual
        return cls(folder.absolute(), int(settings.shard_cache_gb * 1e9))

    @classmethod
    def default(cls) -> "ShardCache":
        """The cache by the default settings."""
        return cls.of(Data())

    def check_size(self, shards: Sequence[ManifestEntry]) -> None:
        """Raise ValueError where the largest shard does not fit; warn where not all fit."""
        for shard in shards:
            self._check_fits(shard)
        total = sum(shard["size"] for shard in shards)
        if total > self.max_bytes:
            warnings.warn(
                f"data.shard_cache_gb={self.max_bytes / 1e9:g} is less than the {total / 1e9:.3g} "
                "GB of the shards: every node reads every shard in every epoch, so they will be "
                f"downloaded again and again; raise it if {self.folder} has the room",
                stacklevel=3,
            )

    def path(self, shard: ManifestEntry) -> Path:
        """The path of a shard's copy, whether or not it exists."""
        digest = str(shard["sha256"])
        if not re.fullmatch("[0-9a-f]{64}", digest):
            raise ValueError(f"{shard['name']}: its sha256 in the manifest is none: {digest!r}")
        return self.folder / f"{digest}.tar"

    def open(self, url: str, shard: ManifestEntry) -> int:
        """A descriptor of the copy of the shard at `url`; it stays readable when evicted.

        Raises DamagedShardError where the shard is missing or differs from the manifest, and
        ConnectionError where the server does not respond.
        """
        path = self.path(shard)
        descriptor = _open_whole(path, shard["size"])
        if descriptor is not None:
            return descriptor
        self._check_fits(shard)
        self._make_folder()
        with _locked(path.with_suffix(".lock")):
            descriptor = _open_whole(path, shard["size"])  # others may have fetched it meanwhile
            return self._fetch(url, shard, path) if descriptor is None else descriptor

    def _fetch(self, url: str, shard: ManifestEntry, path: Path) -> int:
        partial = path.with_suffix(f".{shard['size']}.partial")
        partial.unlink(missing_ok=True)
        self._reserve(partial, shard["size"])
        try:
            _download(url, partial, shard)
            descriptor = os.open(partial, os.O_RDONLY)  # nobody can evict it before it is open
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        return descriptor

    def _reserve(self, partial: Path, size: int) -> None:
        """Create `partial` once there is space for it: evict, or wait for other downloads."""
        while True:
            with _locked(self.folder / ".lock"):
                if self._evict_for(size):
                    partial.touch()
                    return
            time.sleep(WAIT_SECONDS)

    def _evict_for(self, size: int) -> bool:
        """Remove the least recently opened copies until `size` more bytes fit; False if never."""
        room = self.max_bytes - size - self._reserved()
        if room < 0:
            return False
        copies = sorted(_states(self.folder), key=lambda copy: copy[1].st_mtime_ns)
        used = sum(state.st_size for _, state in copies)
        for path, state in copies:
            if used <= room:
                break
            path.unlink(missing_ok=True)
            used -= state.st_size
        return True

    def _reserved(self) -> int:
        """Bytes reserved by running downloads; removes the files of killed ones."""
        total = 0
        for partial in self.folder.glob("*.partial"):
            name = re.fullmatch(r"([0-9a-f]{64})\.(\d+)\.partial", partial.name)
            if name is None:
                continue  # not ours
            digest, size = name.groups()
            with _locked(self.folder / f"{digest}.lock", wait=False) as is_stale:
                if is_stale:
                    partial.unlink(missing_ok=True)
                else:
                    total += int(size)
        return total

    def _check_fits(self, shard: ManifestEntry) -> None:
        if shard["size"] > self.max_bytes:
            raise ValueError(
                f"data.shard_cache_gb must hold at least one shard, got {self.max_bytes} bytes for "
                f"{shard['name']} of {shard['size']} bytes; raise it"
            )

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(self.folder, error) from error


@dataclass(frozen=True)
class RemoteShards:
    """Shards at a URL, read through a cache."""

    location: str
    cache: ShardCache

    def url(self, shard: ManifestEntry) -> str:
        """The URL of a shard."""
        return f"{self.location}/{shard['name']}"

    def open(self, shard: ManifestEntry) -> int:
        """A descriptor of the shard's copy; see `ShardCache.open`."""
        return self.cache.open(self.url(shard), shard)


def _download(url: str, target: Path, shard: ManifestEntry) -> None:
    remedy = "prepare the data again, or set data.on_damaged=skip"
    size = int(shard["size"])

    def copy(files: Any, path: str) -> None:
        files.get_file(path, str(target))
        found = target.stat().st_size
        if found != size:
            raise EOFError(f"{found} of {size} bytes")

    try:
        _persistently(url, copy)
    except FileNotFoundError:
        raise DamagedShardError(f"{url} is missing; {remedy}") from None
    except EOFError as error:
        raise DamagedShardError(f"{url} is truncated or changed: {error}; {remedy}") from None
    except OSError as error:
        if error.errno in NO_ROOM:
            raise _unwritable(target.parent, error) from error
        raise
    with target.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != shard["sha256"]:
        raise DamagedShardError(
            f"{url} is damaged, or was changed since: its sha256 is wrong; {remedy}"
        )


def _persistently(url: str, fetch: Callable[[Any, str], T]) -> T:
    """The result of `fetch` for the URL's file system and path, with retries.

    Raises the last error, or ConnectionError for the errors of a protocol.
    """
    files, path = _file_system(url)
    pause = FIRST_PAUSE_SECONDS
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return fetch(files, path)
        except (FileNotFoundError, PermissionError):
            raise
        except Exception as error:  # every protocol has its own kinds
            if getattr(error, "errno", None) in NO_ROOM:
                raise
            if attempt == ATTEMPTS:
                if isinstance(error, EOFError):
                    raise
                raise ConnectionError(
                    f"{url} cannot be read, tried {ATTEMPTS} times: {error or type(error).__name__}"
                    "; check the address, the network and the access rights"
                ) from error
        time.sleep(pause)
        pause *= 2
    raise AssertionError("unreachable")


def _file_system(url: str) -> tuple[Any, str]:
    options: dict[str, Any] = {}
    try:
        if url.startswith(("http://", "https://")):
            from aiohttp import ClientTimeout

            timeout = ClientTimeout(total=None, sock_connect=30, sock_read=SILENCE_SECONDS)
            options["client_kwargs"] = {"timeout": timeout}
        files, path = fsspec.core.url_to_fs(url, **options)
    except (ImportError, ValueError) as error:
        raise ValueError(f"data.shards: {url} cannot be opened here: {error}") from error
    return files, str(path)


def _open_whole(path: Path, size: int) -> int | None:
    """A descriptor of the file, marked as just used; None where it is missing or incomplete."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unwritable(path.parent, error) from error
    if os.fstat(descriptor).st_size == size:
        with suppress(PermissionError):  # of another user: it counts as older
            os.utime(path)
        return descriptor
    os.close(descriptor)
    path.unlink(missing_ok=True)  # nothing was synced before the power went
    return None


def _states(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for path in folder.glob("*.tar"):
        with suppress(FileNotFoundError):
            yield path, path.stat()


@contextmanager
def _locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock; with wait=False yields False where another process holds it."""
    try:
        file = path.open("ab")
    except OSError as error:
        raise _unwritable(path.parent, error) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            raise _unwritable(path.parent, error) from error
        yield True


def _unwritable(folder: Path, error: OSError) -> OSError:
    return OSError(
        f"data.shard_cache: cannot keep shards in {folder}: {error.strerror}; set it to a folder "
        "of this node with room and locks, or lower data.shard_cache_gb"
    )
