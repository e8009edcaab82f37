"""How a backend is chosen, and the reasons where it cannot serve."""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from carve_kernels import backends, checks
from carve_kernels.backends import BACKENDS, BEST_FOR, PREFERRED, STAGES, SUPPORT, cpu, explain, resolve
from carve_kernels.backends.native import extension
from carve_kernels.types import CaptureOptions

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
MAPS = (torch.ones(1, 1, 4), torch.ones(1, 1, 4), (2, 2), (2, 2))


def needs_extension() -> None:
    if reason := cpu.unavailable():
        pytest.skip(reason)


def test_the_table_has_every_stage_and_backend() -> None:
    assert tuple(SUPPORT) == STAGES
    assert all(tuple(backends) == BACKENDS for backends in SUPPORT.values())
    assert all(SUPPORT[stage]["reference"] is None for stage in STAGES)


@pytest.mark.parametrize("backend", ["CPU", "c++", "torch", "", None, 1])
def test_an_unknown_backend_names_the_known_ones(backend: object) -> None:
    with pytest.raises(ValueError, match="backend: expected one of 'auto', 'reference', 'cpu', 'triton', 'cuda', got"):
        resolve("contrast", backend, CPU, *MAPS)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("stage", "backend"),
    [(stage, backend) for stage in STAGES for backend in BACKENDS if SUPPORT[stage][backend] is not None],
)
def test_a_stage_that_is_not_implemented_never_falls_back(stage: str, backend: str) -> None:
    with pytest.raises(checks.BackendUnavailable, match=re.escape(str(SUPPORT[stage][backend]))):
        resolve(stage, backend, CPU)


def test_a_backend_refuses_a_foreign_device() -> None:
    needs_extension()
    with pytest.raises(checks.BackendUnavailable, match="the tensors are on cuda:0, this backend serves cpu"):
        resolve("contrast", "cpu", torch.device("cuda:0"), *MAPS)


def test_auto_takes_the_compiled_backend_on_the_cpu_and_the_reference_elsewhere() -> None:
    assert resolve("contrast", "auto", torch.device("meta"), *MAPS).__name__.endswith("reference.contrast")
    needs_extension()
    assert resolve("contrast", "auto", CPU, *MAPS).__name__.endswith("cpu.contrast")


@pytest.mark.parametrize("fault", ["float64", "gradient"])
def test_auto_skips_a_backend_that_refuses_an_explicit_call(fault: str, caplog: pytest.LogCaptureFixture) -> None:
    needs_extension()
    task = MAPS[0].double() if fault == "float64" else MAPS[0].clone().requires_grad_()
    with pytest.raises(checks.BackendUnavailable, match=f"{fault}.*use backend='reference'"):
        resolve("contrast", "cpu", CPU, task, *MAPS[1:])
    with caplog.at_level(logging.DEBUG, logger="carve_kernels"):
        assert resolve("contrast", "auto", CPU, task, *MAPS[1:]).__name__.endswith("reference.contrast")
    assert any(fault in message for message in caplog.messages)
    assert any("reference serves" in message for message in caplog.messages)


def test_a_library_that_does_not_load_has_a_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pytest.TempPathFactory
) -> None:
    unavailable = extension.unavailable.__wrapped__
    monkeypatch.setattr(extension, "LIBRARY", tmp_path / "_C.abi3.so")
    assert f"is not built; with a C++ compiler: {extension.install_command()}" in unavailable()
    (tmp_path / "_C.abi3.so").write_text("no library")
    assert "failed to load" in unavailable()


def test_explain_has_a_line_for_every_stage_and_backend() -> None:
    table = explain()
    for stage in STAGES:
        for backend in BACKENDS:
            line = next(line for line in table.splitlines() if line.split()[:2] == [stage, backend])
            assert ("no" in line.split()) == (len(line.split()) > 3), line
    picked = "reference" if cpu.unavailable() else "cpu"
    assert f"backend='auto' on cpu tensors: capture={picked}" in table


