"""Plants faults in the C++ kernels of column sums, one at a time; tests/native/column_sums.cpp must catch each.

python -m tests.native.mutants    all of them
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tests.emulator.emulator import compiler
from tests.emulator.mutate import compile_one, copy_sources

FLAGS = ["-std=c++17", "-O1", "-w", "-D_GLIBCXX_ASSERTIONS", "-pthread", "-ffp-contract=off"]
SUMS = "csrc/cpu/column_sums/column_sums.cpp"
ROWS = "csrc/cpu/capture/rows-inl.h"
SOURCES = ("csrc/cpu/capture/*.cpp", "csrc/cpu/column_sums/*.cpp", "csrc/cpu/simd/isa.cpp")
PROGRAM = ("tests/native/parallel.cpp", "tests/native/column_sums.cpp")


class Fault(NamedTuple):
    """A text that occurs once in a file, and what is there instead."""

    name: str
    file: str
    old: str
    new: str


FAULTS = [
    Fault("the last block of rows left out", SUMS, "blocks_(divide_up(p_.rows, rows_))", "blocks_(p_.rows / rows_)"),
    Fault("the sums of the last block alone", SUMS, "total[key] += from[key];", "total[key] = from[key];"),
    Fault("sums of a chunk that begin with the last one's", SUMS, "sums + group_ * kStride, 0.0f)", "sums, 0.0f)"),
    Fault("one head for a group", SUMS, "sums + line % group_ * kStride", "sums"),
    Fault("a normaliser without its sum", SUMS, "tops[at] + std::log2(totals[at])", "tops[at]"),
    Fault("a sink in another base", SUMS, "+ line % group_] * kLog2E, 1.0)", "+ line % group_], 1.0)"),
    Fault("a log-sum-exp in another base", SUMS, "p_.lse[at] * kLog2E", "p_.lse[at]"),
    Fault("a sum that a new maximum does not change", SUMS, "total * std::exp2(highest - higher) +", "total +"),
    Fault("chunks by the number of stripes", SUMS, "totals.data() + chunk / stripes", "totals.data() + chunk"),
    Fault("keys of another chunk", SUMS, "(start + any.first) * strides[2]", "start * strides[2]"),
    Fault("keys behind the last visible one", ROWS, "hide(row.scores, row.last, end);", ""),
    Fault("keys before the first visible one", ROWS, "hide(row.scores, begin, row.first);", ""),
    Fault("masked keys", ROWS, "if (row.mask != nullptr) hide_masked(row.scores", "if (false) hide_masked(row.scores"),
    Fault("sums without those before", ROWS, "load(row.sums + key) + (score == hidden", "(score == hidden"),
]  # fmt: skip


def plant(fault: Fault, root: Path) -> None:
    """Put a fault into a copy of the sources; ValueError where its text does not occur once."""
    path = root / fault.file
    text = path.read_text()
    if (count := text.count(fault.old)) != 1:
        raise ValueError(f"{fault.name}: expected {fault.old!r} once in {fault.file}, got it {count} times")
    path.write_text(text.replace(fault.old, fault.new))


def fails(fault: Fault | None = None) -> bool:
    """Whether the program fails, with a fault or as it is."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        copy_sources(root)
        if fault is not None:
            plant(fault, root)
        sources = [
            *(path for pattern in SOURCES for path in sorted(root.glob(pattern))),
            *(root / one for one in PROGRAM),
        ]
        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(partial(compile_one, root=root, options=FLAGS), sources))
        program = root / "column_sums"
        command = [compiler() or "g++", *FLAGS, *map(str, objects), "-o", str(program)]
        subprocess.run(command, check=True)
        return subprocess.run([program], capture_output=True, timeout=600).returncode != 0


def main() -> int:
    if fails():
        print("the program fails without a fault")
        return 1
    escaped = 0
    for fault in FAULTS:
        caught = fails(fault)
        print(f"{fault.name}: {'caught' if caught else 'NOT CAUGHT'}", flush=True)
        escaped += not caught
    print(f"{len(FAULTS)} faults, {escaped} not caught")
    return 1 if escaped else 0


if __name__ == "__main__":
    sys.exit(main())
