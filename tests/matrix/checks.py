"""The checks in an environment, and their outcome."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from pathlib import Path

from tests.matrix.environment import Environment

TESTS = {
    "sessions": ["tests/hf/session/test_session*.py", "tests/hf/engine/test_engine*.py"],
    "zoo": ["tests/hf/layouts/test_zoo.py"],
    "interpreted": ["tests/backends/triton"],
}
_COMPILED = re.compile(r"^(\d+) kernels with triton \S+, (\d+) at fault$", re.MULTILINE)


@dataclass
class Counts:
    """Numbers of tests by the report of junit; `kinds` maps each id in brackets to whether all its tests passed."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    kinds: dict[str, bool] = field(default_factory=dict)

    def __str__(self) -> str:
        more = [f", {count} {word}" for word in ("failed", "skipped") if (count := getattr(self, word))]
        return f"{self.passed} passed" + "".join(more)


@dataclass
class Outcome:
    """The outcome of a row: installed versions, counts, and failures."""

    versions: dict[str, str] = field(default_factory=dict)
    cells: dict[str, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    known: str | None = None
    seconds: float = 0.0

    @property
    def result(self) -> str:
        if self.faults:
            return "FAILED: " + "; ".join(self.faults)
        return "passed" if self.known is None else f"known: {self.known}"


def try_all(environment: Environment, outcome: Outcome) -> None:
    """Run every check, also after a failed one."""
    for name, patterns in TESTS.items():
        counts, status, output = test(environment, name, patterns)
        outcome.cells[name] = str(counts)
        if name == "zoo":
            outcome.cells[name] = f"{sum(counts.kinds.values())} of {len(counts.kinds)}"
        if status != 0 or not counts.passed:
            outcome.faults.append(f"{name}: {_last(output)}")
        print(f"  {name}: {outcome.cells[name]}", flush=True)
    status, output = environment.run([str(environment.python), "-m", "tests.backends.triton.offline"])
    match = _COMPILED.search(output)
    kernels, faulty = match.groups() if match else ("0", "0")
    outcome.cells["compiled"] = f"{kernels} kernels, {faulty} at fault"
    if status != 0 or kernels == "0":
        outcome.faults.append(f"compiled: {_last(output)}")
    print(f"  compiled: {outcome.cells['compiled']}", flush=True)


def test(environment: Environment, name: str, patterns: list[str]) -> tuple[Counts, int, str]:
    """Run test files, including the slow ones of the zoo: the counts, the exit status and the output."""
    files = [str(path) for pattern in patterns for path in sorted(environment.source.glob(pattern))]
    report = environment.folder / f"{name}.xml"
    every = ["-m", "not gpu"] if name == "zoo" else []
    command = [str(environment.python), "-m", "pytest", "-q", f"--junitxml={report}", *every, *files]
    status, output = environment.run(command)
    return count(report), status, output


def count(report: Path) -> Counts:
    """Read a report of junit; a missing report counts nothing."""
    counts = Counts()
    if not report.exists():
        return counts
    for case in ElementTree.parse(report).iter("testcase"):
        failed = case.find("failure") is not None or case.find("error") is not None
        skipped = case.find("skipped") is not None
        counts.failed += failed
        counts.skipped += skipped and not failed
        counts.passed += not failed and not skipped
        if kind := re.search(r"\[(.+)\]$", case.get("name", "")):
            counts.kinds[kind[1]] = counts.kinds.get(kind[1], True) and not failed and not skipped
    return counts


def _last(output: str) -> str:
    return next((line.strip("= ") for line in reversed(output.splitlines()) if line.strip()), "no output")
