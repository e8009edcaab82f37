"""What is worth keeping between two questions: general maps, here and in a folder, and prefix caches of pictures."""

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

from carve_kernels import checks
from carve_kernels.atomic_write import refuse_foreign, write_whole
from carve_kernels.hf.engine.fingerprint import key_of
from carve_kernels.maps import AttentionMaps, decode, encode, is_saved

MEBIBYTE = 2**20

_LOG = logging.getLogger("carve_kernels")
_ENTRY = re.compile(r"[0-9a-f]{64}\.safetensors")
_TEMPORARY = re.compile(r"\.[0-9a-f]{64}\.safetensors\.[0-9a-f]{32}")
# A temporary file this old belongs to a process that was killed.
_ABANDONED = 3600.0


class Held(NamedTuple):
    """How much a memory holds in this process: general maps and prefix caches, counts and bytes."""

    maps: int
    maps_bytes: int
    prefixes: int
    prefix_bytes: int


class Memory:
    """Keeps general maps and prefix caches, so that a second question on a picture pays only for itself.

    ============  ==========================================================================================
    argument      meaning
    ============  ==========================================================================================
    folder        where general maps are kept as well, for other processes and other days; None keeps none
    maps_bytes    the most bytes of general maps in memory
    prefix_bytes  the most bytes of prefix caches, on whichever device they are
    pictures      the most prefix caches
    folder_bytes  the most bytes of the folder's files
    ============  ==========================================================================================

    A bound of 0 turns that part off. Whatever was used longest ago goes first; what is larger than its whole bound is
    not kept. Maps are copied on the way in and on the way out, so that nobody can change what is kept. A prefix cache
    is lent: `prefix` takes it out, for one user at a time, and `keep_prefix` puts it back.

    Files are written whole or not at all, so that several processes may share a folder. A damaged file is passed over
    with a line in the log and written anew. A file that does not begin as one of ours is somebody else's: it stays, and
    a line in the log says so. A folder that cannot be written to costs a line in the log and nothing else. Safe with
    threads.

    Raises TypeError or ValueError for bounds that are no whole numbers from 0 on and for a folder that is no path or
    an empty one, OSError if the folder cannot be made.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None = None,
        *,
        maps_bytes: int = 256 * MEBIBYTE,
        prefix_bytes: int = 512 * MEBIBYTE,
        pictures: int = 8,
        folder_bytes: int = 4096 * MEBIBYTE,
    ) -> None:
        self._lock = threading.Lock()
        self._maps = _Shelf(checks.integer("maps_bytes", maps_bytes, low=0))
        self._prefixes = _Shelf(
            checks.integer("prefix_bytes", prefix_bytes, low=0), checks.integer("pictures", pictures, low=0)
        )
        checks.integer("folder_bytes", folder_bytes, low=0)
        self._folder = None if folder is None else _Folder(_made("folder", folder), folder_bytes)

    def maps(self, key: Hashable) -> AttentionMaps | None:
        """A copy, on the CPU, of the maps that were kept under this key, or None."""
        name = key_of(key=key)
        with self._lock:
            data = self._maps.get(name)
        if data is not None:
            return decode(data, name)[0]
        found = None if self._folder is None else self._folder.read(name)
        if found is None:
            return None
        maps, data = found
        self._put(name, data)
        return maps

    def keep_maps(self, key: Hashable, maps: AttentionMaps) -> None:
        """Keep a copy of these maps under a key that JSON can hold."""
        name = key_of(key=key)
        data = encode(maps, key=name)
        self._put(name, data)
        if self._folder is not None:
            self._folder.write(name, data)

    def prefix(self, key: Hashable) -> Any | None:
        """Take out the prefix cache that was kept under this key, or None."""
        with self._lock:
            return self._prefixes.take(key)

    def keep_prefix(self, key: Hashable, prefix: Any, nbytes: int) -> None:
        """Keep a prefix cache of so many bytes; whoever calls does not use it any more."""
        with self._lock:
            self._prefixes.put(key, prefix, nbytes)

    def held(self) -> Held:
        """How much is held in this process."""
        with self._lock:
            return Held(len(self._maps), self._maps.nbytes, len(self._prefixes), self._prefixes.nbytes)

    def clear(self) -> None:
        """Let go of everything that is held in this process; the folder stays."""
        with self._lock:
            self._maps.clear()
            self._prefixes.clear()

    def _put(self, name: str, data: bytes) -> None:
        # As the bytes of a file: nobody can change them, and they take what they count.
        with self._lock:
            self._maps.put(name, data, len(data))


def memory_of(memory: Memory | str | os.PathLike[str] | bool | None) -> Memory | None:
    """The memory that an argument means: None a bounded one, False none, a path one with that folder, or itself."""
    if memory is None:
        return Memory()
    if memory is False:
        return None
    if isinstance(memory, Memory):
        return memory
    if isinstance(memory, (str, os.PathLike)):
        return Memory(_made("memory", memory))
    raise TypeError(f"memory: expected None, False, a folder or a Memory, got {checks.describe(memory)}")


def _made(name: str, folder: Any) -> Path:
    """Check the path of a folder, and make the folder where there is none."""
    path = checks.path(name, folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise type(error)(f"{name}: cannot make the folder {path} ({error.strerror})") from error
    return path


class _Shelf:
    """Entries in the order of their last use, bounded in bytes and in number."""

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
    """General maps as files, bounded in bytes; the one used longest ago goes first."""

    def __init__(self, path: Path, bound: int) -> None:
        self._path, self._bound = path, bound
        self._told: set[Path] = set()

    def read(self, name: str) -> tuple[AttentionMaps, bytes] | None:
        path = self._file(name)
        try:
            data = path.read_bytes()
            maps, facts = decode(data, os.fspath(path))
            # Whoever renames a file must not give one picture the maps of another.
            if facts.get("key") != name:
                raise ValueError(f"path: {os.fspath(path)!r} holds other maps than its name says")
            # In a folder that may only be read, nobody keeps an order.
            with suppress(OSError):
                os.utime(path)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            _LOG.warning("memory: passing over %s (%s)", path, error)
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
            # Another process may have taken a file of ours away meanwhile.
            if os.path.lexists(path) and path not in self._told:
                self._told.add(path)
                _LOG.warning("%s", error)
        except OSError as error:
            _LOG.warning("memory: cannot keep maps in %s (%s)", self._path, error)

    def _file(self, name: str) -> Path:
        return self._path / f"{name}.safetensors"

    def _shrink(self) -> None:
        """Take away the oldest files until the rest fits; another process may take them away at the same time."""
        files = sorted(self._entries())
        total = sum(size for _, size, _ in files)
        for _, size, path in files:
            if total <= self._bound:
                return
            # Whoever keeps a file of theirs here, under a name as ours are, keeps it.
            if is_saved(path):
                path.unlink(missing_ok=True)
            total -= size

    def _entries(self) -> Iterator[tuple[int, int, Path]]:
        """Time of last use, size and path of each file of ours; what a killed process left half written goes."""
        now = time.time()
        for entry in os.scandir(self._path):
            with suppress(FileNotFoundError):
                facts = entry.stat()
                if _ENTRY.fullmatch(entry.name):
                    yield facts.st_mtime_ns, facts.st_size, Path(entry.path)
                elif _TEMPORARY.fullmatch(entry.name) and now - facts.st_mtime > _ABANDONED:
                    Path(entry.path).unlink(missing_ok=True)
