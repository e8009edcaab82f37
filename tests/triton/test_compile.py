"""Every kernel, compiled for GPUs that are not there: memory, loads, matrix instructions, fences and registers."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton")

import triton

from tests.triton import limits, offline
from tests.triton.limits import Row

ROOT = Path(__file__).resolve().parents[2]
KERNELS = {
    "capture": ("capture_statistics_kernel", "capture_map_kernel"),
    "contrast": ("contrast_grid_kernel", "contrast_pixels_kernel"),
}


def expected() -> dict[tuple[str, str], tuple[str, str]]:
    """The kernels by case and target, in the order of their launches."""
    return {
        (case.name, target): KERNELS["contrast" if case.name.startswith("lam") else "capture"]
        for case in offline.cases()
        for target in offline.TARGETS
    }


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[str, str], list[Row]]:
    """The rows by case and target."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in offline.compile_apart(ROOT):
        found.setdefault((row.case, row.target), []).append(row)
    return found


@pytest.mark.parametrize(("case", "target"), expected())
def test_kernels_keep_to_the_limits_of_the_target(
    compiled: dict[tuple[str, str], list[Row]], case: str, target: str
) -> None:
    rows = compiled[case, target]
    assert tuple(row.kernel for row in rows) == expected()[case, target]
    assert [(row.kernel, fault) for row in rows for fault in limits.faults(row)] == []


def test_registers_are_those_of_the_table(compiled: dict[tuple[str, str], list[Row]]) -> None:
    assert limits.changes([row for rows in compiled.values() for row in rows], triton.__version__) == []


def sound(**changes: object) -> Row:
    """A row that keeps to every limit, but for the changes."""
    opcodes = {"LDGSTS.E.BYPASS.128": 8, "HMMA.16816.F32.BF16": 4, "MEMBAR.ALL.GPU": 1, "CCTL.IVALL": 1}
    row = Row("capture_map_kernel", "bfloat16 head size 128 rows 1", "90", 64, 0, 40960, opcodes)
    return row._replace(**changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        (sound(stack_bytes=8), "8 bytes of stack"),
        (sound(opcodes=sound().opcodes | {"STL.64": 2}), "2 instructions that spill"),
        (sound(shared_bytes=240000), "240000 bytes of shared memory"),
        (sound(target="120", shared_bytes=110000), "101376 are there"),
        (sound(opcodes=sound().opcodes | {"LDGSTS.E.64": 1}), "fewer than 128 bits"),
        (sound(opcodes={"HMMA.16816.F32.BF16": 4, "MEMBAR.ALL.GPU": 1, "CCTL.IVALL": 1}), "no LDGSTS of 128 bits"),
        (sound(case="bfloat16 head size 128 rows 64"), "no HGMMA"),
        (sound(case="bfloat16 head size 128 rows 64", target="100"), "UTC"),
        (sound(case="float32 head size 128 rows 1"), "no FFMA"),
        (sound(opcodes=sound().opcodes | {"MEMBAR.ALL.GPU": 0}), "have not written yet"),
        (sound(opcodes=sound().opcodes | {"CCTL.IVALL": 0}), "have not written yet"),
        (sound(opcodes=sound().opcodes | {"RED.E.ADD.F32.FTZ.RN.STRONG.GPU": 1}), "floating-point atomics"),
        (sound(target="gfx942", opcodes={"buffer_wbl2": 1, "buffer_inv": 1}), "no v_mfma"),
    ],
)
def test_a_planted_fault_is_named(row: Row, fault: str) -> None:
    assert not limits.faults(sound())
    assert len(found := limits.faults(row)) == 1
    assert fault in found[0]


def test_a_change_of_registers_is_named() -> None:
    version, registers = limits.table()
    rows = [
        sound(kernel=kernel, case=case, target=target, registers=registers[f"{kernel} {case} {target}"])
        for (case, target), kernels in expected().items()
        for kernel in kernels
    ]
    assert limits.changes(rows, version) == []
    changed = [rows[0]._replace(registers=rows[0].registers + 1), *rows[2:]]
    assert [change.split(":")[0] for change in limits.changes(changed, version)] == sorted([rows[0].name, rows[1].name])
    assert limits.REWRITE in limits.changes(changed, version)[0]
    assert limits.changes(changed, "another version") == []
