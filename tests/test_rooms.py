"""How a room is chosen, and what is said when it cannot serve."""

from __future__ import annotations

import logging
import re

import pytest
import torch

from carve_kernels import checks, extension
from carve_kernels.backends import ROOMS, STAGES, SUPPORT, cpu, explain, resolve

CPU = torch.device("cpu")
MAPS = (torch.ones(1, 1, 4), torch.ones(1, 1, 4), (2, 2), (2, 2))


def needs_extension() -> None:
    if reason := cpu.unavailable():
        pytest.skip(reason)


def test_the_table_has_every_stage_and_room() -> None:
    assert tuple(SUPPORT) == STAGES
    assert all(tuple(rooms) == ROOMS for rooms in SUPPORT.values())
    assert all(SUPPORT[stage]["reference"] is None for stage in STAGES)


@pytest.mark.parametrize("backend", ["CPU", "c++", "torch", "", None, 1])
def test_an_unknown_backend_names_the_known_ones(backend: object) -> None:
    with pytest.raises(ValueError, match="backend: expected one of 'auto', 'reference', 'cpu', 'triton', 'cuda', got"):
        resolve("contrast", backend, CPU, *MAPS)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("stage", "room"), [(stage, room) for stage in STAGES for room in ROOMS if SUPPORT[stage][room] is not None]
)
def test_a_missing_cell_never_falls_back(stage: str, room: str) -> None:
    with pytest.raises(checks.BackendUnavailable, match=re.escape(str(SUPPORT[stage][room]))):
        resolve(stage, room, CPU)


def test_a_room_refuses_a_foreign_device() -> None:
    needs_extension()
    with pytest.raises(checks.BackendUnavailable, match="the tensors are on cuda:0, this room serves cpu"):
        resolve("contrast", "cpu", torch.device("cuda:0"), *MAPS)


def test_auto_takes_the_compiled_room_on_the_cpu_and_the_reference_elsewhere() -> None:
    assert resolve("contrast", "auto", torch.device("cuda:0"), *MAPS).__name__.endswith("reference.contrast")
    needs_extension()
    assert resolve("contrast", "auto", CPU, *MAPS).__name__.endswith("cpu.contrast")


@pytest.mark.parametrize("fault", ["float64", "gradient"])
def test_auto_passes_over_a_room_that_an_explicit_call_finds_shut(fault: str, caplog: pytest.LogCaptureFixture) -> None:
    needs_extension()
    task = MAPS[0].double() if fault == "float64" else MAPS[0].clone().requires_grad_()
    with pytest.raises(checks.BackendUnavailable, match=f"{fault}.*use backend='reference'"):
        resolve("contrast", "cpu", CPU, task, *MAPS[1:])
    with caplog.at_level(logging.DEBUG, logger="carve_kernels"):
        assert resolve("contrast", "auto", CPU, task, *MAPS[1:]).__name__.endswith("reference.contrast")
    assert any(fault in message for message in caplog.messages)
    assert any("reference serves" in message for message in caplog.messages)


def test_a_library_that_does_not_load_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pytest.TempPathFactory
) -> None:
    unavailable = extension.unavailable.__wrapped__
    monkeypatch.setattr(extension, "LIBRARY", tmp_path / "_C.abi3.so")
    assert "is not built; pip install --no-build-isolation -e . with a C++ compiler" in unavailable()
    (tmp_path / "_C.abi3.so").write_text("no library")
    assert "failed to load" in unavailable()


def test_explain_has_a_line_for_every_cell() -> None:
    table = explain()
    for stage in STAGES:
        for room in ROOMS:
            line = next(line for line in table.splitlines() if line.split()[:2] == [stage, room])
            assert ("no" in line.split()) == (len(line.split()) > 3), line
    picked = "reference" if cpu.unavailable() else "cpu"
    assert f"backend='auto' on cpu tensors: capture={picked}" in table