Plant = Callable[..., None]


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Plant:
    """Stand-ins for the GPU backends, with every stage unless a reason is given; one of CUDA up to eight rows."""

    def supports(rows: int) -> str | None:
        return f"{rows} rows are more than 8; use backend='triton'" if rows > 8 else None

    def build(**reasons: str | None) -> None:
        packages, modules = {}, {}
        for backend in ("triton", "cuda"):
            packages[backend] = SimpleNamespace(
                devices=lambda: ("cuda",), unavailable=lambda backend=backend: reasons.get(backend)
            )
            modules[backend] = SimpleNamespace(
                __name__=f"planted.{backend}.stage", supports=supports if backend == "cuda" else lambda rows: None
            )
        real_package, real_module = backends._package, backends._module
        monkeypatch.setattr(backends, "_package", lambda backend: packages.get(backend) or real_package(backend))
        monkeypatch.setattr(
            backends, "_module", lambda stage, backend: modules.get(backend) or real_module(stage, backend)
        )
        monkeypatch.setattr(backends, "_warned", set())
        for stage in STAGES:
            for backend in packages:
                monkeypatch.setitem(SUPPORT[stage], backend, None)

    return build


def chosen(rows: int, backend: str = "auto") -> str:
    return resolve("capture", backend, CUDA, rows).__name__.split(".")[-2]


def warnings(log: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in log.records if record.levelno >= logging.WARNING]


def test_what_the_first_backend_does_not_serve_goes_to_the_next(plant: Plant, caplog: pytest.LogCaptureFixture) -> None:
    plant()
    assert [chosen(rows) for rows in (1, 8, 9, 32)] == ["cuda", "cuda", "triton", "triton"]
    assert warnings(caplog) == []
    with pytest.raises(checks.BackendUnavailable, match="cuda cannot serve capture: 9 rows are more than 8"):
        chosen(9, "cuda")
    table = explain().splitlines()
    picks = ", ".join(f"{stage}=cuda" for stage in STAGES)
    index = table.index(f"backend='auto' on cuda tensors: {picks}")
    cuda, triton = (f"{backend} ({BEST_FOR['capture', backend]})" for backend in ("cuda", "triton"))
    assert table[index + 1] == f"  capture: {cuda}, then {triton}, then reference"
    assert "any number of rows" in table[index + 1]


MISSING = {
    "no compiler": "the extension was built without nvcc; install the CUDA toolkit",
    "old gpu": "the GPU's architecture sm_70 is not among the compiled ones; use backend='triton'",
    "no triton": "the package triton is missing; pip install triton",
}


@pytest.mark.parametrize(("backend", "reason", "next_backend"), [
    ("cuda", "no compiler", "triton"), ("cuda", "old gpu", "triton"), ("triton", "no triton", "reference"),
])  # fmt: skip
def test_a_missing_backend_leads_to_the_next_with_one_line(
    plant: Plant, caplog: pytest.LogCaptureFixture, backend: str, reason: str, next_backend: str
) -> None:
    plant(**{backend: MISSING[reason]})
    rows = 1 if backend == "cuda" else 9
    for _ in range(3):
        assert chosen(rows) == next_backend
        resolve("regions", "auto", CUDA, rows)
    assert warnings(caplog) == [f"backend {backend} unavailable, using the next one: {MISSING[reason]}"]
    assert all(record.name == "carve_kernels" for record in caplog.records)
    with pytest.raises(checks.BackendUnavailable, match=re.escape(MISSING[reason])):
        chosen(rows, backend)
    assert MISSING[reason] in explain()
    line = next(line for line in explain().splitlines() if line.startswith("  capture: cuda (any number of rows"))
    assert f"{BEST_FOR['capture', backend]}; does not serve here)" in line


