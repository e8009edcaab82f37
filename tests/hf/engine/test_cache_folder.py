"""Memory in a folder: it serves other processes and survives damage, full disks and killed writers."""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from carve_kernels.hf.engine.cache import Memory
from tests.support.saved_maps import KEY, maps, same


def test_a_folder_serves_other_processes_and_other_days(tmp_path: Path) -> None:
    Memory(tmp_path / "deep" / "folder").keep_maps(KEY, maps())
    again = Memory(tmp_path / "deep" / "folder")
    assert same(again.maps(KEY), maps())
    assert again.held().maps == 1
    (file,) = (tmp_path / "deep" / "folder").iterdir()
    file.unlink()
    assert same(again.maps(KEY), maps()), "held in memory as well"


def flip(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def without_dimensions(data: bytes) -> bytes:
    """A file of ours by its header, with one number in each tensor."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    tensors = {name: torch.tensor(1.0) for name in header if name != "__metadata__"}
    return save(tensors, header["__metadata__"])


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: int.from_bytes(data[:8], "little") + 8],
        lambda data: data[:-1],
        lambda data: flip(data, len(data) - 20),
        lambda data: data.replace(b'\\"steps\\": [0, 1, 2]', b'\\"steps\\": [0, 1, 3]'),
        without_dimensions,
    ],
)
def test_a_damaged_file_is_skipped_and_written_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Any
) -> None:
    Memory(tmp_path).keep_maps(KEY, maps())
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert file.read_bytes() != whole
    memory = Memory(tmp_path)
    with caplog.at_level(logging.WARNING, "carve_kernels"):
        assert memory.maps(KEY) is None
    assert [record.message.count("\n") for record in caplog.records] == [0]
    assert str(file) in caplog.text
    memory.keep_maps(KEY, maps())
    assert file.stat().st_size == len(whole) and same(Memory(tmp_path).maps(KEY), maps())


@pytest.mark.parametrize(
    "theirs",
    [b"", b"something else altogether", save({"values": torch.ones(2)}), "folder", "link"],
    ids=["empty", "text", "safetensors", "folder", "link"],
)
def test_a_users_file_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture, theirs: bytes | str) -> None:
    folder = tmp_path / "maps"
    Memory(folder).keep_maps(KEY, maps())
    (file,) = folder.iterdir()
    if isinstance(theirs, bytes):
        file.write_bytes(theirs)
    elif theirs == "folder":
        file.unlink()
        file.mkdir()
    else:
        file.unlink()
        (tmp_path / "elsewhere").write_bytes(b"theirs")
        file.symlink_to(tmp_path / "elsewhere")
    memory = Memory(folder)
    for _ in range(3):
        memory.keep_maps(KEY, maps())
    assert [record.message.startswith(f"memory: {file} exists") for record in caplog.records] == [True]
    assert same(memory.maps(KEY), maps()) and Memory(folder).maps(KEY) is None
    if isinstance(theirs, bytes):
        assert file.read_bytes() == theirs
    assert file.is_dir() == (theirs == "folder") and file.is_symlink() == (theirs == "link")
    assert list(folder.iterdir()) == [file]


def test_a_renamed_file_is_foreign(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    memory = Memory(tmp_path)
    memory.keep_maps("one", maps(1))
    memory.keep_maps("two", maps(2))
    one, two = sorted(tmp_path.iterdir())
    os.replace(one, two)
    fresh = Memory(tmp_path)
    assert fresh.maps("one") is None and fresh.maps("two") is None
    assert "has maps of a different key than its name" in caplog.text


def test_a_folder_that_fills_up_costs_a_line_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    memory = Memory(tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    memory.keep_maps(KEY, maps())
    assert "cannot store maps" in caplog.text and "No space left" in caplog.text
    assert list(tmp_path.iterdir()) == [] and same(memory.maps(KEY), maps())


def test_the_folder_is_bounded_and_the_lately_used_stays(tmp_path: Path) -> None:
    memory = Memory(tmp_path, maps_bytes=0)
    memory.keep_maps(0, maps())
    size = next(tmp_path.iterdir()).stat().st_size
    bounded = Memory(tmp_path, maps_bytes=0, folder_bytes=3 * size + size // 2)
    for key in (1, 2):
        bounded.keep_maps(key, maps(key))
    for age, path in enumerate(sorted(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime_ns)):
        os.utime(path, (1000 + age, 1000 + age))
    assert bounded.maps(0) is not None
    bounded.keep_maps(3, maps(3))
    assert [bounded.maps(key) is not None for key in range(4)] == [True, False, True, True]
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 3.5 * size


def test_a_full_folder_keeps_a_users_file(tmp_path: Path) -> None:
    Memory(tmp_path).keep_maps("one", maps())
    size = next(tmp_path.iterdir()).stat().st_size
    theirs = tmp_path / f"{'f' * 64}.safetensors"
    theirs.write_bytes(b"a user's file")
    os.utime(theirs, (1, 1))
    memory = Memory(tmp_path, maps_bytes=0, folder_bytes=size + 20)
    for key in ("two", "three"):
        memory.keep_maps(key, maps())
    assert theirs.read_bytes() == b"a user's file" and len(list(tmp_path.iterdir())) == 2


def test_what_a_killed_process_left_goes_and_other_files_stay(tmp_path: Path) -> None:
    memory = Memory(tmp_path)
    memory.keep_maps(0, maps())
    name = next(tmp_path.iterdir()).name
    old, young, foreign = (tmp_path / part for part in (f".{name}.{'0' * 32}", f".{name}.{'1' * 32}", "notes.txt"))
    for path in (old, young, foreign):
        path.write_text("half")
    for path in (old, foreign):
        os.utime(path, (1000, 1000))
    memory.keep_maps(1, maps(1))
    assert not old.exists() and young.exists() and foreign.exists()


def test_processes_that_write_and_evict_at_once_read_whole_maps(tmp_path: Path) -> None:
    program = """
import logging, random, sys, tests.support.tiny_models
from tests.support.saved_maps import maps, same
from carve_kernels.hf.engine.cache import Memory
logging.basicConfig(level=logging.WARNING)
memory, draw = Memory(sys.argv[1], maps_bytes=0, folder_bytes=30_000), random.Random(sys.argv[2])
found = 0
for _ in range(150):
    key = draw.randrange(12)
    got = memory.maps(key)
    assert got is None or same(got, maps(key))
    found += got is not None
    memory.keep_maps(key, maps(key))
print(found)
"""
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path), str(seed)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for seed in range(2)
    ]  # fmt: skip
    for run in runs:
        found, complaints = run.communicate(timeout=300)
        assert run.returncode == 0, complaints
        assert int(found) > 20 and complaints == ""
    assert all(path.suffix == ".safetensors" for path in tmp_path.iterdir())


def test_a_folder_that_may_only_be_read_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Memory(tmp_path).keep_maps(KEY, maps())

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "utime", refuse)
    assert same(Memory(tmp_path).maps(KEY), maps())
