"""doctor, the GPU tests, compute-sanitizer and the benchmarks on the GPU of this machine, into one folder.

    python3 -m tests.gpu                      everything within 8 minutes, into out/gpu
    python3 -m tests.gpu --seconds 300 --output FOLDER

Every step has a time limit and its log; a step that fails or is ended does not keep the others from running. Exit
status 1 if a step failed, 2 if there is no GPU. Nothing is installed.
"""

from __future__ import annotations

import argparse
import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from importlib.util import find_spec
from pathlib import Path

import torch

from tests.gpu import library
from tests.gpu.steps import FAILED, ROOT, Step, run_all

SECONDS = 480.0
# The files of a folder: a log of each step, the numbers of the benchmarks, the summary.
NUMBERS = "benchmarks.json"
# Workers of pytest; each has its own context on the GPU, about half a gigabyte.
_MOST_WORKERS = 12
# Seconds that the benchmarks get less than their step, for a measurement that took longer than expected.
_MARGIN = 30.0


def steps(folder: Path, *, missing: str | None) -> list[Step]:
    """The steps on this machine; `missing` is why the library that is there does not serve its GPU, or None."""
    python = sys.executable
    xdist = find_spec("xdist") is not None
    workers = ("-n", str(min(_MOST_WORKERS, os.cpu_count() or 1)), "--dist", "worksteal") if xdist else ()
    sanitizer = shutil.which("compute-sanitizer")
    absent = "compute-sanitizer is not on the path" if sanitizer is None else None

    def fixed(*command: str) -> functools.partial[Sequence[str]]:
        return functools.partial(_always, command)

    def sanitize(tool: str, *backends: str) -> functools.partial[Sequence[str]]:
        options = ("--tool", tool, "--error-exitcode", "1")
        return fixed(sanitizer or "", *options, python, "-m", "tests.gpu.small_calls", *backends)

    def benchmark(seconds: float) -> Sequence[str]:
        budget = f"{max(seconds - _MARGIN, 0):.0f}"
        return (python, "-m", "benchmarks", "gpu", "--budget", budget, "--output", str(folder / NUMBERS))

    there = "the library that is there serves this GPU" if missing is None else None
    return [
        Step("build", fixed(python, "-m", "tests.gpu.library"), 240, 60, there),
        Step("doctor", fixed(python, "-m", "carve_kernels", "doctor"), 60, 15),
        Step("tests", fixed(python, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", *workers), 150, 30),
        # Of blocks that torch hands out again, the sanitizer would not see the bounds.
        Step(
            "memcheck", sanitize("memcheck"), 75, 20, absent, r"ERROR SUMMARY: 0 errors",
            {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        ),
        # Two warps of Triton's own sums write the same value to one address, which racecheck reports.
        Step("racecheck", sanitize("racecheck", "cuda"), 75, 20, absent, r"RACECHECK SUMMARY: 0 hazards"),
        Step("benchmarks", benchmark, SECONDS, 60),
    ]  # fmt: skip


def _always(command: Sequence[str], _seconds: float) -> Sequence[str]:
    return command


def describe(device: int = 0) -> str:
    """The machine and the source, for the summary."""
    source = "unknown"
    if git := shutil.which("git"):
        command = [git, "describe", "--always", "--dirty"]
        source = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip() or source
    name = torch.cuda.get_device_name(device)
    return f"{date.today()}: {name}, torch {torch.__version__}, CUDA {torch.version.cuda}, source {source}."


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "out" / "gpu")
    parser.add_argument("--seconds", type=float, default=SECONDS)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(f"torch {torch.__version__} sees no CUDA device: nothing was run", file=sys.stderr)
        return 2
    folder = options.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for old in (*folder.glob("*.log"), folder / NUMBERS, folder / "summary.md"):
        old.unlink(missing_ok=True)
    # Every model here is random or in the checkout.
    os.environ["HF_HUB_OFFLINE"] = "1"
    chosen = steps(folder, missing=library.missing())
    head = describe()
    print(head, flush=True)
    outcomes = run_all(chosen, folder, options.seconds, head=head, announce=lambda line: print(line, flush=True))
    print(f"in {folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
    return int(any(outcome.result == FAILED for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
