"""capture against the usual ways to the same maps, and against a plain read of the keys, the lower bound.

`python -m benchmarks capture` times every opponent, `python -m benchmarks cpu` the CPU backend against its goals;
`pytest benchmarks/bench_capture.py` times the runs one by one.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import product
from typing import Any

import torch
from rich.table import Table

from benchmarks.support.answers import WrongAnswer, check_maps, check_truth
from benchmarks.support.cases import DTYPES, FULL_LENGTHS, GEOMETRIES, Case, Problem, problem, standard, truth
from benchmarks.support.lines import Goal, Line, line, over
from benchmarks.support.machine import describe, last_level_cache
from benchmarks.support.timing import Before, Flush, Run, Spread, no_preparation, paired, ratio, warm
from carve_kernels import BackendUnavailable, capture, contrast
from carve_kernels.backends import BACKENDS, resolve
from carve_kernels.types import CaptureOptions

AUTO, EAGER, REPEAT, FOLDED, READ = "capture", "(a) eager", "(b) repeat", "(c) folded", "(f) read"
CONVERTED = "(d) folded fp32"
RATE, SHARE = "products a ns", "of sgemm's"
SDPA = "sdpa prefill"
# The longest sequence whose [S, S] probabilities are computed.
EAGER_LENGTH = 2048

ROWS = (1, 8, 32)
QUICK_GOALS = [Case("smolvlm", 512, rows, "bf16") for rows in (1, 8)]
HEADLINE = [
    *(Case("qwen2.5-vl-7b", length, 1, "bf16") for length in (2048, 8192, 32768)),
    Case("qwen2.5-vl-7b", 8192, 32, "bf16"),
    Case("qwen2.5-vl-7b", 8192, 1, "fp32"),
    *(Case(geometry, 8192, 1, "bf16") for geometry in GEOMETRIES if geometry != "qwen2.5-vl-7b"),
]
# What one row of bf16 under grouped heads has to reach without AMX, in times folded torch.
LEAST = {"avx512_bf16": 2.0, "avx2": 1.3}
# Seconds of a call above which an opponent is left out; (c) and (f) never are.
SLOW = 2.0
# Seconds of a call below which the keys are still cached from the call before.
SHORT = 0.02


def eager(inputs: Problem) -> torch.Tensor:
    """The probabilities of all rows, as eager attention returns them, sliced."""
    length, rows = inputs.key.shape[2], inputs.query.shape[2]
    key = inputs.key.repeat_interleave(inputs.group, 1)
    scores = (inputs.queries @ key.mT * inputs.scale).masked_fill_(_future(length, key.device), -torch.inf)
    probabilities = scores.softmax(-1, dtype=torch.float32).to(key.dtype)
    return probabilities[:, :, length - rows :, inputs.tokens[0]].mean(1, dtype=torch.float32)


def repeat(inputs: Problem) -> torch.Tensor:
    """Only the chosen rows, with the keys repeated over the heads: the common idiom."""
    key = inputs.key.repeat_interleave(inputs.group, 1)
    scores = _hide(inputs.query @ key.mT * inputs.scale, inputs)
    return scores.softmax(-1, dtype=torch.float32)[..., inputs.tokens[0]].mean(1)


def folded(inputs: Problem) -> torch.Tensor:
    """The heads of a group as rows of one product, the mean before the gather: the fastest in plain torch."""
    batch, heads, rows, size = inputs.query.shape
    query = inputs.query.reshape(batch, inputs.key.shape[1], inputs.group * rows, size) * inputs.scale
    scores = _hide((query @ inputs.key.mT).view(batch, heads, rows, -1), inputs)
    return scores.softmax(-1, dtype=torch.float32).mean(1)[..., inputs.tokens[0]]


def converted(inputs: Problem) -> torch.Tensor:
    """The same on keys converted to float32: faster where the machine does not multiply bf16."""
    return folded(replace(inputs, query=inputs.query.float(), key=inputs.key.float()))


def read(inputs: Problem) -> torch.Tensor:
    return inputs.key.view(torch.float32).sum()


_WAYS = {
    EAGER: eager,
    REPEAT: repeat,
    FOLDED: folded,
    CONVERTED: converted,
    READ: read,
}


def opponents(inputs: Problem) -> dict[str, Run]:
    """Every opponent that works here; each returns the maps [1, R, N]."""
    runs: dict[str, Run] = {AUTO: lambda: capture(inputs.query, inputs.key, inputs.tokens, **inputs.options).maps}
    options = CaptureOptions(**inputs.options)
    for backend in BACKENDS:
        try:
            resolve("capture", backend, inputs.query.device, inputs.query, inputs.key, inputs.tokens, options)
        except BackendUnavailable:
            continue
        runs[f"{AUTO} {backend}"] = _with_backend(inputs, backend)
    ways: dict[str, Callable[[Problem], torch.Tensor]] = {REPEAT: repeat, FOLDED: folded}
    if inputs.key.shape[2] <= EAGER_LENGTH:
        ways = {EAGER: eager, **ways}
    return runs | {name: _way(way, inputs) for name, way in ways.items()}


def checked(case: Case) -> tuple[Problem, dict[str, Run]]:
    """The inputs of a case and its opponents, after their answers were checked."""
    inputs = problem(case)
    expected = truth(inputs)
    check_truth(str(case), expected)
    runs = opponents(inputs)
    for name, run in runs.items():
        _check(name, case, run(), expected)
    return inputs, {**runs, READ: _way(read, inputs)}


def _check(name: str, case: Case, found: torch.Tensor, expected: torch.Tensor) -> None:
    # Plain torch rounds scores, and eager its probabilities, to bf16; a backend always computes in float32.
    rounded = case.dtype == "bf16" and not name.startswith(AUTO)
    bounds = {"relative": 0.1, "correlation": 0.999} if rounded else {"relative": 1e-4, "correlation": 1 - 1e-6}
    check_maps(f"{name}, {case}", found, expected, **bounds)


def measure(
    cases: Iterable[Case], *, rounds: int, budget: float, advance: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Cold and warm seconds of every opponent in every case, and their ratios to capture, round by round."""
    flush = Flush()
    results = []
    for case in cases:
        inputs, runs = checked(case)
        for caches, before in (("cold", flush), ("warm", warm)):
            seconds = paired(runs, rounds=rounds, before=before, budget=budget)
            others = [name for name in seconds if name != AUTO]
            results.append(
                {
                    **case._asdict(),
                    "caches": caches,
                    "key_bytes": inputs.key.numel() * inputs.key.element_size(),
                    "seconds": {name: Spread.of(values)._asdict() for name, values in seconds.items()},
                    "ratio_to_capture": {name: ratio(seconds, name, AUTO)._asdict() for name in others},
                }
            )
        advance(str(case))
    return results


