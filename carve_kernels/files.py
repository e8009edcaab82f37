"""Files that are there whole or not at all, whatever stops the writing."""

from __future__ import annotations

import os
import uuid
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
