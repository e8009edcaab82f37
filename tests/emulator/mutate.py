"""Plants faults in the CUDA kernels, one at a time, and verifies that the checks catch each.

`python -m tests.emulator.mutate --all` (or names of faults). A fault is caught where the program of its stage
(tests/emulator/<stage>_cuda.cpp) gives another result than the CPU kernels, does not end, or is stopped by a sanitizer.
The emulator does not model memory order between blocks: only ThreadSanitizer detects a missing `__threadfence`.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tests.emulator.emulator import ROOT, compiler
from tests.emulator.faults import FAULTS, Fault

BUILT = ROOT / "build/mutants"
FLAGS = ["-std=c++17", "-O1", "-w", "-U_FORTIFY_SOURCE", "-D_GLIBCXX_ASSERTIONS", "-pthread", "-ffp-contract=off"]
FLAGS += ["-DCARVE_MOST_SCORES=262144", "-DCARVE_MOST_RUNS=4"]
SANITIZERS = {
    "results": [],
    "addresses": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "races": ["-fsanitize=thread", "-g"],
}
# The argument that says how much a program runs; without one it runs its default amount.
AMOUNTS = {
    ("contrast", "results"): ["all"],
    ("contrast", "races"): ["few"],
    ("regions", "results"): ["all"],
    ("regions", "races"): ["few"],
    ("capture", "results"): ["seeds"],
    ("capture", "races"): ["first"],
    ("attention", "races"): ["first"],
}
# Every element type compiles the same headers: one is enough to plant faults in, against the plain CPU kernels.
ONE_TYPE = {
    stage: (["-DBFLOAT_ALONE"], ("half.cu", "avx2.cpp", "avx512.cpp", "avx512_bf16.cpp", "amx.cpp"))
    for stage in ("capture", "attention")
}


class Verdict(NamedTuple):
    """Whether a check fails, the first line that says why, and how long the program ran."""

    fails: bool
    reason: str
    seconds: float


def plant(fault: Fault, root: Path) -> None:
    """Put a fault into a copy of the sources; ValueError where its pattern occurs another number of times."""
    path = root / "csrc/cuda" / fault.file
    text = path.read_text()
    if (count := text.count(fault.old)) != fault.count:
        raise ValueError(f"{fault.name}: expected {fault.count} of {fault.old!r} in {fault.file}, got {count}")
    pieces = text.split(fault.old)
    path.write_text(fault.old.join(pieces[: fault.occurrence]) + fault.new + fault.old.join(pieces[fault.occurrence :]))


def copy_sources(root: Path) -> None:
    for folder in ("csrc", "tests/emulator", "tests/native"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__", "*.py"))


def sources(stage: str, root: Path) -> list[Path]:
    # The kernels of attention use those of capture.
    used = ("capture", "attention") if stage == "attention" else (stage,)
    folders = [f"csrc/{device}/{name}" for name in used for device in ("cuda", "cpu")]
    patterns = [f"{folder}/*.{kind}" for folder in folders for kind in ("cu", "cpp")]
    skipped = ONE_TYPE.get(stage, ([], ()))[1]
    kernels = [path for pattern in patterns for path in sorted(root.glob(pattern)) if path.name not in skipped]
    shared = ("csrc/cpu/simd/isa.cpp", "tests/native/parallel.cpp", f"tests/emulator/{stage}_cuda.cpp")
    return [*kernels, *(root / name for name in shared)]


def compile_one(path: Path, root: Path, options: list[str]) -> Path:
    """An object, compiled once for the same options and preprocessed text: a fault compiles what includes it alone."""
    include = [f"-I{root / folder}" for folder in ("tests/emulator/emulated", "csrc", "tests")]
    command = [compiler() or "g++", *options, *include, "-x", "c++", str(path)]
    text = subprocess.run([*command, "-E", "-P"], capture_output=True, check=True).stdout
    digest = hashlib.sha256(repr([path.relative_to(root).as_posix(), options]).encode() + text)
    target = BUILT / f"{path.stem}-{digest.hexdigest()[:20]}.o"
    if not target.exists():
        BUILT.mkdir(parents=True, exist_ok=True)
        fresh = target.with_suffix(f".{os.getpid()}.o")
        subprocess.run([*command, "-c", "-o", str(fresh)], check=True)
        os.replace(fresh, target)
    return target


def build(stage: str, check: str, root: Path) -> Path:
    options = [*FLAGS, *SANITIZERS[check], *ONE_TYPE.get(stage, ([], ()))[0]]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(functools.partial(compile_one, root=root, options=options), sources(stage, root)))
    program = root / f"{stage}_{check}"
    subprocess.run([compiler() or "g++", *options, *map(str, objects), "-o", str(program)], check=True)
    return program


@functools.cache
def fixed_addresses() -> list[str]:
    """The prefix that starts a program without address randomization, for ThreadSanitizer; empty where not allowed."""
    command = ["setarch", "-R"]
    allowed = shutil.which(command[0]) and subprocess.run([*command, "true"], capture_output=True).returncode == 0
    return command if allowed else []


def judge(
    stage: str, check: str, fault: Fault | None = None, *, limit: float = 3600.0, amount: list[str] | None = None
) -> Verdict:
    """Build and run the program of a stage, with a fault or without one, for at most `limit` seconds."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        copy_sources(root)
        if fault is not None:
            plant(fault, root)
        command = [str(build(stage, check, root)), *(AMOUNTS.get((stage, check), []) if amount is None else amount)]
        if check == "races":
            command = [*fixed_addresses(), *command]
        environment = {**os.environ, "TSAN_OPTIONS": "exitcode=66 halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=0"}
        start = time.monotonic()
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environment)
        except subprocess.TimeoutExpired:
            return Verdict(True, f"did not end in {limit:.0f} seconds", limit)
        seconds = time.monotonic() - start
    lines = [
        line for line in (done.stdout + done.stderr).splitlines() if "makecontext" not in line and line.strip("= ")
    ]
    telling = (
        line for line in lines if any(word in line for word in ("wrong", "ERROR", "SUMMARY", "error", "WARNING"))
    )
    reason = next(telling, lines[-1] if lines else f"exit status {done.returncode}")
    return Verdict(done.returncode != 0, reason[:100], seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every fault of the list")
    parser.add_argument("names", nargs="*", help="faults by name, or parts of names")
    options = parser.parse_args()
    chosen = [fault for fault in FAULTS if options.all or any(name in fault.name for name in options.names)]
    if not chosen:
        parser.error("no fault is chosen: --all, or some of: " + "; ".join(fault.name for fault in FAULTS))
    missed = 0
    limits = {}
    for stage, check in sorted({(fault.stage, fault.check) for fault in chosen}):
        verdict = judge(stage, check)
        missed += verdict.fails
        # A mutant that takes ten times as long, and two minutes more, does not end.
        limits[stage, check] = 120 + 10 * verdict.seconds
        print(
            f"{stage:<8} {check:<9} {'WRONG' if verdict.fails else 'right':<7} without a fault: {verdict.reason}",
            flush=True,
        )
    for fault in chosen:
        verdict = judge(fault.stage, fault.check, fault, limit=limits[fault.stage, fault.check])
        missed += not verdict.fails
        caught = "caught" if verdict.fails else "MISSED"
        print(f"{fault.stage:<8} {fault.check:<9} {caught:<7} {fault.name}: {verdict.reason}", flush=True)
    print(f"{len(chosen)} faults, {missed} missed")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
