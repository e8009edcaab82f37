"""carve-kernels batch: how it stops, before and during its work."""

from __future__ import annotations

import fcntl
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from carve_kernels.cli.report import FILES
from tests.cli.conftest import LINES, Ask, content, records, table, written
from tests.support import tiny_models


@pytest.mark.parametrize(
    ("lines", "more", "message"),
    [
        ([LINES[0], "{", "{}"], (), "line 2: not JSON (Expecting"),
        ([LINES[1], LINES[1]], (), "line 2: id: 'second' is also the id of line 1"),
        ([], (), "has no questions"),
        (LINES, ("--layers", "two"), "layers: expected 20-25"),
        (LINES, ("--tokens", "0"), "tokens: expected an integer of at least 1"),
        (LINES, ("--max-image-pixels", "0"), "--max-image-pixels: expected an integer of at least 1"),
        (LINES, ("--dtype", "float8"), "dtype: expected one of"),
        (LINES, ("--backend", "nope"), "backend: expected one of 'auto', 'reference'"),
        (LINES, ("--memory", ""), "memory: expected a string with at least one visible character"),
        (LINES, ("-i", "missing.jsonl"), "missing.jsonl cannot be read"),
        (LINES, ("-m", "missing"), "--model: 'missing' is not a directory"),
        (LINES, ("-o", "out/deep", "-m", "missing"), "--model: 'missing' is not a directory"),
        (LINES, ("--device", "nowhere"), "device: 'nowhere' cannot be used here"),
    ],
)
def test_bad_input_is_one_line_before_any_work(
    ask: Ask,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    lines: list[Any],
    more: tuple[Any, ...],
    message: str,
) -> None:
    monkeypatch.chdir(folder)
    done = ask(lines, *more)
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith("error: ") and message in done.stderr and done.stderr.count("\n") == 1
    assert not (folder / "out").exists()
    assert sorted(path.name for path in folder.iterdir()) == ["1.png", "2.png", "questions.jsonl"]


def test_an_output_that_cannot_be_written(ask: Ask, folder: Path) -> None:
    (folder / "file").write_text("")
    for place in ("file", "file/deep"):
        done = ask(LINES, "-o", folder / place)
        assert done.exit_code == 2 and "file is not a folder; choose another --output" in done.stderr
    done = ask(LINES, "--memory", folder / "file")
    assert done.exit_code == 2 and done.stderr.startswith("error: --memory: ") and done.stderr.count("\n") == 1
    assert not (folder / "out").exists()


def test_two_runs_do_not_share_a_folder(ask: Ask, folder: Path) -> None:
    (folder / "out").mkdir()
    held = os.open(folder / "out", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    done = ask(LINES)
    assert done.exit_code == 1 and "is in use by another run" in done.stderr
    assert records(folder) == {}
    os.close(held)
    assert ask(LINES).exit_code == 0


@pytest.mark.parametrize("place", ["cli.store.Store.write", "hf.engine.CarveEngine.answer", "cli.report.write_record"])
def test_ctrl_c_keeps_finished_results_and_leaves_no_unfinished_ones(
    ask: Ask, folder: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    import carve_kernels.cli.report
    import carve_kernels.cli.store
    import carve_kernels.hf.engine.engine

    owner: Any = carve_kernels
    *way, name = place.split(".")
    for part in way:
        owner = getattr(owner, part)
    work, calls = getattr(owner, name), []

    def interrupt(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return work(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, interrupt)
        done = ask(LINES, "--tokens", 1)
    assert done.exit_code == 130, done.output
    assert done.stderr.startswith("error: interrupted; 1 of 3 questions are done, in ")
    assert list(content(folder / "out")) == ["results/1/result.json"]
    before = written(folder)
    assert ask(LINES).exit_code == 0
    assert written(folder)["1"] == before["1"] and len(table(folder)) == 3


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """No file of this process may become larger, as on a disk that fills up."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_disk_that_fills_up(ask: Ask, folder: Path) -> None:
    """The second answer, about a larger image, cannot be written."""
    tiny_models.make_image(400, 300, 2).save(folder / "2.png")
    with files_of_at_most(400_000):
        done = ask(LINES, "--images", "--tokens", 1)
    assert done.exit_code == 1, done.output
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "File too large" in line and "1 of 3 questions are done, in" in line and "run the command again" in line
    assert sorted(content(folder / "out")) == sorted(f"results/1/{name}" for name in FILES)
    before = written(folder)
    assert ask(LINES, "--images").exit_code == 0
    assert written(folder)["1"] == before["1"] and len(table(folder)) == 3
