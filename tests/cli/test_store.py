"""The folder of batch: whatever kills a run, a record that stands there has the pictures of its own answer."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
from collections.abc import Sequence
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


def killed(store: Store, answer: str, files: Sequence[str], moves: int) -> bool:
    """Write in a process that is gone behind so many moves of files; whether it was."""
    if process := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9
    done = itertools.count(1)
    move = os.replace

    def stop(source: Any, target: Any) -> None:
        if next(done) > moves:
            os._exit(9)
        move(source, target)

    try:
        output.os.replace = stop  # type: ignore[attr-defined]
        write(store, answer, files)
    finally:
        os._exit(0)


@pytest.mark.parametrize("first", [FILES, (RECORD,)])
@pytest.mark.parametrize("second", [FILES, (RECORD,)])
def test_a_kill_mixes_no_two_answers(tmp_path: Path, first: Sequence[str], second: Sequence[str]) -> None:
    for moves in range(40):
        folder = tmp_path / str(moves)
        with Store(folder).opened() as store:
            write(store, "old", first)
            died = killed(store, "new", second, moves)
        with Store(folder).opened() as store:
            there = folder / "results/1"
            for answer, files in (("old", first), ("new", second)):
                if store.has("1", {"fingerprint": answer}, pictures=False):
                    assert {path.name for path in there.iterdir()} == set(files)
                    assert all(answer_of(there / name) == answer for name in files if name != RECORD)
                    assert answer == "new" or moves == 0
            # The next run does what is missing, and leaves nothing beside it.
            write(store, "new", second)
            assert store.has("1", {"fingerprint": "new"}, pictures=second is FILES)
        assert {path.name for path in folder.iterdir()} == {"results"}
        if not died:
            break
    assert moves >= len(second) and not died


def test_an_error_in_the_middle_brings_back_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    move = os.replace
    for moves in range(2 * len(FILES)):
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
        there = tmp_path / str(moves) / "results/1"
        assert json.loads((there / RECORD).read_text())["fingerprint"] == "old"
        assert all(answer_of(there / name) == "old" for name in FILES if name != RECORD)


def test_what_another_command_is_writing_stays(tmp_path: Path) -> None:
    with output.results(tmp_path, ["carve.json"], lambda path: False) as beside:
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
        assert store.has("1", {"fingerprint": "old"}, pictures=True)