class KeyCopies:
    """Copies of the keys, together larger than the last-level cache; each call reads the least recently read one."""

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


def all_cases() -> list[Case]:
    return [Case(*cell) for cell in product(GEOMETRIES, FULL_LENGTHS, ROWS, DTYPES)]


def measure_goals(
    cases: Iterable[Case], threads: Iterable[int], *, budget: float, advance: Callable[[str], None]
) -> Iterator[Line]:
    """The CPU backend against its goals. Cases with the same keys share them; answers are checked before timing."""
    copies = KeyCopies()
    rates = {count: product_rate(count) for count in threads}
    shared: dict[tuple[str, int, str], list[int]] = {}
    for case in cases:
        shared.setdefault((case.geometry, case.length, case.dtype), []).append(case.rows)
    for (geometry, length, dtype), counts in shared.items():
        whole = problem(Case(geometry, length, max(counts), dtype))
        expected = truth(whole)
        copies.fill(whole.key)
        for rows in counts:
            case, inputs = Case(geometry, length, rows, dtype), _last(whole, rows)
            check_truth(str(case), expected[:, -rows:])
            for count in threads:
                torch.set_num_threads(count)
                yield from _goal_lines(case, inputs, expected[:, -rows:], copies, count, budget, rates[count])
                advance(f"{case}, {count} threads")


def _last(inputs: Problem, rows: int) -> Problem:
    """The same keys with only the last rows as queries; a single row sees all keys."""
    if inputs.positions is None or inputs.hidden is None or rows == 1:
        return replace(inputs, query=inputs.query[:, :, -rows:], positions=None, hidden=None)
    positions, hidden = inputs.positions[:, -rows:], inputs.hidden[-rows:]
    return replace(inputs, query=inputs.query[:, :, -rows:], positions=positions, hidden=hidden)


def product_rate(threads: int, size: int = 1024, rounds: int = 10) -> float:
    """Products a nanosecond in a square float32 product of torch: about what the multipliers can do."""
    torch.set_num_threads(threads)
    left, right = torch.randn(size, size), torch.randn(size, size)
    best = math.inf
    for _ in range(rounds):
        start = time.perf_counter()
        torch.mm(left, right)
        best = min(best, time.perf_counter() - start)
    return 1e-9 * size**3 / best


