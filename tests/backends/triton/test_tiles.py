"""Tiles: the table, a file that replaces some rows, the tuner that writes it, and the devices."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton

from carve_kernels.backends import triton as triton_backend
from carve_kernels.backends.triton import device, tiles, tune
from carve_kernels.backends.triton.tiles import TileConfig, Tiles
from tests.backends.triton.limits import SHARED_BYTES

ROOT = Path(__file__).resolve().parents[3]
KEY = "sm_90/2/16/128"
ROW = {"scores": [32, 4, 2], "reread": [16, 8, 1]}


@pytest.mark.parametrize("architecture", tiles.STAGES)
def test_tiles_in_flight_fit_into_shared_memory(architecture: str) -> None:
    for element_size in tiles.ELEMENT_SIZES:
        for lanes in tiles.LANES:
            for size in tiles.SIZES:
                row = tiles.row_of(architecture, element_size, lanes, size)
                held = max(tile.block * tile.stages * size * element_size for tile in row)
                assert held <= SHARED_BYTES[architecture.removeprefix("sm_")]
                assert all(tile.block % 16 == 0 and 128 % tile.block == 0 for tile in row)


def test_lanes_between_two_rows_take_the_larger() -> None:
    assert tiles.row_of("sm_90", 2, 32, 128) == tiles.row_of("sm_90", 2, 64, 128) != tiles.row_of("sm_90", 2, 16, 128)


def test_a_file_replaces_its_rows_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "tiles.json"
    path.write_text(json.dumps({KEY: ROW}))
    found = tiles.row_of("sm_90", 2, 16, 128, str(path))
    assert found == Tiles(TileConfig(32, 4, 2), TileConfig(16, 8, 1)) != tiles.row_of("sm_90", 2, 16, 128)
    assert tiles.row_of("sm_90", 2, 16, 64, str(path)) == tiles.row_of("sm_90", 2, 16, 64)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no json", "expected a JSON file of tiles"),
        ("[1]", "expected an object of rows"),
        (json.dumps({"sm_90": ROW}), "expected keys such as 'sm_80/2/16/16'.*got 'sm_90'"),
        (json.dumps({KEY: {"scores": [32, 4, 2]}}), "expected 'scores' and 'reread' in 'sm_90/2/16/128'"),
        (json.dumps({KEY: {**ROW, "reread": [48, 4, 2]}}), "powers of two"),
        (json.dumps({KEY: {**ROW, "reread": [32, 3, 2]}}), "powers of two"),
        (json.dumps({KEY: {**ROW, "reread": [32, 16, 2]}}), "at most 8 warps"),
        (json.dumps({KEY: {**ROW, "reread": [32, 4, 0]}}), "1 to 8 stages"),
        (json.dumps({KEY: {**ROW, "reread": [32, 4, True]}}), "1 to 8 stages"),
        (json.dumps({KEY: {**ROW, "reread": [32, 4]}}), r"got \[32, 4\]"),
    ],
)
def test_another_file_is_an_error(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "tiles.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"CARVE_KERNELS_TILES: .*{message}"):
        tiles.replacements(str(path))
    with pytest.raises(ValueError, match="CARVE_KERNELS_TILES: expected a JSON file of tiles"):
        tiles.replacements(str(tmp_path / "missing.json"))


class Driver:
    """The part of a driver that chooses a row."""

    def __init__(self, backend: str, arch: Any) -> None:
        self.target = triton.backends.compiler.GPUTarget(backend, arch, 32)

    def get_current_target(self) -> Any:
        return self.target


@pytest.mark.parametrize(
    ("backend", "arch", "row"),
    [
        ("cuda", 75, "sm_80"),
        ("cuda", 80, "sm_80"),
        ("cuda", 89, "sm_86"),
        ("cuda", 90, "sm_90"),
        ("cuda", 103, "sm_100"),
        ("cuda", 121, "sm_120"),
        ("hip", "gfx1100", "gfx942"),
    ],
)
def test_a_device_takes_the_nearest_row_below(
    backend: str, arch: Any, row: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "interpreted", lambda: False)
    monkeypatch.setattr(device.triton.runtime.driver, "_active", Driver(backend, arch))
    assert device.architecture_of(torch.device("cpu")) == row


@pytest.mark.parametrize(("capability", "served"), [((7, 5), False), ((8, 0), True), ((12, 0), True)])
def test_an_old_gpu_has_a_reason(capability: tuple[int, int], served: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    triton_backend.too_old.cache_clear()
    try:
        for reason in (triton_backend.too_old(0), triton_backend._no_gpu()):
            assert (
                reason is None if served else "compute capability 7.5, this backend needs 8.0; use backend=" in reason
            )
    finally:
        triton_backend.too_old.cache_clear()


def test_without_a_gpu_the_backend_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "sees no GPU; install its driver" in triton_backend._no_gpu()


@pytest.mark.parametrize(
    ("version", "interpreted", "compiler", "reason"),
    [
        ("3.9.0", True, None, None),
        ("3.10.1", False, "/usr/bin/gcc", None),
        ("3.6.0+git", False, "/usr/bin/gcc", None),
        ("3.5.1", False, "/usr/bin/gcc", "triton 3.5.1 is older than 3.6; pip install 'triton>=3.6'"),
        ("2.14", True, None, "triton 2.14 is older"),
        ("3.9.0", False, None, "finds none; install gcc, or name a compiler in CC"),
    ],
)
def test_why_the_backend_is_unavailable(
    version: str, interpreted: bool, compiler: str | None, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
    monkeypatch.setattr(shutil, "which", lambda _: compiler)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", str(int(interpreted)))
    monkeypatch.setattr(triton_backend, "_no_gpu", lambda: None)
    found = triton_backend.unavailable.__wrapped__()
    assert found is None if reason is None else reason in found
    assert triton_backend.devices() == (("cuda", "xpu", "cpu") if interpreted else ("cuda", "xpu"))


def test_a_missing_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    # A module that is None in sys.modules cannot be imported.
    monkeypatch.setitem(sys.modules, "triton", None)
    found = triton_backend.unavailable.__wrapped__()
    assert "the package triton is missing; pip install 'triton>=3.6'" in found


def test_the_tuner_takes_the_fastest_tiles_that_run() -> None:
    start = tiles.row_of("sm_90", 2, 16, 128)
    tried = []

    def measure(call: Any) -> float:
        row = call()
        tried.append(row)
        if row.reread.block == 128:
            raise RuntimeError("out of resource: shared memory")
        return abs(row.reread.block - 32) + row.reread.warps + row.scores.stages

    def call() -> Tiles:
        return tiles.replacements(tune.os.environ[tiles.ENVIRONMENT])[KEY]

    found = tune.best(KEY, start, dict.fromkeys(Tiles._fields, call), measure)
    # Of equal times, the first wins.
    assert found == Tiles(TileConfig(start.scores.block // 2, 4, 2), TileConfig(32, 4, 2))
    assert tried[0] == start and len(tried) > 30
    assert tiles.ENVIRONMENT not in tune.os.environ


def test_the_problem_of_the_tuner_runs_and_its_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kernel in Tiles._fields:
        assert tune.problem(torch.device("cpu"), 16, 32, kernel, keys=20, tokens=4)()
    path = tmp_path / "tiles.json"
    monkeypatch.setattr(tune, "problem", lambda *_: lambda: None)
    monkeypatch.setattr(tune, "on_gpu", lambda _: 1.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(device, "architecture_of", lambda _: "sm_90")
    assert tune.main(["--output", str(path)]) == 0
    rows = tiles.replacements(str(path))
    assert len(rows) == 8 and rows[KEY] == tiles.row_of("sm_90", 2, 16, 128)


def test_the_tuner_without_a_gpu_exits_with_a_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert tune.main(["--output", str(tmp_path / "tiles.json")]) == 2
    assert "nothing to tune: torch finds no CUDA device here" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tune.main(["--output", str(tmp_path / "missing" / "tiles.json")])
    assert "expected a file in a directory that exists" in capsys.readouterr().err


def test_the_work_is_counted_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from carve_kernels.selfcheck.triton_work import capture_work\n"
        "print(capture_work(layers=1, batch=1, query_heads=4, key_heads=2, rows=1, keys=100, size=64, tokens=9,\n"
        "                   element_bytes=2).launches)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "2", result.stderr
