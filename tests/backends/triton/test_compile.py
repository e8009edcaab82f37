"""Every kernel, compiled without a GPU: memory, loads, matrix instructions, fences and registers."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton")

import triton

from tests.backends.triton import limits, offline, versions
from tests.backends.triton.limits import Row

ROOT = Path(__file__).resolve().parents[3]
KERNELS = {
    "capture": ("capture_scores_kernel", "capture_map_kernel"),
    "lse": ("capture_reread_kernel",),
    "contrast": ("contrast_grid_kernel", "contrast_pixels_kernel"),
    "columns": ("column_normaliser_kernel", "column_sums_kernel"),
}


# One case of each kind of product and of kernel, each on another target, and every kernel on AMD's; `offline` compiles
# all.
SHORT = (
    ("80", "bfloat16 head size 128 rows 1"),
    ("80", "bfloat16 head size 128 rows 64 lse"),
    ("90", "bfloat16 head size 128 rows 64"),
    ("100", "bfloat16 head size 64 rows 64"),
    ("120", "float32 head size 128 rows 1"),
    ("120", "lam mean normalize none views 1"),
    ("90", "columns bfloat16 head size 128 rows 64"),
    ("120", "columns float32 head size 128 rows 64"),
    ("gfx942", "bfloat16 head size 128 rows 1"),
    ("gfx942", "bfloat16 head size 128 rows 1 lse"),
    ("gfx942", "lam mean normalize none views 1"),
    ("gfx942", "columns bfloat16 head size 128 rows 64"),
)


def kernels_of(case: str) -> tuple[str, ...]:
    """The kernels of a case in the order of their launches."""
    first = {"lam": "contrast", "columns": "columns"}.get(case.split()[0])
    return KERNELS[first or ("lse" if case.endswith("lse") else "capture")]


def test_every_kernel_is_compiled_for_amd() -> None:
    of_amd = {kernel for target, case in SHORT if target == "gfx942" for kernel in kernels_of(case)}
    assert of_amd == {kernel for kernels in KERNELS.values() for kernel in kernels}


def test_a_case_of_each_kind_is_within_the_limits_and_the_table() -> None:
    rows = offline.compile_in_subprocess(ROOT, *SHORT)
    assert [(row.target, row.case, row.kernel) for row in rows] == [
        (target, case, kernel) for target, case in SHORT for kernel in kernels_of(case)
    ]
    assert [(row.name, fault) for row in rows for fault in limits.verdict(row, triton.__version__)] == []
    if not limits.is_counted(triton.__version__):
        warnings.warn(f"triton {triton.__version__} is not in the table of registers: {limits.REWRITE}", stacklevel=1)


# The registers of the kernels of the gradients of a capture by Triton 3.9, on each target another case.
GRADIENTS = {
    ("80", "gradient bfloat16 head size 128 rows 1"): (137, 176),
    ("90", "gradient bfloat16 head size 128 rows 64"): (223, 205),
    ("100", "gradient bfloat16 head size 128 rows 64"): (216, 211),
    ("120", "gradient float32 head size 128 rows 64"): (102, 185),
}
OF_GRADIENTS = ("capture_key_gradient_kernel", "capture_query_gradient_kernel")


def test_gradients_fit_into_registers_and_use_matrix_instructions() -> None:
    rows = offline.compile_in_subprocess(ROOT, *GRADIENTS)
    names = ("capture_scores_kernel", "capture_given_kernel", *OF_GRADIENTS)
    assert [(row.target, row.case, row.kernel) for row in rows] == [
        (*task, name) for task in GRADIENTS for name in names
    ]
    for row in rows:
        assert limits.verdict(row, triton.__version__) == [], row.name
        if row.kernel not in OF_GRADIENTS:
            continue
        counted = GRADIENTS[row.target, row.case][OF_GRADIENTS.index(row.kernel)]
        exact = limits.release(triton.__version__) == "3.9.0"
        assert row.registers == counted if exact else row.registers <= min(limits.ALLOWANCE * counted, 255), row.name
        assert row.count("HMMA|HGMMA|UTC.*MMA" if "bfloat16" in row.case else "FFMA"), row.name


def test_the_table_has_every_case_with_every_triton_and_target() -> None:
    assert set(limits.versions()) >= {"3.6.0", "3.8.0", "3.9.0"}
    names = {f"{kernel} {case.name}" for case in offline.cases() for kernel in kernels_of(case.name)}
    assert set(limits.table()) == names
    for by_version in limits.table().values():
        assert list(by_version) == limits.versions()
        assert all(len(counts) == len(limits.TARGETS) for counts in by_version.values())


MAP = {"MEMBAR.ALL.GPU": 1, "CCTL.IVALL": 1, "ACQBULK": 1, "LDG.E.STRONG.GPU": 48}


def valid_row(**changes: object) -> Row:
    """A row within every limit, except for the changes."""
    opcodes = {"LDGSTS.E.BYPASS.128": 8, "HMMA.16816.F32.BF16": 4, "MEMBAR.ALL.GPU": 1, "CCTL.IVALL": 1}
    row = Row("capture_reread_kernel", "bfloat16 head size 128 rows 1", "90", 64, 0, 40960, opcodes)
    return row._replace(**changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        (valid_row(stack_bytes=8), "8 bytes of stack"),
        (valid_row(opcodes=valid_row().opcodes | {"STL.64": 2}), "2 instructions that spill"),
        (valid_row(shared_bytes=240000), "240000 bytes of shared memory"),
        (valid_row(target="120", shared_bytes=110000), "101376 are available"),
        (valid_row(opcodes=valid_row().opcodes | {"LDGSTS.E.64": 1}), "fewer than 128 bits"),
        (valid_row(opcodes={"HMMA.16816.F32.BF16": 4, "MEMBAR.ALL.GPU": 1, "CCTL.IVALL": 1}), "no LDGSTS of 128 bits"),
        (valid_row(case="bfloat16 head size 128 rows 64"), "no HGMMA"),
        (valid_row(case="float16 head size 128 rows 8"), "no HGMMA"),
        (valid_row(case="bfloat16 head size 128 rows 64", target="100"), "UTC"),
        (valid_row(case="float32 head size 128 rows 1"), "no FFMA"),
        (valid_row(opcodes=valid_row().opcodes | {"MEMBAR.ALL.GPU": 0}), "have not written yet"),
        (valid_row(opcodes=valid_row().opcodes | {"CCTL.IVALL": 0}), "have not written yet"),
        (valid_row(opcodes=valid_row().opcodes | {"RED.E.ADD.F32.FTZ.RN.STRONG.GPU": 1}), "floating-point atomics"),
        (valid_row(target="gfx942", opcodes={"buffer_wbl2": 1, "buffer_inv": 1}), "no v_mfma"),
        (
            valid_row(target="gfx942", stack_bytes=4, opcodes={"buffer_wbl2": 1, "buffer_inv": 1, "v_mfma": 1}),
            "4 bytes",
        ),
        (valid_row(kernel="capture_scores_kernel"), "not one PREEXIT: launches do not overlap"),
        (valid_row(kernel="capture_map_kernel", opcodes=MAP | {"ACQBULK": 0}), "not one ACQBULK"),
        (valid_row(kernel="capture_map_kernel", opcodes=MAP | {limits.EARLY: 1}), "has not written yet"),
    ],
)
def test_a_planted_fault_is_named(row: Row, fault: str) -> None:
    assert not limits.faults(valid_row()) and not limits.faults(valid_row(kernel="capture_map_kernel", opcodes=MAP))
    assert len(found := limits.faults(row)) == 1
    assert fault in found[0]


def test_a_change_of_registers_is_named() -> None:
    counted = limits.table()["capture_scores_kernel bfloat16 head size 128 rows 1"]
    for version, counts in counted.items():
        opcodes = valid_row().opcodes | {"PREEXIT": 1}
        row = valid_row(kernel="capture_scores_kernel", opcodes=opcodes, registers=counts[limits.TARGETS.index("90")])
        assert limits.verdict(row, version) == limits.verdict(row, f"{version}+git01234567") == []
        (change,) = limits.verdict(row._replace(registers=row.registers - 1), version)
        assert change.startswith(f"{row.registers - 1} registers, {row.registers} in registers.json")
        assert limits.REWRITE in change
    # A case that is not in the table has limits alone.
    assert limits.verdict(valid_row(case="bfloat16 head size 96 rows 1", registers=1), "3.9.0") == []
    assert limits.verdict(valid_row(target="86", registers=1), "3.9.0") == []


def test_a_triton_that_is_not_in_the_table_has_limits_on_memory_and_registers() -> None:
    row = valid_row(kernel="capture_scores_kernel", case="bfloat16 head size 64 rows 1", opcodes={"NEW.HMMA": 1})
    counted = limits.table()[f"{row.kernel} {row.case}"].values()
    most = max(counts[limits.TARGETS.index("90")] for counts in counted)
    bound = int(limits.ALLOWANCE * most)
    assert not limits.is_counted("3.99.0") and limits.is_counted("3.9.0+cu130")
    assert limits.verdict(row._replace(registers=bound), "3.99.0") == []
    (fault,) = limits.verdict(row._replace(registers=bound + 1), "3.99.0")
    assert fault == f"{bound + 1} registers, at most {most} in registers.json; to accept it: {limits.REWRITE}"
    (fault,) = limits.verdict(row._replace(registers=bound, stack_bytes=8), "3.99.0")
    assert "8 bytes of stack" in fault


def test_registers_are_written_next_to_those_of_other_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "registers.json"
    monkeypatch.setattr(offline, "REGISTERS", path)
    monkeypatch.setattr(offline.triton, "__version__", "3.99.0+git")
    rows = [
        Row(kernel, case.name, target, 40 + index, 0, 0, {})
        for index, target in enumerate(limits.TARGETS)
        for case in offline.cases()
        for kernel in kernels_of(case.name)
    ]
    offline.write(rows)
    written = json.loads(path.read_text())
    assert written == {
        name: {**by_version, "3.99.0": [40, 41, 42, 43, 44]} for name, by_version in limits.table().items()
    }
    assert all(list(by_version) == [*limits.versions(), "3.99.0"] for by_version in written.values())


def test_the_docs_have_the_table() -> None:
    page = (ROOT / "benchmarks/results/triton-registers.md").read_text(encoding="utf-8")
    for name, by_version in limits.table().items():
        cells = (", ".join(map(str, counts)) for counts in by_version.values())
        assert f"| {name} | {' | '.join(cells)} |" in page


@pytest.mark.parametrize("broken", [None, "3.8.0"])
def test_every_version_is_installed_compiled_and_interpreted(
    broken: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = []

    def run(command: list[str], env: dict[str, str] | None = None, **_options: Any) -> Any:
        if env is None:
            ran.append((command[-2:], "installed"))
            return SimpleNamespace(returncode=0)
        folder = Path(env["PYTHONPATH"])
        ran.append((command[2], "--all" in command, folder.name, "TRITON_INTERPRET" in env))
        return SimpleNamespace(returncode=int(folder.name == broken and command[2] == "pytest"))

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["versions", str(tmp_path)])
    assert versions.main() == (broken is not None)
    assert ran == [
        step
        for version in limits.versions()
        for step in (
            ([str(tmp_path / version), f"triton=={version}"], "installed"),
            ("tests.backends.triton.offline", version in ("3.6.0", "3.9.0"), version, False),
            ("pytest", False, version, True),
        )
    ]
    said = capsys.readouterr().out
    assert f"{len(limits.versions())} versions of Triton, {int(broken is not None)} proofs failed" in said
    assert ("triton 3.8.0: -m pytest" in said) == (broken is not None)
