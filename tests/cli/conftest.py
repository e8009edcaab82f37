"""A tiny random checkpoint on disk, images, the command line in this process, and the files that `batch` writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from carve_kernels.cli import app
from tests.support import tiny_models

QUESTION = "what digit is red"
QUICK = ("--max-new-tokens", 2, "--layers", "1-2")

Invoke = Callable[..., Result]
Ask = Callable[..., Result]

LINES = [
    {"image": "1.png", "question": QUESTION, "answer": "seven"},
    {"image": "2.png", "question": "where is the square", "id": "second"},
    {"image": "1.png", "question": "what is the colour", "id": "a/b"},
]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save(*tiny_models.tiny_llava(), tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="session")
def image_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "wide.png"
    tiny_models.make_image(160, 96).save(path)
    return path


@pytest.fixture
def carve() -> Invoke:
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def run(carve: Invoke, checkpoint: Path, image_file: Path, tmp_path: Path) -> Invoke:
    """`run` with good arguments and tmp_path/out; arguments of a test come after them and win, images replace them."""
    words = ("run", "-m", checkpoint, "-q", QUESTION, "-o", tmp_path / "out", *QUICK)
    return lambda *more: carve(*words, *(() if {"-i", "--image"} & set(more) else ("-i", image_file)), *more)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images, 1.png and 2.png."""
    for seed, size in ((1, (160, 96)), (2, (96, 120))):
        tiny_models.make_image(*size, seed).save(tmp_path / f"{seed}.png")
    return tmp_path


@pytest.fixture
def ask(carve: Invoke, checkpoint: Path, folder: Path) -> Ask:
    """`batch` over these lines into `out`; arguments of a test come after good ones and win."""

    def run(lines: list[Any], *more: object) -> Result:
        path = folder / "questions.jsonl"
        path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
        return carve("batch", "-m", checkpoint, "-i", path, "-o", folder / "out", *QUICK, *more)

    return run


def content(folder: Path) -> dict[str, bytes]:
    """Every file in a folder and below, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def records(folder: Path) -> dict[str, Any]:
    paths = (folder / "out/results").glob("*/result.json")
    return {path.parent.name: json.loads(path.read_text()) for path in paths}


def written(folder: Path) -> dict[str, tuple[int, int]]:
    """The inodes of the records and the times when they were written."""
    facts = {path.parent.name: path.stat() for path in (folder / "out/results").glob("*/result.json")}
    return {name: (each.st_ino, each.st_mtime_ns) for name, each in facts.items()}


def table(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out/results.jsonl").read_text().splitlines()]
