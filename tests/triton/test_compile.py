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


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[str, str], list[Row]]:
    """The rows by case and target."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in offline.compile_apart(ROOT):
        found.setdefault((row.case, row.target), []).append(row)
    return found


@pytest.mark.parametrize("target", offline.TARGETS)
@pytest.mark.parametrize("case", [case.name for case in offline.cases()])
def test_kernels_keep_to_the_limits_of_the_target(
    compiled: dict[tuple[str, str], list[Row]], case: str, target: str
) -> None:
    rows = compiled[case, target]
    stage = "contrast" if case.startswith("lam") else "capture"
    assert tuple(row.kernel for row in rows) == KERNELS[stage]
    assert [(row.kernel, fault) for row in rows for fault in limits.faults(row, triton.__version__)] == []


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
    assert not limits.faults(sound(), None)
    assert len(found := limits.faults(row, None)) == 1
    assert fault in found[0]


def test_a_change_of_registers_is_named() -> None:
    version, registers = limits.table()
    kernel, case, target = "contrast_grid_kernel", "lam mean normalize none views 1", "90"
    counted = registers[f"{kernel} {case} {target}"]
    row = sound(kernel=kernel, case=case, target=target, registers=counted)
    assert not limits.faults(row, version)
    changed = limits.faults(row._replace(registers=counted + 1), version)
    assert len(changed) == 1 and limits.REWRITE in changed[0]
    assert not limits.faults(row._replace(registers=counted + 1), "another version")
