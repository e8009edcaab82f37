"""A local hub cache as `hf download` fills it: blobs by content, a snapshot of links to them, a ref."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def put(checkpoint: Path, cache: Path, repo: str) -> Path:
    """Put a checkpoint into the cache under an id; its snapshot."""
    storage = cache / f"models--{repo.replace('/', '--')}"
    snapshot = storage / "snapshots" / COMMIT
    for folder in (storage / "blobs", storage / "refs", snapshot):
        folder.mkdir(parents=True)
    (storage / "refs/main").write_text(COMMIT)
    for file in checkpoint.iterdir():
        blob = storage / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copyfile(file, blob)
        (snapshot / file.name).symlink_to(Path("../../blobs", blob.name))
    return snapshot
