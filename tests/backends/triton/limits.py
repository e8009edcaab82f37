"""The limits of every compiled kernel on each target."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

# The most shared memory of a block, in bytes; Triton does not check it before a launch.
SHARED_BYTES = {"80": 166912, "86": 101376, "89": 101376, "90": 232448, "100": 232448, "120": 101376, "gfx942": 65536}

# Kernels whose last program combines the results of the others.
HANDING_OVER = ("capture_map_kernel", "capture_reread_kernel", "contrast_grid_kernel")
# Kernels that multiply keys.
MULTIPLYING = ("capture_scores_kernel", "capture_reread_kernel", "column_normaliser_kernel", "column_sums_kernel")
# A kernel that lets the next one start early, and the next one, which waits; and a load before the wait of what the
# first one stores.
OVERLAPPING = {"capture_scores_kernel": "PREEXIT", "capture_map_kernel": "ACQBULK"}
EARLY = "load before ACQBULK"

# The targets whose registers are counted, in the order of the table.
TARGETS = ("80", "90", "100", "120", "gfx942")
REGISTERS = Path(__file__).with_name("registers.json")
REWRITE = "python -m tests.backends.triton.offline --write"
# A Triton that is not in the table may use half as many registers more than any in it.
ALLOWANCE = 1.5


class Row(NamedTuple):
    """The compiler's output for one kernel."""

    kernel: str
    case: str
    target: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    opcodes: dict[str, int]

    @property
    def name(self) -> str:
        return f"{self.kernel} {self.case} {self.target}"

    def count(self, pattern: str) -> int:
        """How many instructions have a name that begins with a pattern."""
        return sum(count for name, count in self.opcodes.items() if re.match(pattern, name))


def faults(row: Row) -> list[str]:
    """The faults of a row, as sentences."""
    return [*_faults_of_memory(row), *_faults_of_opcodes(row)]


def _faults_of_memory(row: Row) -> Iterator[str]:
    if row.stack_bytes or row.count(r"STL|LDL|scratch_"):
        yield f"{row.stack_bytes} bytes of stack, {row.count('STL|LDL|scratch_')} instructions that spill"
    if row.shared_bytes > SHARED_BYTES[row.target]:
        yield f"{row.shared_bytes} bytes of shared memory, {SHARED_BYTES[row.target]} are available"


def _faults_of_opcodes(row: Row) -> Iterator[str]:
    if row.count(r"(RED|ATOM)\w*\..*F(16|32|64)|global_atomic_(pk_)?add_(f|bf)"):
        yield "floating-point atomics, whose order is not fixed"
    multiplies = row.kernel in MULTIPLYING
    halves = "float16" in row.case
    fences = (r"MEMBAR\..*GPU", "CCTL") if row.target.isdecimal() else ("buffer_wbl2", "buffer_inv")
    if row.kernel in HANDING_OVER and not all(map(row.count, fences)):
        yield f"not both of {' and '.join(fences)}: the last program may read what others have not written yet"
    if not row.target.isdecimal():
        if multiplies and halves and not row.count("v_mfma"):
            yield "no v_mfma: matrix products without matrix instructions"
        return
    if int(row.target) >= 90 and row.kernel in OVERLAPPING and row.count(OVERLAPPING[row.kernel]) != 1:
        yield f"not one {OVERLAPPING[row.kernel]}: launches do not overlap"
    if row.count(EARLY):
        yield f"{EARLY}: the second kernel may read what the first one has not written yet"
    if multiplies:
        if not row.count(r"LDGSTS\..*128"):
            yield "no LDGSTS of 128 bits: keys are not loaded asynchronously"
        # Eight lanes of 32 halves are too few for 128 bits for each of 128 threads.
        narrow = r"LDGSTS\.(?!.*(128|64))" if "head size 32 " in row.case else r"LDGSTS\.(?!.*128)"
        if row.kernel == "column_sums_kernel":
            # Maxima and sums of rows, a float for each thread.
            narrow += "(?!E$)"
        if row.count(narrow):
            yield "asynchronous loads of fewer than 128 bits: an alignment hint is missing"
        wanted = matrix_instruction(row) if halves else "FFMA"
        if not row.count(wanted):
            yield f"no {wanted}: matrix products without the target's instruction"


def matrix_instruction(row: Row) -> str:
    """The instruction that multiplies matrices: wgmma and tcgen05 need 64 lanes, 8 rows of the 7 heads of a group."""
    from_64 = {"90": "HGMMA", "100": r"UTC\w*MMA"}
    rows = int(re.findall(r"rows (\d+)", row.case)[0])
    return from_64.get(row.target, "HMMA") if rows >= 8 else "HMMA"


def verdict(row: Row, version: str) -> list[str]:
    """The faults of a row of this Triton, including its registers, as sentences.

    A Triton that is not in the table may use other instructions: its limits are memory and a bound on registers.
    """
    found = faults(row) if is_counted(version) else list(_faults_of_memory(row))
    return [*found, *_faults_of_registers(row, release(version))]


def _faults_of_registers(row: Row, version: str) -> Iterator[str]:
    by_version = table().get(f"{row.kernel} {row.case}")
    if by_version is None or row.target not in TARGETS:
        return
    counts = {one: counted[TARGETS.index(row.target)] for one, counted in by_version.items()}
    if version in counts:
        if row.registers != counts[version]:
            yield f"{row.registers} registers, {counts[version]} in {REGISTERS.name}; to accept it: {REWRITE}"
    elif row.registers > ALLOWANCE * max(counts.values()):
        yield f"{row.registers} registers, at most {max(counts.values())} in {REGISTERS.name}; to accept it: {REWRITE}"


@functools.cache
def table() -> dict[str, dict[str, list[int]]]:
    """The registers on each target, by kernel and case and by the version of Triton."""
    registers: dict[str, dict[str, list[int]]] = json.loads(REGISTERS.read_text())
    return registers


def versions() -> list[str]:
    """Every Triton of the table, the oldest first."""
    return by_age({version for by_version in table().values() for version in by_version})


def by_age(releases: Iterable[str]) -> list[str]:
    return sorted(releases, key=lambda one: tuple(map(int, one.split("."))))


def is_counted(version: str) -> bool:
    """Whether the table has the registers of this Triton."""
    return all(release(version) in by_version for by_version in table().values())


def release(version: str) -> str:
    """The version without the suffix of a local build."""
    return version.partition("+")[0]
