"""What files contain, as 64 hexadecimal digits: images, arrays, checkpoints."""

from __future__ import annotations

import hashlib
from pathlib import Path

_BLOCK = 2**20
_TEXTS = (".json", ".jinja", ".txt", ".model")
_WEIGHTS = (".safetensors", ".bin")


def file_digest(path: Path) -> str | None:
    """The content of a file, read in blocks; None where it cannot be read."""
    digest = hashlib.sha256()
    try:
        # A device or a pipe has no end.
        if not path.is_file():
            return None
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    except OSError:
        return None
    return digest.hexdigest()


def checkpoint_digest(folder: Path) -> str:
    """The text files of a checkpoint by content, its weights by name, size and time of change.

    Weights are not read, which would take longer than a short run. A copy with new times counts as another checkpoint;
    weights that are replaced by others of the same size and time are not noticed. The carve.json is left out, since a
    caller may use another profile.
    """
    digest = hashlib.sha256()
    # A snapshot in the hub cache is made of links, some of which may be broken.
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        if path.suffix in _WEIGHTS:
            facts = path.stat()
            digest.update(f"{path.name} {facts.st_size} {facts.st_mtime_ns}\n".encode())
        elif path.suffix in _TEXTS and path.name != "carve.json":
            digest.update(f"{path.name} {file_digest(path)}\n".encode())
    return digest.hexdigest()
