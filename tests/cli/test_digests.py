"""What tells one checkpoint or image on disk from another."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from carve_kernels.cli.digests import checkpoint_digest, file_digest


def replace_weights(folder: Path) -> None:
    """By others of the same size."""
    path = folder / "model.safetensors"
    before = path.stat().st_mtime_ns
    path.write_bytes(path.read_bytes()[::-1])
    os.utime(path, ns=(before + 1, before + 1))


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "config.json").write_text((folder / "config.json").read_text() + " "),
        lambda folder: (folder / "tokenizer.json").unlink(),
        lambda folder: os.truncate(folder / "model.safetensors", 1000),
        lambda folder: (folder / "model.safetensors").rename(folder / "other.safetensors"),
        replace_weights,
    ],
)
def test_a_changed_checkpoint_is_another(checkpoint: Path, tmp_path: Path, change: Callable[[Path], object]) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint, folder)
    before = checkpoint_digest(folder)
    assert before == checkpoint_digest(checkpoint), "times are copied"
    (folder / "carve.json").write_text("{}")
    (folder / "README.md").write_text("text")
    (folder / "training.json").symlink_to(folder / "missing")
    assert checkpoint_digest(folder) == before
    change(folder)
    assert checkpoint_digest(folder) != before


def test_a_snapshot_of_links_is_its_files(checkpoint: Path, tmp_path: Path) -> None:
    for path in checkpoint.iterdir():
        (tmp_path / path.name).symlink_to(path)
    assert checkpoint_digest(tmp_path) == checkpoint_digest(checkpoint)


def test_a_file_is_read_in_blocks(tmp_path: Path) -> None:
    path = tmp_path / "large.tif"
    with path.open("wb") as file:
        file.truncate(2**28)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    first = file_digest(path)
    # KiB; the file has 262,144 of them.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000
    with path.open("r+b") as file:
        file.seek(2**28 - 1)
        file.write(b"1")
    assert first != file_digest(path) and first is not None
    assert file_digest(tmp_path) is None and file_digest(tmp_path / "missing") is None
