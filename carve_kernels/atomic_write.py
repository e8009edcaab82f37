"""Files that are written completely or not at all, and that do not replace the files of other programs."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """Replace a file in one step: other processes see the old or the new one. It survives a loss of power.

    Raises OSError, and keeps the old file, if the data cannot be written.
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
    """Raise ValueError if a path exists and is not a file of ours; `is_ours` looks at the content of a file."""
    # The target of a link would stay, but the link would be lost.
    if os.path.lexists(path) and (path.is_symlink() or not path.is_file() or not is_ours(path)):
        raise ValueError(
            f"{name}: {path} exists and was not written by this version of carve_kernels, or was changed since, so it "
            f"is not replaced; choose another {name}, or move it away"
        )


def sync(path: Path) -> None:
    """Write a file, or the names in a folder, to the disk: a file may reach it before its new name does."""
    # Windows cannot sync what was opened for reading, and writes names by itself.
    if os.name != "posix":
        return
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:
        # A folder may be writable but not readable.
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
