"""The cache between questions: general maps, in memory and in a folder, and the prefix caches of images."""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from carve_kernels import checks, deprecation
from carve_kernels.atomic_write import refuse_foreign, write_whole
from carve_kernels.hf.engine.fingerprint import key_of
from carve_kernels.maps import AttentionMaps, decode, encode, is_saved

MEBIBYTE = 2**20

_LOG = logging.getLogger("carve_kernels")
_ENTRY = re.compile(r"[0-9a-f]{64}\.safetensors")
_TEMPORARY = re.compile(r"\.[0-9a-f]{64}\.safetensors\.[0-9a-f]{32}")
# A temporary file this old belongs to a killed process.
_ABANDONED = 3600.0


class Held(NamedTuple):
    """How much is cached in this process: general maps and prefix caches, counts and bytes."""

    maps: int
    maps_bytes: int
    prefixes: int
    prefix_bytes: int


class Memory:
    """Caches general maps and prefix caches, so that a second question about an image costs only its own tokens.

    ============  ==========================================================================================
    argument      meaning
    ============  ==========================================================================================
    folder        where general maps are stored as well, for later processes; None stores none
    maps_bytes    the largest size of general maps in memory
    prefix_bytes  the largest size of prefix caches, on any device
    images        the largest number of prefix caches
    folder_bytes  the largest size of the folder's files
    ============  ==========================================================================================

    A bound of 0 turns that part off. The least recently used entry is evicted first; an entry that is larger than its
    bound is not cached. Maps are copied in and out, so cached ones cannot change. A prefix cache has one user at a
    time: `prefix` takes it out, and `keep_prefix` puts it back.

    Files are written atomically, so several processes may share a folder. A damaged file is skipped with a log line and
    written again. Files that this package did not write are left alone and logged. A folder that cannot be written is
    logged and otherwise ignored. Thread-safe.

    Raises TypeError or ValueError for bounds that are not integers from 0 on and for a folder that is not a path or is
    empty, OSError if the folder cannot be created.
    """

    @deprecation.renamed(pictures="images")
    def __init__(
        self,
        folder: str | os.PathLike[str] | None = None,
        *,
        maps_bytes: int = 256 * MEBIBYTE,
        prefix_bytes: int = 512 * MEBIBYTE,
        images: int = 8,
        folder_bytes: int = 4096 * MEBIBYTE,
    ) -> None:
        self._lock = threading.Lock()
        self._maps = _LruCache(checks.integer("maps_bytes", maps_bytes, low=0))
        self._prefixes = _LruCache(
            checks.integer("prefix_bytes", prefix_bytes, low=0), checks.integer("images", images, low=0)
        )
        checks.integer("folder_bytes", folder_bytes, low=0)
        self._folder = None if folder is None else _Folder(_create_folder("folder", folder), folder_bytes)

    def maps(self, key: Hashable) -> AttentionMaps | None:
        """A copy, on the CPU, of the maps that are cached under this key, or None."""
        name = key_of(key=key)
        with self._lock:
            data = self._maps.get(name)
        if data is not None:
            return decode(data, name)[0]
        stored = None if self._folder is None else self._folder.read(name)
        if stored is None:
            return None
        maps, data = stored
        self._put(name, data)
        return maps

    def keep_maps(self, key: Hashable, maps: AttentionMaps) -> None:
        """Cache a copy of these maps under a key that JSON can hold."""
        name = key_of(key=key)
        data = encode(maps, key=name)
        self._put(name, data)
        if self._folder is not None:
            self._folder.write(name, data)

    def prefix(self, key: Hashable) -> Any | None:
        """Take out the prefix cache under this key, or None."""
        with self._lock:
            return self._prefixes.take(key)

    def keep_prefix(self, key: Hashable, prefix: Any, nbytes: int) -> None:
        """Cache a prefix cache of so many bytes; the caller does not use it any more."""
        with self._lock:
            self._prefixes.put(key, prefix, nbytes)

    def held(self) -> Held:
        """How much is cached in this process."""
        with self._lock:
            return Held(len(self._maps), self._maps.nbytes, len(self._prefixes), self._prefixes.nbytes)

    def clear(self) -> None:
        """Drop everything that is cached in this process; the folder stays."""
        with self._lock:
            self._maps.clear()
            self._prefixes.clear()

    def _put(self, name: str, data: bytes) -> None:
        # As the bytes of a file: immutable, and of known size.
        with self._lock:
            self._maps.put(name, data, len(data))