def _goal_lines(
    case: Case,
    inputs: Problem,
    expected: torch.Tensor,
    copies: KeyCopies,
    threads: int,
    budget: float,
    rate: float,
) -> Iterator[Line]:
    # Dense keys: on a slice of a longer cache torch's product, unlike capture, is up to twenty times slower.
    cold = [replace(inputs, key=key) for key in copies.keys]
    cached = cold[:1]

    def runs(problems: list[Problem]) -> dict[str, Run]:
        def current() -> Problem:
            return problems[copies.turn % len(problems)]

        def run_capture() -> torch.Tensor:
            now = current()
            return capture(now.query, now.key, now.tokens, **now.options).maps

        ways = {name: (lambda way=way: way(current())) for name, way in _WAYS.items()}
        # Where the dtype is float32, nothing is converted.
        return {AUTO: run_capture} | {name: run for name, run in ways.items() if name != CONVERTED or _is_half(case)}

    slow = []
    for name, run in runs(cached).items():
        # Eager always computes all rows.
        if name == READ or (name == EAGER and (case.length > EAGER_LENGTH or case.rows > 1)):
            continue
        start = time.perf_counter()
        found = run()
        took = time.perf_counter() - start
        _check(name, case, found, expected)
        if name in (EAGER, REPEAT) and took < SLOW:
            slow.append((name, took))
    for caches, problems in (("warm", cached), ("cold", cold)):
        ways = runs(problems)
        before: Before = warm if caches == "warm" else copies
        quick = {name: ways[name] for name in (AUTO, FOLDED, CONVERTED, READ) if name in ways}
        seconds = paired(quick, rounds=301, before=before, budget=budget)
        ratios = over(seconds, AUTO)
        for name, took in slow:
            pause = before if caches == "cold" or took < SHORT else _only(ways[AUTO])
            pair = paired({AUTO: ways[AUTO], name: ways[name]}, rounds=31, before=pause, budget=budget / 4)
            seconds[name], ratios = pair[name], ratios | over(pair, AUTO)
        labels = {
            "geometry": case.geometry,
            "S": case.length,
            "R": case.rows,
            "dtype": case.dtype,
            "threads": threads,
            "caches": caches,
            "instructions": f"{describe()['instructions']}, torch {torch_instructions()}",
            "products a key": case.rows * inputs.group * inputs.key.shape[3],
        }
        products = case.rows * inputs.query.shape[1] * case.length * inputs.key.shape[3]
        speeds = [1e-9 * products / one for one in seconds[AUTO]]
        ratios |= {RATE: Spread.of(speeds), SHARE: Spread.of([speed / rate for speed in speeds])}
        yield line("capture: ms, and times capture", labels, ratios, _goals(case), seconds=seconds)


def torch_instructions() -> str:
    """The levels of torch's own kernels and of oneDNN, which the environment may limit."""
    return f"{torch.backends.cpu.get_cpu_capability()} and oneDNN {os.environ.get('ONEDNN_MAX_CPU_ISA', 'unlimited')}"


def _is_half(case: Case) -> bool:
    return case.dtype != "fp32"


def _only(warmed: Run) -> Before:
    """Warm calls before one opponent; the other one takes longer than the caches hold its keys.

    A last level that holds what the second one evicts has the keys again after three calls, not after one.
    """

    def prepare(run: Run) -> None:
        for _ in range(3 if run is warmed else 0):
            warm(run)

    return prepare


def _goals(case: Case) -> list[Goal]:
    instructions = describe()["instructions"]
    geometry = GEOMETRIES[case.geometry]
    is_grouped = geometry.heads > geometry.key_heads
    if instructions in LEAST and is_grouped and case.rows == 1 and case.dtype == "bf16":
        return [Goal(FOLDED, LEAST[instructions]), Goal(CONVERTED, 1.0)]
    if case == Case("qwen2.5-vl-7b", 32768, 1, "bf16"):
        return [Goal(READ, 0.7), Goal(FOLDED, 3), Goal(REPEAT, 50)]
    if case == Case("qwen2.5-vl-7b", 8192, 32, "bf16"):
        return [Goal(FOLDED, 6 if instructions == "amx" else 3)]
    return [Goal(FOLDED, 1.0), Goal(FOLDED, 0.9, at="p10")]


def one_row(length: int, *, budget: float, advance: Callable[[str], None]) -> Iterator[Line]:
    """One captured row of a layer of the 7B against the attention of all rows of that layer."""
    case = Case("qwen2.5-vl-7b", length, 1, "bf16")
    inputs = problem(case)
    inputs = replace(inputs, key=inputs.key.contiguous())
    _check(AUTO, case, capture(inputs.query, inputs.key, inputs.tokens, **inputs.options).maps, truth(inputs))
    key = inputs.key.repeat_interleave(inputs.group, 1)
    attend = torch.nn.functional.scaled_dot_product_attention
    runs: dict[str, Run] = {
        AUTO: lambda: capture(inputs.query, inputs.key, inputs.tokens, **inputs.options),
        SDPA: lambda: attend(inputs.queries, key, key, is_causal=True, scale=inputs.scale),
    }
    seconds = paired(runs, rounds=51, before=warm, budget=2 * budget)
    labels = {"geometry": case.geometry, "S": length, "R": 1, "dtype": case.dtype, "threads": torch.get_num_threads()}
    goals = [Goal(AUTO, 0.003, most=True)]
    yield line(
        "one row: ms, and times the sdpa prefill of its layer",
        labels,
        {AUTO: ratio(seconds, AUTO, SDPA)},
        goals,
        seconds=seconds,
    )
    advance("one row")