def test_with_both_missing_the_reference_serves(plant: Plant, caplog: pytest.LogCaptureFixture) -> None:
    plant(cuda=MISSING["no compiler"], triton=MISSING["no triton"])
    assert {chosen(rows) for rows in (1, 9)} == {"reference"}
    assert len(warnings(caplog)) == 2
    table = explain()
    assert (
        "on cuda tensors: capture=reference, contrast=reference, regions=reference, attention=sdpa and capture" in table
    )


def test_what_auto_does_instead_of_the_reference(plant: Plant, caplog: pytest.LogCaptureFixture) -> None:
    plant(cuda=MISSING["no compiler"])
    found = backends.choose("attention", "auto", CUDA, 1)
    assert not isinstance(found, str) and found.__name__ == "planted.triton.stage"
    for device in (CPU, torch.device("mps")):
        found = backends.choose("attention", "auto", device, 1)
        assert isinstance(found, str) and "reference" not in backends.tried("attention", device.type)
    assert warnings(caplog) == []
    with pytest.raises(checks.BackendUnavailable, match="no backend but the reference serves attention on mps"):
        resolve("attention", "auto", torch.device("mps"), 1)
    assert "  attention: cuda (" in explain() and "triton, then sdpa and capture\n" in explain()


def test_a_stage_that_is_not_implemented_is_not_logged(
    plant: Plant, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plant()
    monkeypatch.setitem(SUPPORT["contrast"], "cuda", "Triton does it")
    assert resolve("contrast", "auto", CUDA, 1).__name__ == "planted.triton.stage"
    assert warnings(caplog) == []


def test_a_backend_is_queried_once_for_each_device(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant()
    queries = []
    package = SimpleNamespace(devices=lambda: ("cuda",), unavailable=lambda: queries.append("unavailable"))
    real = backends._package
    monkeypatch.setattr(backends, "_package", lambda backend: package if backend == "cuda" else real(backend))
    assert [chosen(1) for _ in range(5)] == ["cuda"] * 5
    assert queries == ["unavailable"]


def test_what_auto_prefers_on_a_gpu() -> None:
    assert PREFERRED["cuda"] == ("cuda", "triton")
    # A claim about a backend that is not preferred would mislead.
    assert all(backend in PREFERRED["cuda"] for _, backend in BEST_FOR)


def test_what_explain_says_of_times_was_measured_or_is_predicted() -> None:
    results = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
    page = (results / "2026-11-28-h100.md").read_text(encoding="utf-8")
    # Columns: heads, S, R, floor, cuda with its p10 and p90, predicted, trial, target, triton.
    cells = re.findall(
        r"^\| \d+ on \d+ \| \d+ \| \d+ \| [\d.]+ \| ([\d.]+) \(.*?\) (?:\| [^|]+ ){3}\| ([\d.]+) \|", page, re.M
    )
    measured = [float(triton) / float(cuda) for cuda, triton in cells]
    assert len(measured) > 60
    page = (results / "predicted.md").read_text(encoding="utf-8")
    table = page[page.index("the triton backend for the same layers") :]
    predicted = [float(ratio) for ratio in re.findall(r"^\| \d+ on \d+ \| \d+ \| \d+ \| (\d\.\d+) \|", table, re.M)]
    assert len(predicted) == 13
    said = BEST_FOR["capture", "triton"]
    for times, verb in ((measured, "took"), (predicted, "are predicted to take")):
        assert f"{verb} {min(times):.1f} to {max(times):.1f} times as long" in said


def test_the_cuda_backend_serves_any_number_of_rows() -> None:
    backend = importlib.import_module("carve_kernels.backends.cuda.capture")
    key, tokens = torch.zeros(1, 2, 16, 64), torch.zeros(1, 3, dtype=torch.int32)
    for rows in (1, 8, 9, 64, 1000):
        assert backend.supports(torch.zeros(1, 4, rows, 64), key, tokens, CaptureOptions(0.1)) is None
