"""capture on a CPU, warm and cold, on one thread and on two, against its goals; see `python -m benchmarks cpu`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import product

import torch

from benchmarks import bench_capture
from benchmarks.answers import check_maps, check_truth
from benchmarks.bench_capture import AUTO, EAGER, EAGER_LENGTH, FOLDED, READ, REPEAT
from benchmarks.cases import DTYPES, FULL_LENGTHS, GEOMETRIES, Case, Problem, problem, truth
from benchmarks.lines import Goal, Line, line, over
from benchmarks.machine import describe, last_level_cache
from benchmarks.timing import Before, Run, paired, warm

ROWS = (1, 8, 32)
QUICK = [Case("smolvlm", 512, rows, "bf16") for rows in (1, 8)]
HEADLINE = [
    *(Case("qwen2.5-vl-7b", length, 1, "bf16") for length in (2048, 8192, 32768)),
    Case("qwen2.5-vl-7b", 8192, 32, "bf16"),
    Case("qwen2.5-vl-7b", 8192, 1, "fp32"),
    *(Case(geometry, 8192, 1, "bf16") for geometry in GEOMETRIES if geometry != "qwen2.5-vl-7b"),
]
# An opponent whose call takes longer is not worth its rounds: it is left out, (c) and the floor never are.
SLOW = 2.0
# What one call may take and still find its keys where the call before it left them.
BRISK = 0.02
_WAYS = {
    EAGER: bench_capture.eager,
    REPEAT: bench_capture.repeat,
    FOLDED: bench_capture.folded,
    READ: bench_capture.read,
}


class Turns:
    """Copies of the keys, together larger than the last-level cache; a call reads the one read longest ago."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self.keys: list[torch.Tensor] = []
        self.turn = 0

    def fill(self, key: torch.Tensor) -> None:
        size = key.numel() * key.element_size()
        count = max(2, 1 + last_level_cache() * 5 // 4 // size)
        if self._memory.numel() < count * size:
            self._memory = torch.empty(count * size, dtype=torch.uint8)
        self.keys = list(self._memory[: count * size].view(key.dtype).view(count, *key.shape))
        for copy in self.keys:
            copy.copy_(key)
        self.turn = 0

    def __call__(self, _run: Run) -> None:
        self.turn = (self.turn + 1) % len(self.keys)


def everything() -> list[Case]:
    return [Case(*cell) for cell in product(GEOMETRIES, FULL_LENGTHS, ROWS, DTYPES)]


def measure(
    cases: Iterable[Case], threads: Iterable[int], *, budget: float, advance: Callable[[str], None]
) -> Iterator[Line]:
    """Cells that share their keys are measured together; every answer is checked before its cell is timed."""
    turns = Turns()
    shared: dict[tuple[str, int, str], list[int]] = {}
    for case in cases:
        shared.setdefault((case.geometry, case.length, case.dtype), []).append(case.rows)
    for (geometry, length, dtype), counts in shared.items():
        whole = problem(Case(geometry, length, max(counts), dtype))
        expected = truth(whole)
        turns.fill(whole.key)
        for rows in counts:
            case, given = Case(geometry, length, rows, dtype), _last(whole, rows)
            check_truth(str(case), expected[:, -rows:])
            for count in threads:
                torch.set_num_threads(count)
                yield from _cell(case, given, expected[:, -rows:], turns, count, budget)
                advance(f"{case}, {count} threads")


def _last(given: Problem, rows: int) -> Problem:
    """The same keys, asked by the last rows only; one row sees all keys."""
    if given.positions is None or given.hidden is None or rows == 1:
        return replace(given, query=given.query[:, :, -rows:], positions=None, hidden=None)
    positions, hidden = given.positions[:, -rows:], given.hidden[-rows:]
    return replace(given, query=given.query[:, :, -rows:], positions=positions, hidden=hidden)


def _cell(
    case: Case, given: Problem, expected: torch.Tensor, turns: Turns, threads: int, budget: float
) -> Iterator[Line]:
    # Dense keys, warm and cold: a slice of a longer cache costs torch's product, not capture, up to twenty times more.
    cold = [replace(given, key=key) for key in turns.keys]
    at_hand = cold[:1]

    def runs(problems: list[Problem]) -> dict[str, Run]:
        def here() -> Problem:
            return problems[turns.turn % len(problems)]

        def own() -> torch.Tensor:
            now = here()
            return bench_capture.capture(now.query, now.key, now.tokens, **now.options).maps

        return {AUTO: own} | {name: (lambda way=way: way(here())) for name, way in _WAYS.items()}

    slow = []
    for name, run in runs(at_hand).items():
        # Eager computes all rows, whichever are asked for.
        if name == READ or (name == EAGER and (case.length > EAGER_LENGTH or case.rows > 1)):
            continue
        start = time.perf_counter()
        found = run()
        took = time.perf_counter() - start
        rounded = case.dtype == "bf16" and name != AUTO
        bounds = {"relative": 0.1, "correlation": 0.999} if rounded else {"relative": 1e-4, "correlation": 1 - 1e-6}
        check_maps(f"{name}, {case}", found, expected, **bounds)
        if name in (EAGER, REPEAT) and took < SLOW:
            slow.append((name, took))
    for caches, problems in (("warm", at_hand), ("cold", cold)):
        ways = runs(problems)
        before: Before = warm if caches == "warm" else turns
        quick = {name: ways[name] for name in (AUTO, FOLDED, READ)}
        seconds = paired(quick, rounds=301, before=before, budget=budget)
        ratios = over(seconds, AUTO)
        for name, took in slow:
            pause = before if caches == "cold" or took < BRISK else _only(ways[AUTO])
            pair = paired({AUTO: ways[AUTO], name: ways[name]}, rounds=31, before=pause, budget=budget / 4)
            seconds[name], ratios = pair[name], ratios | over(pair, AUTO)
        labels = {
            "geometry": case.geometry,
            "S": case.length,
            "R": case.rows,
            "dtype": case.dtype,
            "threads": threads,
            "caches": caches,
        }
        yield line("capture: ms, and times capture", labels, ratios, _goals(case), seconds=seconds)


def _only(own: Run) -> Before:
    """Warm for one way; a call that takes longer than the caches remember needs none before it.

    A last level that takes in what the second one drops has the keys again after three calls, and not after one.
    """

    def thrice(run: Run) -> None:
        for _ in range(3 if run is own else 0):
            warm(run)

    return thrice


def _goals(case: Case) -> list[Goal]:
    if case == Case("qwen2.5-vl-7b", 32768, 1, "bf16"):
        return [Goal(READ, 0.7), Goal(FOLDED, 3), Goal(REPEAT, 50)]
    if case == Case("qwen2.5-vl-7b", 8192, 32, "bf16"):
        return [Goal(FOLDED, 6 if describe()["instructions"] == "amx" else 3)]
    return [Goal(FOLDED, 1.0), Goal(FOLDED, 0.9, at="p10")]
