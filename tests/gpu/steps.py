"""Steps that run one after the other within one budget, each with a time limit, a log and a line of the summary."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"
# Seconds from a polite end of a process to a forced one.
GRACE = 5.0


class Step(NamedTuple):
    """A command, made when it begins from the seconds that it may take.

    ========  ======================================================================================================
    most      the seconds that it may take
    least     the seconds that earlier steps leave to it
    skip      why it is not run, or None
    expected  a pattern that its log must have
    more      environment variables
    ========  ======================================================================================================
    """

    name: str
    command: Callable[[float], Sequence[str]]
    most: float
    least: float
    skip: str | None = None
    expected: str | None = None
    more: Mapping[str, str] = {}


class Outcome(NamedTuple):
    """How a step ended, and why or what it said last."""

    name: str
    result: str
    seconds: float
    said: str


def run_all(
    steps: Sequence[Step], folder: Path, budget: float, *, head: str, announce: Callable[[str], None]
) -> list[Outcome]:
    """Run the steps, with a log for each in the folder, and write `summary.md` after each of them."""
    end = time.monotonic() + budget
    outcomes: list[Outcome] = []
    for index, step in enumerate(steps):
        kept = sum(later.least for later in steps[index + 1 :] if later.skip is None)
        limit = min(step.most, end - time.monotonic() - kept)
        outcomes.append(_run(step, folder / f"{step.name}.log", limit))
        folder.joinpath("summary.md").write_text(summary(outcomes, steps, head), encoding="utf-8")
        announce(_line(outcomes[-1]))
    return outcomes


def _run(step: Step, log: Path, limit: float) -> Outcome:
    if step.skip is not None:
        return Outcome(step.name, SKIPPED, 0.0, step.skip)
    if limit < step.least:
        return Outcome(step.name, SKIPPED, 0.0, f"{max(limit, 0):.0f} s were left, it needs {step.least:.0f}")
    start = time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        try:
            process = subprocess.Popen(
                step.command(limit), cwd=ROOT, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                env={**os.environ, **step.more}, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            return Outcome(step.name, FAILED, 0.0, f"does not start: {error}")
        try:
            status: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _end(process)
    seconds = time.monotonic() - start
    text = log.read_text(encoding="utf-8", errors="replace")
    if status is None:
        return Outcome(step.name, FAILED, seconds, f"ended at its limit of {limit:.0f} s; last line: {_last(text)}")
    if status != 0:
        return Outcome(step.name, FAILED, seconds, f"status {status}: {_last(text)}")
    if step.expected is not None and not re.search(step.expected, text):
        return Outcome(step.name, FAILED, seconds, f"its log has no {step.expected!r}: {_last(text)}")
    return Outcome(step.name, PASSED, seconds, _last(text))


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and those that it started, which are in one group."""
    for signal_, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, GRACE)):
        try:
            os.killpg(process.pid, signal_)
            process.wait(patience)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def summary(outcomes: Sequence[Outcome], steps: Sequence[Step], head: str) -> str:
    """A table of the steps that are done, and the names of the others."""
    rows = [f"| {one.name} | {one.result} | {one.seconds:.0f} | {_cell(one.said)} |" for one in outcomes]
    left = [step.name for step in steps[len(outcomes) :]]
    more = f"\nNot run yet: {', '.join(left)}.\n" if left else ""
    table = "\n".join(["| step | result | seconds | why, or its last line |", "| --- | --- | --- | --- |", *rows])
    return f"# make gpu\n\n{head}\n\n{table}\n{more}"


def _line(outcome: Outcome) -> str:
    return f"{outcome.result:8} {outcome.name:12} {outcome.seconds:5.0f} s  {outcome.said}"


def _last(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "it printed nothing"


def _cell(text: str) -> str:
    return text.replace("|", "/")