def overhead(*, budget: float, advance: Callable[[str], None], calls: int = 200) -> Iterator[Line]:
    """Microseconds of a call with next to no work."""
    query, key = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 4, 16)
    tokens = torch.arange(4, dtype=torch.int32)[None]
    task, general = torch.rand(1, 1, 4), torch.rand(1, 1, 4)
    out = (torch.empty(1, 1, 4), torch.empty(1, 1), torch.empty(1, 1))
    operator = torch.ops.carve_kernels.capture_layers
    # A CPU uses neither scratch nor tickets.
    unused = torch.empty(0, dtype=torch.uint8), torch.empty(0, dtype=torch.int32)
    arguments = [query], [key], tokens, None, None, None, [], None, 0.25, 0.0, 0, False, None, 0, *unused, *out
    expected = capture(query, key, tokens, scale=0.25).maps
    runs: dict[str, tuple[Run, float]] = {
        "torch.ops capture_layers": (lambda: operator(*arguments), 10.0),
        "capture": (lambda: capture(query, key, tokens, scale=0.25), 30.0),
        "contrast": (lambda: contrast(task, general, (2, 2), (4, 4)), 30.0),
    }
    runs["torch.ops capture_layers"][0]()
    if not torch.equal(out[0], expected):
        raise WrongAnswer("torch.ops capture_layers: expected the maps of capture, got others")
    repeated = {name: _repeated(run, calls) for name, (run, _) in runs.items()}
    seconds = paired(repeated, rounds=101, before=no_preparation, budget=budget)
    for name, (_, limit) in runs.items():
        spread = Spread.of([1e6 * one / calls for one in seconds[name]])
        yield line("call overhead", {"call": name}, {"us": spread}, [Goal("us", limit, most=True)])
    advance("call overhead")


def _repeated(run: Run, calls: int) -> Run:
    def run_all() -> None:
        for _ in range(calls):
            run()

    return run_all


def tables(results: list[dict[str, Any]]) -> list[Table]:
    """Median milliseconds, and the ratio to the time of capture: median (p10-p90)."""
    result = []
    for caches in ("cold", "warm"):
        entries = [entry for entry in results if entry["caches"] == caches]
        names = list(dict.fromkeys(name for entry in entries for name in entry["seconds"]))
        table = Table(title=f"capture, caches {caches}: ms, and times capture")
        for heading in ("geometry", "S", "R", "dtype", *names):
            table.add_column(heading, justify="left" if heading == "geometry" else "right")
        for entry in entries:
            cells = [_cell(entry, name) for name in names]
            table.add_row(entry["geometry"], str(entry["length"]), str(entry["rows"]), entry["dtype"], *cells)
        result.append(table)
    return result


def _cell(entry: dict[str, Any], name: str) -> str:
    if name not in entry["seconds"]:
        return "-"
    cell = f"{1e3 * entry['seconds'][name]['median']:.3g}"
    if name in entry["ratio_to_capture"]:
        cell += f"\nx {Spread(**entry['ratio_to_capture'][name]).show()}"
    return cell


def _hide(scores: torch.Tensor, inputs: Problem) -> torch.Tensor:
    return scores if inputs.hidden is None else scores.masked_fill_(inputs.hidden, -torch.inf)


def _way(way: Callable[[Problem], torch.Tensor], inputs: Problem) -> Run:
    return lambda: way(inputs)


def _with_backend(inputs: Problem, backend: str) -> Run:
    return lambda: capture(inputs.query, inputs.key, inputs.tokens, **inputs.options, backend=backend).maps


# A model builds its causal mask once for all layers.
@lru_cache(maxsize=1)
def _future(length: int, device: torch.device) -> torch.Tensor:
    return torch.ones(length, length, dtype=torch.bool, device=device).triu(1)


_checked_once = lru_cache(maxsize=1)(checked)


def pytest_generate_tests(metafunc: Any) -> None:
    names = (AUTO, *(f"{AUTO} {backend}" for backend in BACKENDS), EAGER, REPEAT, FOLDED, READ)
    pairs = list(product(standard(("qwen2.5-vl-7b",)), names))
    metafunc.parametrize(("case", "opponent"), pairs, ids=[f"{case} {name}" for case, name in pairs])


def test_capture(benchmark: Any, case: Case, opponent: str) -> None:
    import pytest

    _, runs = _checked_once(case)
    if opponent not in runs:
        pytest.skip(f"{opponent} does not serve {case}")
    benchmark.group = str(case)
    benchmark(runs[opponent])
