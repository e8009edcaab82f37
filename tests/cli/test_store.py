"""The folder of batch: a record always has the images of its own answer, even after a run was killed."""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from carve_kernels import AttentionMaps
from carve_kernels.cli import output
from carve_kernels.cli.ours import png_info
from carve_kernels.cli.report import FILES, RECORD, write_record
from carve_kernels.cli.store import Store
from carve_kernels.maps import encode


def write(store: Store, answer: str, files: Sequence[str]) -> None:
    def fill(folder: Path) -> None:
        for name in files:
            save(folder / name, answer)

    store.write("1", files, fill)


def save(path: Path, answer: str) -> None:
    """A file as `run` writes it, of this answer."""
    if path.suffix == ".png":
        digest = hashlib.sha256(answer.encode()).hexdigest()
        Image.new("1", (1, 1)).save(path, pnginfo=png_info(answer=answer, **{"saliency.npy": digest}))
    elif path.suffix == ".safetensors":
        *maps, tokens = (torch.zeros(1) for _ in range(5))
        path.write_bytes(encode(AttentionMaps(*maps, (0,), (0,), tokens, dtype=answer)))
    elif path.name == RECORD:
        write_record(path.parent, {"error": None, "fingerprint": answer})
    else:
        path.write_text(answer)


def answer_of(path: Path) -> str:
    if path.suffix == ".png":
        return Image.open(path).info["answer"]
    return AttentionMaps.load(path).dtype if path.suffix == ".safetensors" else path.read_text()


def killed(store: Store, answer: str, files: Sequence[str], steps: int) -> bool:
    """Write in a process that is killed after so many removals and moves of files; False if it ended before."""
    if process := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9
    done = itertools.count(1)

    def limited(step: Callable[..., None]) -> Callable[..., None]:
        def run(*args: Any, **options: Any) -> None:
            if next(done) > steps:
                os._exit(9)
            step(*args, **options)

        return run

    try:
        os.replace, os.unlink = limited(os.replace), limited(os.unlink)
        write(store, answer, files)
    finally:
        os._exit(0)


@pytest.mark.parametrize("first", [FILES, (RECORD,)])
@pytest.mark.parametrize("second", [FILES, (RECORD,)])
def test_a_kill_never_mixes_two_answers(tmp_path: Path, first: Sequence[str], second: Sequence[str]) -> None:
    for steps in range(40):
        folder = tmp_path / str(steps)
        with Store(folder).opened() as store:
            write(store, "old", first)
            died = killed(store, "new", second, steps)
        with Store(folder).opened() as store:
            there = folder / "results/1"
            for answer, files in (("old", first), ("new", second)):
                if store.has("1", {"fingerprint": answer}, images=False):
                    assert {path.name for path in there.iterdir()} == set(files)
                    assert all(answer_of(there / name) == answer for name in files if name != RECORD)
                    assert answer == "new" or steps == 0
            # The next run writes what is missing, and leaves nothing else.
            write(store, "new", second)
            assert store.has("1", {"fingerprint": "new"}, images=second is FILES)
        assert {path.name for path in folder.iterdir()} == {"results"}
        if not died:
            break
    assert steps >= len(second) and not died


def test_an_error_in_the_middle_leaves_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    move = os.replace
    for moves in range(len(FILES)):
        with Store(tmp_path / str(moves)).opened() as store:
            write(store, "old", FILES)
            done = itertools.count()

            def fail(source: Any, target: Any, done: Any = done, moves: int = moves) -> None:
                if next(done) == moves:
                    raise OSError(errno.EIO, "Input/output error")
                move(source, target)

            with monkeypatch.context() as patched, pytest.raises(OSError, match="Input/output"):
                patched.setattr(os, "replace", fail)
                write(store, "new", FILES)
            assert store.read("1") is None
            write(store, "new", FILES)
            assert store.has("1", {"fingerprint": "new"}, images=True)


def test_unfinished_files_of_another_command_stay(tmp_path: Path) -> None:
    with output.replace_files(tmp_path, ["carve.json"], lambda path: False) as beside:
        with Store(tmp_path).opened() as store:
            write(store, "old", FILES)
        (beside / "carve.json").write_text("{}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["carve.json", "results"]


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with Store(tmp_path).opened() as store:
        write(store, "old", FILES)
        assert store.has("1", {"fingerprint": "old"}, images=True)
