"""Files that are there whole or not at all, whatever stops the writing, and that replace nobody else's."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file that other processes see as it was, or whole; after a return it survives a loss of power.

    Raises OSError, and leaves what was there, if the data cannot be written.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(target.parent)


def refuse_foreign(name: str, path: Path, is_ours: Callable[[Path], bool]) -> None:
    """Raise ValueError if anything but a file of ours stands at a path; `is_ours` looks at what is in a file."""
    # What a link leads to would stay, but the link would go.
    if os.path.lexists(path) and (path.is_symlink() or not path.is_file() or not is_ours(path)):
        raise ValueError(
            f"{name}: {path} is there and was not written by this version of carve_kernels, or was changed since, so "
            f"it is not replaced; choose another {name}, or move it away"
        )


def sync(path: Path) -> None:
    """Put a file, or the names in a folder, on the disk: a file may be whole there while its new name is not."""
    # Windows puts nothing on the disk that was opened for reading, and keeps names by itself.
    if os.name != "posix":
        return
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:
        # A folder that may be written to need not be one that may be read.
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
