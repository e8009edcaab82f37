"""Kernels with one planted fault each, which the tests of the kernels must catch.

python -m tests.backends.triton.mutants    all of them
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests.backends.triton import offline
from tests.backends.triton.limits import faults

ROOT = Path(__file__).resolve().parents[3]
PACKAGE = "carve_kernels/backends/triton"


class Mutant(NamedTuple):
    """A change of one line of a kernel, and the message of the test that must catch it."""

    name: str
    file: str
    line: str
    instead: str
    proof: Callable[[Path], str]
    words: str


def compiled(target: str, case: str) -> Callable[[Path], str]:
    """The faults of a case that is compiled from a folder."""

    def prove(folder: Path) -> str:
        rows = offline.compile_in_subprocess(folder, (target, case))
        return "\n".join(fault for row in rows for fault in faults(row))

    return prove


def interpreted(module: str, choice: str) -> Callable[[Path], str]:
    """The output of tests that fail in the interpreter, run from a folder."""

    def prove(folder: Path) -> str:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", module, "-k", choice]
        result = subprocess.run(command, cwd=folder, env=dict(os.environ), capture_output=True, text=True, timeout=600)
        # 1 is a failed test; any other code is an error of the test run.
        return result.stdout if result.returncode == 1 else ""

    return prove


CAPTURE = compiled("90", "bfloat16 head size 128 rows 1")
CONTRAST = compiled("90", "lam mean normalize none views 1")
CONTRAST_TESTS = "tests/backends/triton/test_contrast_backend.py"
CAPTURE_BODY = "tests/ops/test_capture.py"
GRADIENT_BODY = "tests/ops/test_gradient_kernels.py"
COLUMNS = compiled("80", "columns float32 head size 128 rows 64")
COLUMNS_TESTS = "tests/backends/triton/test_column_sums_backend.py"
COLUMNS_BODY = "tests/ops/test_column_sums.py"

MUTANTS = [
    Mutant(
        "a relaxed ticket of capture", "capture_parts.py", 'sem="acq_rel"', 'sem="relaxed"', CAPTURE, "not written yet"
    ),
    Mutant(
        "pixels beyond the edge",
        "contrast_kernels.py",
        "mask=(pixel_y < height)[:, None] & (pixel_x < width)[None, :])",
        "mask=(pixel_y < height)[:, None] & (pixel_x <= width)[None, :])",
        interpreted(CONTRAST_TESTS, "nothing_outside"),
        "1 failed",
    ),
    Mutant(
        "a hint that is dropped",
        "capture_parts.py",
        "return tl.multiple_of(stride, UNIT) // UNIT * UNIT",
        "return stride",
        CAPTURE,
        "128 bits",
    ),
    Mutant(
        "a relaxed ticket of contrast",
        "contrast_kernels.py",
        'sem="acq_rel"',
        'sem="relaxed"',
        CONTRAST,
        "not written yet",
    ),
    Mutant(
        "the first program instead of the last",
        "contrast_kernels.py",
        "if ticket == chunks - 1:",
        "if ticket == 0:",
        interpreted(CONTRAST_TESTS, "nothing_outside"),
        "1 failed",
    ),
    Mutant(
        "tokens beyond the map",
        "contrast_kernels.py",
        "mask=other < tokens, other=0.0)",
        "mask=other < tokens + 1, other=0.0)",
        interpreted(CONTRAST_TESTS, "nothing_outside"),
        "1 failed",
    ),
    Mutant(
        "the triangle off by half a pixel",
        "contrast_kernels.py",
        "tl.abs((2 * token + 1) * pixels - (2 * pixel + 1) * tokens)",
        "tl.abs((2 * token + 1) * pixels - 2 * pixel * tokens)",
        interpreted(CONTRAST_TESTS, "antialias"),
        "1 failed",
    ),
    Mutant(
        "offsets of 32 bits",
        "contrast_kernels.py",
        "stride_task_l: tl.int64",
        "stride_task_l: tl.int32",
        interpreted(CONTRAST_TESTS, "beyond_two_thousand_million"),
        "overflow",
    ),
    Mutant(
        "a mask that hides nothing",
        "capture_parts.py",
        "visible &= tl.load(mask_ptr + at, mask=live[:, None] & (column < stop)[None, :], other=0) != 0",
        "visible &= tl.load(mask_ptr + at, mask=live[:, None] & (column < stop)[None, :], other=0) >= 0",
        interpreted(CAPTURE_BODY, "triton and reference"),
        "1 failed",
    ),
    Mutant(
        "a second kernel that does not wait",
        "capture_kernels.py",
        "tl.extra.cuda.gdc_wait()",
        "first += 0",
        CAPTURE,
        "not one ACQBULK",
    ),
    Mutant(
        "a vector of scores around the tokens that is not stored",
        "capture_kernels.py",
        "end = tl.minimum(end, high + parts.SPLIT_UNIT)",
        "end = tl.minimum(end, high)",
        interpreted("tests/backends/triton/test_capture_backend.py", "between_the_tokens"),
        "1 failed",
    ),
    Mutant(
        "column sums of the rows before the last tile alone",
        "column_kernels.py",
        "tl.cdiv(stop, BLOCK_ROW)):",
        "tl.cdiv(stop, BLOCK_ROW) - 1):",
        interpreted(COLUMNS_TESTS, "nothing_outside"),
        "1 failed",
    ),
    Mutant(
        "column sums that begin a row late",
        "column_kernels.py",
        "tl.min(tl.where(sees, row, rows), 0)",
        "tl.min(tl.where(sees, row + BLOCK_ROW, rows), 0)",
        interpreted(COLUMNS_TESTS, "nothing_outside"),
        "1 failed",
    ),
    Mutant(
        "column sums of keys that a row does not see",
        "column_kernels.py",
        "sums += tl.where(seen, probability, 0.0)",
        "sums += probability",
        interpreted(COLUMNS_BODY, "whatever_its_lse and triton"),
        "1 failed",
    ),
    Mutant(
        "column sums beyond the last key",
        "column_kernels.py",
        "mask=column < keys)",
        "mask=column <= keys)",
        interpreted(COLUMNS_TESTS, "nothing_outside"),
        "1 failed",
    ),
    Mutant(
        "a normaliser without the sink",
        "column_kernels.py",
        'total += tl.where(sink == float("-inf"), 0.0, tl.exp2(parts.above(sink, higher, residual)))',
        "total += 0.0",
        interpreted(COLUMNS_TESTS, "nothing_outside"),
        "1 failed",
    ),
    Mutant(
        "column sums of all rows of a causal prefill",
        "column_kernels.py",
        "sees = live & (last >= lowest) & (after < highest)",
        "sees = live & (last >= 0) & (after < highest)",
        interpreted(COLUMNS_TESTS, "are_not_read"),
        "1 failed",
    ),
    Mutant(
        "keys that stay in registers",
        "column_kernels.py",
        "bound = tl.where(tile_of_rows < 0, 0, keys - 1)",
        "bound = keys - 1",
        COLUMNS,
        "bytes of stack",
    ),
    Mutant(
        "keys that no row sees",
        "capture_backward_kernels.py",
        "is_read = tl.max((gradient != 0).to(tl.int32), 0) > 0",
        "is_read = tl.max((gradient != 0).to(tl.int32), 0) >= 0",
        interpreted(GRADIENT_BODY, "triton-mask"),
        "1 failed",
    ),
    Mutant(
        "a token that is listed twice",
        "capture_backward_kernels.py",
        "before + merged, mask=used",
        "merged, mask=used",
        interpreted(GRADIENT_BODY, "triton and twice"),
        "1 failed",
    ),
    Mutant(
        "rows that replace those before them",
        "capture_backward_kernels.py",
        "if ADDS:",
        "if not ADDS and scale == 0:",
        interpreted(GRADIENT_BODY, "triton and turns"),
        "1 failed",
    ),
    Mutant(
        "a slope of the softcap",
        "capture_backward_kernels.py",
        "gradient *= 1.0 - capped * capped",
        "gradient *= 1.0 - capped",
        interpreted(GRADIENT_BODY, "triton-head"),
        "1 failed",
    ),
]
# One for each kind of test.
SHORT = MUTANTS[:2]


def is_caught(mutant: Mutant) -> bool:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("carve_kernels", "tests"):
            unneeded = shutil.ignore_patterns("__pycache__", "models", "small")
            shutil.copytree(ROOT / part, folder / part, ignore=unneeded)
        shutil.copy(ROOT / "pyproject.toml", folder)
        path = folder / PACKAGE / mutant.file
        source = path.read_text()
        if source.count(mutant.line) != 1:
            raise ValueError(f"{mutant.name}: {mutant.file} has the line {source.count(mutant.line)} times")
        path.write_text(source.replace(mutant.line, mutant.instead))
        return mutant.words in mutant.proof(folder)


def main() -> int:
    escaped = 0
    for mutant in MUTANTS:
        caught = is_caught(mutant)
        print(f"{mutant.name}: {'caught' if caught else 'NOT CAUGHT'}", flush=True)
        escaped += not caught
    print(f"{len(MUTANTS)} mutants, {escaped} not caught")
    return 1 if escaped else 0


if __name__ == "__main__":
    sys.exit(main())