def memory_of(memory: Memory | str | os.PathLike[str] | bool | None) -> Memory | None:
    """The memory for an argument: a bounded one for None, none for False, one with a folder for a path, or itself."""
    if memory is None:
        return Memory()
    if memory is False:
        return None
    if isinstance(memory, Memory):
        return memory
    if isinstance(memory, (str, os.PathLike)):
        return Memory(_create_folder("memory", memory))
    raise TypeError(f"memory: expected None, False, a folder or a Memory, got {checks.describe(memory)}")


def _create_folder(name: str, folder: Any) -> Path:
    """Check the path of a folder, and create the folder if there is none."""
    path = checks.path(name, folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise type(error)(f"{name}: cannot make the folder {path} ({error.strerror})") from error
    return path


class _LruCache:
    """A least-recently-used cache, bounded in bytes and in number."""

    def __init__(self, bound: int, count: int | None = None) -> None:
        self.nbytes = 0
        self._bound, self._count = bound, count
        self._entries: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Hashable) -> Any | None:
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key][0]

    def take(self, key: Hashable) -> Any | None:
        value, nbytes = self._entries.pop(key, (None, 0))
        self.nbytes -= nbytes
        return value

    def put(self, key: Hashable, value: Any, nbytes: int) -> None:
        self.take(key)
        if nbytes > self._bound or self._count == 0:
            return
        self._entries[key] = (value, nbytes)
        self.nbytes += nbytes
        while self.nbytes > self._bound or (self._count is not None and len(self._entries) > self._count):
            _, (_, freed) = self._entries.popitem(last=False)
            self.nbytes -= freed

    def clear(self) -> None:
        self._entries.clear()
        self.nbytes = 0


class _Folder:
    """General maps as files, bounded in bytes; the least recently used one is removed first."""

    def __init__(self, path: Path, bound: int) -> None:
        self._path, self._bound = path, bound
        self._warned: set[Path] = set()

    def read(self, name: str) -> tuple[AttentionMaps, bytes] | None:
        path = self._file(name)
        try:
            data = path.read_bytes()
            maps, facts = decode(data, os.fspath(path))
            # A renamed file must not give one image the maps of another.
            if facts.get("key") != name:
                raise ValueError(f"path: {os.fspath(path)!r} has maps of a different key than its name")
            # The access time of a file in a read-only folder cannot be updated.
            with suppress(OSError):
                os.utime(path)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            _LOG.warning("memory: skipping %s (%s)", path, error)
            return None
        return maps, data

    def write(self, name: str, data: bytes) -> None:
        if len(data) > self._bound:
            return
        path = self._file(name)
        try:
            refuse_foreign("memory", path, is_saved)
            write_whole(path, data)
            self._shrink()
        except ValueError as error:
            # Another process may have removed a file of ours meanwhile.
            if os.path.lexists(path) and path not in self._warned:
                self._warned.add(path)
                _LOG.warning("%s", error)
        except OSError as error:
            _LOG.warning("memory: cannot store maps in %s (%s)", self._path, error)

    def _file(self, name: str) -> Path:
        return self._path / f"{name}.safetensors"

    def _shrink(self) -> None:
        """Remove the oldest files until the rest fits; another process may do the same."""
        files = sorted(self._entries())
        total = sum(size for _, size, _ in files)
        for _, size, path in files:
            if total <= self._bound:
                return
            # Never delete a user's file that happens to match our names.
            if is_saved(path):
                path.unlink(missing_ok=True)
            total -= size

    def _entries(self) -> Iterator[tuple[int, int, Path]]:
        """Time of last use, size and path of each file of ours; half-written files of killed processes are removed."""
        now = time.time()
        for entry in os.scandir(self._path):
            with suppress(FileNotFoundError):
                facts = entry.stat()
                if _ENTRY.fullmatch(entry.name):
                    yield facts.st_mtime_ns, facts.st_size, Path(entry.path)
                elif _TEMPORARY.fullmatch(entry.name) and now - facts.st_mtime > _ABANDONED:
                    Path(entry.path).unlink(missing_ok=True)
