"""A tiny random checkpoint on disk, a picture, and the command line in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from carve_kernels.cli import app
from tests.hf import tiny

QUESTION = "what digit is red"
QUICK = ("--max-new-tokens", 2, "--layers", "1-2")

Invoke = Callable[..., Result]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(*tiny.tiny_llava(), tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="session")
def picture_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "wide.png"
    tiny.picture(160, 96).save(path)
    return path


@pytest.fixture
def carve() -> Invoke:
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def run(carve: Invoke, checkpoint: Path, picture_file: Path, tmp_path: Path) -> Invoke:
    """`run` with good arguments and tmp_path/out; what a test gives comes after them and wins."""
    words = ("run", "-m", checkpoint, "-i", picture_file, "-q", QUESTION, "-o", tmp_path / "out", *QUICK)
    return lambda *more: carve(*words, *more)


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
